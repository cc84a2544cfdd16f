"""Which weights: the files they are read from, and what was placed."""

from __future__ import annotations

from typing import Literal

import msgspec

Naming = Literal["diffusers", "original"]
"""Whose tensor names a file has: Diffusers' (and transformers'), which are ours, or those of the Wan repositories."""


class Lora(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA file to be merged into a component as it is loaded, and how strongly."""

    file: str
    strength: float


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """Weights to load: `name` as in a Diffusers directory (text_encoder, image_encoder, transformer, transformer_2,
    vae), the files they are in (safetensors, or `.pth`), whose names the tensors have, and what is merged into them."""

    name: str
    files: list[str]
    naming: Naming = "diffusers"
    loras: list[Lora] = []


class WeightVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A component's weights, placed in memory that outlives the process that read them (`hotreload/placement.py`)."""

    component: str
    content: str
    """Hash of what was read, in hex: the same however it was sharded, named or placed."""
    fingerprint: str
    """Hash of the placed bytes, checked by everyone who binds to them."""
    bytes: int
    device: int | None = None
    """Number of the GPU that they are on; None: host memory."""


class AdapterVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a LoRA file adds to one component, in host memory (`hotreload/adapters.py`)."""

    version: WeightVersion
    rank: int
    """The highest of its pairs."""
    tensors: int
    """That it adds to."""


class WeightChange(msgspec.Struct, frozen=True, kw_only=True):
    """From step `step` of the task on (the first is 0), a component is that of this content hash."""

    step: int
    component: str
    content: str
