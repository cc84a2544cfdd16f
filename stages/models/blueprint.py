"""The network of a component as its stage builds it, without weights: for `engine check` and the loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from stages.models.blank import blank


class Architectures(Protocol):
    """The numbers of a model's networks."""

    @property
    def transformer(self) -> TransformerConfig: ...
    @property
    def vae(self) -> VaeConfig: ...
    @property
    def text_encoder(self) -> TextEncoderConfig: ...
    @property
    def image_encoder(self) -> ImageEncoderConfig | None: ...


class Blueprint(NamedTuple):
    """One component as its stage builds it, on the meta device."""

    module: nn.Module
    stays_float32: Callable[[str], bool]
    """Of a tensor's name: it is kept in float32 whatever dtype the engine computes in."""
    aliases: Mapping[str, str]
    """Second names of tensors."""

    def dtype(self, computing: torch.dtype) -> Callable[[str], torch.dtype]:
        """Of each tensor, in an engine that computes in this dtype."""
        return lambda name: torch.float32 if self.stays_float32(name) else computing

    def tensors(self) -> dict[str, Tensor]:
        """By first name."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in self.aliases}


def build(name: str, asked: Architectures) -> Blueprint:
    """The network of a component; what only it needs is imported here."""
    with blank():
        match name:
            case "text_encoder":
                from stages.models import text_encoder

                return Blueprint(text_encoder.build(asked.text_encoder), lambda key: False, text_encoder.ALIASES)
            case "image_encoder":
                from stages.models import image_encoder

                assert asked.image_encoder is not None, "the model has an image encoder"
                return Blueprint(image_encoder.ImageEncoder(asked.image_encoder), lambda key: False, {})
            case "transformer" | "transformer_2":
                from stages.models.transformer import WanTransformer, keeps_float32

                return Blueprint(WanTransformer(asked.transformer), keeps_float32, {})
            case "vae":
                from stages.models.vae import WanVae

                return Blueprint(WanVae(asked.vae), lambda key: True, {})
    raise ValueError(f"there is no component {name!r}")
