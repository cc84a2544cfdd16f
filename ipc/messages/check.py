"""`engine check` to the process that examines a checkpoint, and back, as JSON."""

from __future__ import annotations

import msgspec

from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ipc.messages.weights import Component


class CheckAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Compare the headers of `components` with the networks of a model, and say what all of those take up."""

    wanted: list[str]
    """Names of all components of the model; of those that were not found, only the size is asked for."""
    components: list[Component]
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None


class ComponentChecked(msgspec.Struct, frozen=True, kw_only=True):
    """One component. `dtypes` and `parameters` are those of the files, the `bytes` those of the network once loaded."""

    name: str
    dtypes: dict[str, int]
    """safetensors' name of the dtype -> number of tensors."""
    parameters: int
    wrong: dict[str, list[str]]
    """What is wrong -> with which tensors, all of them."""
    unreadable: str
    """Why the files could not be compared; empty if they could."""
    bytes_bfloat16: int
    """Loaded with dtype bfloat16, in which some tensors stay float32."""
    bytes_float32: int
