"""`engine models`: what each known model is, and whether its weights are here."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from engine.models import checkpoint_directory, list_models, load_model
from engine.params import ModelParams
from hotreload.checkpoint import check_directory, components, find_files
from ipc.architecture import TransformerConfig
from ipc.errors import BadCheckpoint, BadConfig


class Weights(NamedTuple):
    """`bytes` on disk; 0 and `missing` says why if they are not here."""

    bytes: int
    missing: str


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `engine models`."""

    name: str
    description: str
    transformer_parameters: int
    """Of all experts together."""
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


def describe_models() -> list[ModelCard]:
    """All known models, by name. Reads headers of weight files, no weights."""
    return [_card(load_model(name)) for name in list_models()]


def transformer_parameters(config: TransformerConfig) -> int:
    """Weights and biases of one Wan DiT."""
    dim, ffn, patch = config.dim, config.ffn_dim, config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    attention = 4 * (dim * dim + dim) + 2 * dim
    block = 2 * attention + 2 * dim * ffn + ffn + dim + 6 * dim + (2 * dim if config.cross_attn_norm else 0)
    time = config.freq_dim * dim + dim + dim * dim + dim + 6 * (dim * dim + dim)
    text = config.text_dim * dim + dim + dim * dim + dim
    ends = config.in_channels * patch * dim + dim + dim * config.out_channels * patch + config.out_channels * patch
    return config.num_layers * block + time + text + ends + 2 * dim


def _card(model: ModelParams) -> ModelCard:
    weights, defaults = _weights(model), model.defaults
    experts = 1 if model.boundary is None else 2
    return ModelCard(
        name=model.name, description=model.description,
        transformer_parameters=experts * transformer_parameters(model.transformer), height=defaults.height,
        width=defaults.width, num_frames=defaults.num_frames, fps=defaults.fps, steps=defaults.steps,
        guidance_scale=defaults.guidance_scale, max_pixels=model.limits.max_pixels, max_frames=model.limits.max_frames,
        weights_bytes=weights.bytes, weights_missing=weights.missing,
    )  # fmt: skip


def _weights(model: ModelParams) -> Weights:
    two_experts = model.boundary is not None
    try:
        directory = checkpoint_directory(model, None)
        check_directory(directory, two_experts=two_experts)
        files = [file for name in components(two_experts) for file in find_files(directory / name, name)]
        return Weights(sum(file.stat().st_size for file in files), "")
    except (BadConfig, BadCheckpoint) as error:
        return Weights(0, str(error))
