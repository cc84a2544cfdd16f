"""`engine models`: what each known model is, and whether its weights are here."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from engine.check import read_size, size_given
from engine.checkpoint import file_bytes, open_model
from engine.footprint import Need, RequestSize, needs, usual_size
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
    size: RequestSize | None
    """Of the video whose memory is told."""
    levels: list[Need]
    """What such a video takes at each memory level, on one GPU."""
    size_refused: str
    """Why the model makes none of the size that was asked for; empty if it does."""


def describe_models(size: str | None = None) -> tuple[list[ModelCard], list[str]]:
    """All known models, by name, and what is wrong with each YAML that is none. Reads headers, no weights.

    `size`: of the video whose memory is told, as in `check.read_size`; without, each model's usual one. `BadConfig` if
    it is none, or none that any model makes; one that does not says so in its card."""
    if size is not None:
        size_given(size)
    models, problems = known_models()
    cards = [_card(model, size) for model in models]
    if cards and all(card.size_refused for card in cards):
        raise BadConfig(f"no known model makes a video of {size}; `engine models` lists their usual ones")
    return cards, problems


def kind(conditioning: Conditioning) -> str:
    """What a model makes a video of."""
    return {"none": "text", "channels": "image", "first_frame": "text/image"}[conditioning] + " to video"


def transformer_parameters(config: TransformerConfig) -> int:
    """Weights and biases of one Wan DiT."""
    return transformer_bytes(config, "float32").total // ITEM_BYTES["float32"]


def _card(model: ModelParams, size: str | None) -> ModelCard:
    weights, defaults = _weights(model), model.defaults
    video, refused = _video(model, size)
    return ModelCard(
        name=model.name, description=model.description, kind=kind(model.conditioning),
        experts=1 if model.boundary is None else 2, transformer_parameters=transformer_parameters(model.transformer),
        height=defaults.height, width=defaults.width, num_frames=defaults.num_frames, fps=defaults.fps,
        steps=defaults.steps, guidance_scale=defaults.guidance_scale, max_pixels=model.limits.max_pixels,
        max_frames=model.limits.max_frames, weights_bytes=weights.bytes, weights_missing=weights.missing,
        size=video, levels=[] if video is None else needs(model, video), size_refused=refused,
    )  # fmt: skip


def _video(model: ModelParams, size: str | None) -> tuple[RequestSize | None, str]:
    """The size of the video whose memory is told, or why there is none."""
    if size is None:
        return usual_size(model), ""
    try:
        return read_size(size, model), ""
    except BadConfig as error:
        return None, str(error)


def _weights(model: ModelParams) -> Weights:
    if model.checkpoint is None:
        return Weights(0, "--checkpoint DIR")
    try:
        checkpoint = open_model(model, SystemParams(model=model.name))
        return Weights(sum(file_bytes(component) for component in checkpoint.components.values()), "")
    except (BadConfig, BadCheckpoint) as error:
        return Weights(0, str(error))
