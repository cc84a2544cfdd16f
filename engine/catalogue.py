"""`engine models`: what each known model is, and whether its weights are here."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from engine.checkpoint import file_bytes, open_model
from engine.footprint import Need, needs, usual_size
from engine.models import known_models
from engine.params import ModelParams, SystemParams
from engine.weight_sizes import ITEM_BYTES, transformer_bytes
from ipc.architecture import Conditioning, TransformerConfig
from ipc.errors import BadCheckpoint, BadConfig


class Weights(NamedTuple):
    """`bytes` on disk; 0 and `missing` says why if they are not here."""

    bytes: int
    missing: str


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `engine models`."""

    name: str
    description: str
    kind: str
    """What it makes of what."""
    experts: int
    transformer_parameters: int
    """Of one expert."""
    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float
    max_pixels: int
    max_frames: int
    weights_bytes: int
    weights_missing: str
    levels: list[Need]
    """What a usual video takes at each memory level, on one GPU."""


def describe_models() -> tuple[list[ModelCard], list[str]]:
    """All known models, by name, and what is wrong with each YAML that is none. Reads headers, no weights."""
    models, problems = known_models()
    return [_card(model) for model in models], problems


def kind(conditioning: Conditioning) -> str:
    """What a model makes a video of."""
    return {"none": "text", "channels": "image", "first_frame": "text/image"}[conditioning] + " to video"


def transformer_parameters(config: TransformerConfig) -> int:
    """Weights and biases of one Wan DiT."""
    return transformer_bytes(config, "float32").total // ITEM_BYTES["float32"]


def _card(model: ModelParams) -> ModelCard:
    weights, defaults = _weights(model), model.defaults
    return ModelCard(
        name=model.name, description=model.description, kind=kind(model.conditioning),
        experts=1 if model.boundary is None else 2, transformer_parameters=transformer_parameters(model.transformer),
        height=defaults.height, width=defaults.width, num_frames=defaults.num_frames, fps=defaults.fps,
        steps=defaults.steps, guidance_scale=defaults.guidance_scale, max_pixels=model.limits.max_pixels,
        max_frames=model.limits.max_frames, weights_bytes=weights.bytes, weights_missing=weights.missing,
        levels=needs(model, usual_size(model)),
    )  # fmt: skip


def _weights(model: ModelParams) -> Weights:
    if model.checkpoint is None:
        return Weights(0, "--checkpoint DIR")
    try:
        checkpoint = open_model(model, SystemParams(model=model.name))
        return Weights(sum(file_bytes(component) for component in checkpoint.components.values()), "")
    except (BadConfig, BadCheckpoint) as error:
        return Weights(0, str(error))
