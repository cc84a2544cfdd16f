"""Supervisor to the process that reads a new version of weights, or a LoRA (`stages/loader.py`), and back:
`Loading` and `Placed`, or `PlacedLora`, of each component, then `ReadAll` or `ReadFailed`."""

from __future__ import annotations

import msgspec

from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ipc.errors import Failure
from ipc.messages.reports import Loading, Placed, StageReport
from ipc.messages.weights import AdapterVersion, Component


class Read(msgspec.Struct, frozen=True, tag_field="type", tag="read", kw_only=True):
    """Read and verify these components, and place each on each of its devices. One at a time; `ReadAll` or `ReadFailed`
    answers."""

    supervisor_pid: int
    components: list[Component]
    devices: dict[str, list[str]]
    """Component -> where it is wanted."""
    in_memory: list[str] = []
    """Names of components whose file came along as a descriptor, in the order of these."""
    manifest: str | None = None
    """A file as `sha256sum` writes it, which must name every file and have its sum."""
    dtype: str
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None


class ReadLora(msgspec.Struct, frozen=True, tag_field="type", tag="read_lora", kw_only=True):
    """Read and verify a LoRA, one file or one for each expert, and place what it adds to each of these components."""

    supervisor_pid: int
    files: list[str]
    components: list[str]
    """The model's transformers."""
    transformer: TransformerConfig


class PlacedLora(StageReport, frozen=True, tag="placed_lora", kw_only=True):
    """What a LoRA adds to one component was read into host memory; its descriptor comes with the message."""

    adapter: AdapterVersion


class ReadAll(StageReport, frozen=True, tag="read_all", kw_only=True):
    """Everything is placed, and was handed over."""


class ReadFailed(StageReport, frozen=True, tag="read_failed", kw_only=True):
    """What is wrong with the files, or with the machine."""

    error: Failure


AnyLoaderReport = Loading | Placed | PlacedLora | ReadAll | ReadFailed
