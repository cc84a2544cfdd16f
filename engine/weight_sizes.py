"""How many bytes the weights of a model take, from its architecture alone: what torch would say, without torch.

Derived from the modules in `stages/models/`; a test compares every figure with theirs.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import NamedTuple

from engine.params import ModelParams
from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""By what an engine computes in."""


class TransformerBytes(NamedTuple):
    """One transformer, in the parts that memory levels tell apart."""

    layers: int
    block: int
    """Of one block, what every step reads."""
    cross: int
    """Of one block, what makes keys and values of the prompt and of an image: read once per request."""
    embedder: int
    """What embeds the timestep, the prompt and an image: used once per request."""
    rest: int
    """The embedding of patches, and the head."""

    @property
    def total(self) -> int:
        return self.layers * (self.block + self.cross) + self.embedder + self.rest


class TextEncoderBytes(NamedTuple):
    """The text encoder, likewise."""

    layers: int
    block: int
    embedding: int
    rest: int

    @property
    def total(self) -> int:
        return self.layers * self.block + self.embedding + self.rest


@functools.cache
def transformer_bytes(config: TransformerConfig, dtype: str) -> TransformerBytes:
    """In an engine that computes in `dtype`; time embedding, modulation, norm2 and head are float32 in all."""
    item, dim, ffn, patch = ITEM_BYTES[dtype], config.dim, config.ffn_dim, math.prod(config.patch_size)
    square = dim * dim + dim
    block = item * (6 * square + 3 * dim + 2 * dim * ffn + ffn + dim) + 4 * 6 * dim
    block += 4 * 2 * dim if config.cross_attn_norm else 0
    cross = item * (2 * square + dim)
    time = config.freq_dim * dim + dim + square + 6 * square
    embedder = item * (config.text_dim * dim + dim + square) + 4 * time
    rest = item * (config.in_channels * patch * dim + dim)
    rest += 4 * (2 * dim + dim * config.out_channels * patch + config.out_channels * patch)
    if (width := config.image_dim) is not None:
        cross += item * (2 * square + dim)
        embedder += item * (width * width + width + width * dim + dim) + 4 * (2 * width + 2 * dim)
    return TransformerBytes(config.num_layers, block, cross, embedder, rest)


@functools.cache
def text_encoder_bytes(config: TextEncoderConfig, dtype: str) -> TextEncoderBytes:
    item, width, inner = ITEM_BYTES[dtype], config.d_model, config.num_heads * config.d_kv
    bias = config.relative_attention_num_buckets * config.num_heads
    block = 4 * width * inner + bias + 3 * width * config.d_ff + 2 * width
    return TextEncoderBytes(config.num_layers, item * block, item * config.vocab_size * width, item * width)


def image_encoder_bytes(config: ImageEncoderConfig, dtype: str) -> int:
    """Of what is run: all blocks but the last."""
    width, inner = config.hidden_size, config.intermediate_size
    ends = width + 3 * width * config.patch_size**2 + config.tokens * width + 2 * width
    block = 4 * width + 4 * (width * width + width) + 2 * width * inner + inner + width
    return ITEM_BYTES[dtype] * (ends + (config.num_hidden_layers - 1) * block)


def vae_bytes(config: VaeConfig) -> int:
    """Float32 in every engine."""
    return 4 * vae_parameters(config)


@functools.cache
def vae_parameters(config: VaeConfig) -> int:
    pixels, z = 3 * config.patch_size**2, config.z_dim
    base = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
    down = [config.base_dim * m for m in (1, *config.dim_mult)]
    up = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    ends = _conv(pixels, down[0], 27) + _middle(down[-1]) + down[-1] + _conv(down[-1], 2 * z, 27)
    ends += _conv(z, up[0], 27) + _middle(up[0]) + up[-1] + _conv(up[-1], pixels, 27)
    ends += _conv(2 * z, 2 * z, 1) + _conv(z, z, 1)
    return ends + _encoder_stages(config, down) + _decoder_stages(config, up)


def _encoder_stages(config: VaeConfig, widths: list[int]) -> int:
    total = 0
    for (width_in, width), time in zip(pairwise(widths), (*config.temporal_downsample, None), strict=True):
        total += _residual(width_in, width) + (config.num_res_blocks - 1) * _residual(width, width)
        if time is not None:
            total += _conv(width, width, 9) + (_conv(width, width, 3) if time else 0)
    return total


def _decoder_stages(config: VaeConfig, widths: list[int]) -> int:
    """The convolution after each upsampling halves the channels, but Wan2.2's keeps them."""
    total, doubles_time = 0, (*reversed(config.temporal_downsample), None)
    for stage, ((width_in, width), time) in enumerate(zip(pairwise(widths), doubles_time, strict=True)):
        if not config.is_residual and stage:
            width_in //= 2
        total += _residual(width_in, width) + config.num_res_blocks * _residual(width, width)
        if time is not None:
            width_out = width if config.is_residual else width // 2
            total += _conv(width, width_out, 9) + (_conv(width, 2 * width, 3) if time else 0)
    return total


def _conv(channels_in: int, channels: int, kernel: int) -> int:
    return channels_in * channels * kernel + channels


def _residual(width_in: int, width: int) -> int:
    shortcut = _conv(width_in, width, 1) if width_in != width else 0
    return width_in + _conv(width_in, width, 27) + width + _conv(width, width, 27) + shortcut


def _middle(width: int) -> int:
    return 2 * _residual(width, width) + width + _conv(width, 3 * width, 1) + _conv(width, width, 1)


def component_bytes(model: ModelParams, dtype: str) -> dict[str, int]:
    """Component -> bytes of its weights once loaded, in an engine that computes in `dtype`."""
    sizes = {
        "text_encoder": text_encoder_bytes(model.text_encoder, dtype).total,
        "transformer": transformer_bytes(model.transformer, dtype).total,
        "vae": vae_bytes(model.vae),
    }
    if model.boundary is not None:
        sizes["transformer_2"] = sizes["transformer"]
    if model.image_encoder is not None:
        sizes["image_encoder"] = image_encoder_bytes(model.image_encoder, dtype)
    return {name: sizes[name] for name in model.components}
