"""Which code encodes and decodes clips. Within the life of an engine it is chosen once: by the first vae, which tells
the supervisor, which tells all others.

On a GPU whose kernels are right (`stages/models/vae_check.py`), a VAE runs in bfloat16 with `FastDecoder` and
`FastEncoder`. Else `WanVae` in float32, as in the original. The two differ by the rounding of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ipc.architecture import VaeConfig
from ipc.messages import KernelKind
from stages.models.vae import WanVae
from stages.models.vae_decode import FastDecoder
from stages.models.vae_encode import FastEncoder
from stages.models.vae_fast_tiles import TileDecoder, TileEncoder
from stages.models.vae_layers import Cache
from stages.models.vae_plain_tiles import decode_tiles, encode_tiles
from stages.models.vae_tiles import TILE_BUDGET, Piece
from stages.models.vae_walk import Clip, Operations


class ClipCoder(Protocol):
    """One clip, chunk by chunk, in one direction: what it has seen is in its memory."""

    def encode(self, frames: Tensor) -> Tensor:
        """See `WanVae.encode_chunk`."""

    def decode(self, latents: Tensor) -> Tensor:
        """See `WanVae.decode_chunk`."""

    @property
    def nbytes(self) -> int:
        """Of the memory between chunks."""


class Codec(Protocol):
    @property
    def name(self) -> str:
        """For people: what computes, and in which dtype."""

    @property
    def config(self) -> VaeConfig: ...

    def clip(self, height: int, width: int) -> ClipCoder:
        """A clip of height x width latents that has not begun."""

    def decode_tiles(
        self, latents: Tensor, chunk: int = 1, budget: int = TILE_BUDGET, beat: Callable[[], None] = lambda: None
    ) -> Iterator[Piece]:
        """A whole clip, normalised latents [1, z, T, h, w], in tiles whose activations take at most `budget` bytes: all
        its pixels, of a tile in the order of time. See `stages/models/vae_tiles.py`.

        chunk: latent frames per `ClipCoder.decode` of the untiled clip that this is to equal. beat: as in `Links`,
        called before the first piece comes; between pieces who takes them may do it."""

    def encode_tiles(
        self, chunks: Iterable[Tensor], height: int, width: int, budget: int = TILE_BUDGET,
        beat: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """All frames of a clip of height x width latents, in chunks as `ClipCoder.encode` takes them but on any device,
        -> its latents. They are gone through once per tile, whose activations take at most `budget` bytes. beat: as in
        `Links`."""


@dataclass(slots=True)
class PlainClip:
    """A clip in `WanVae`."""

    vae: WanVae
    cache: Cache = field(default_factory=dict)

    def encode(self, frames: Tensor) -> Tensor:
        return self.vae.encode_chunk(frames, self.cache)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode_chunk(latents, self.cache)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.cache.values())


@dataclass(frozen=True, slots=True)
class PlainCodec:
    """`WanVae` in the dtype of its weights."""

    vae: WanVae

    @property
    def name(self) -> str:
        return "plain torch, float32"

    @property
    def config(self) -> VaeConfig:
        return self.vae.config

    def clip(self, height: int, width: int) -> PlainClip:
        return PlainClip(self.vae)

    def decode_tiles(
        self, latents: Tensor, chunk: int = 1, budget: int = TILE_BUDGET, beat: Callable[[], None] = lambda: None
    ) -> Iterator[Piece]:
        return decode_tiles(self.vae, latents, chunk, budget, beat)

    def encode_tiles(
        self, chunks: Iterable[Tensor], height: int, width: int, budget: int = TILE_BUDGET,
        beat: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        return encode_tiles(self.vae, chunks, height, width, budget, beat)


@dataclass(slots=True)
class FastClip:
    """A clip in frame pools, which are made when its direction is known."""

    codec: FastCodec
    height: int
    width: int
    memory: Clip | None = None

    def encode(self, frames: Tensor) -> Tensor:
        if self.memory is None:
            self.memory = self.codec.encoder.clip(self.height, self.width)
        return self.codec.encoder.encode_chunk(frames, self.memory)

    def decode(self, latents: Tensor) -> Tensor:
        if self.memory is None:
            self.memory = self.codec.decoder.clip(self.height, self.width)
        return self.codec.decoder.decode_chunk(latents, self.memory)

    @property
    def nbytes(self) -> int:
        return 0 if self.memory is None else self.memory.nbytes


@dataclass
class FastCodec:
    """`FastDecoder` and `FastEncoder`, each with its own copy of the weights from its first use on.

    They are made of what `vae` is bound to then; it must be bound to the same whenever a clip of this codec goes on.
    """

    vae: WanVae
    operations: Operations
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"fused kernels, {str(self.dtype).removeprefix('torch.')}"

    @property
    def config(self) -> VaeConfig:
        return self.vae.config

    @cached_property
    def decoder(self) -> FastDecoder:
        return FastDecoder(self.vae, self.operations, self.dtype)

    @cached_property
    def tile_decoder(self) -> TileDecoder:
        return TileDecoder(self.decoder)

    @cached_property
    def encoder(self) -> FastEncoder:
        return FastEncoder(self.vae, self.operations, self.dtype)

    @cached_property
    def tile_encoder(self) -> TileEncoder:
        return TileEncoder(self.encoder)

    def clip(self, height: int, width: int) -> FastClip:
        return FastClip(self, height, width)

    def decode_tiles(
        self, latents: Tensor, chunk: int = 1, budget: int = TILE_BUDGET, beat: Callable[[], None] = lambda: None
    ) -> Iterator[Piece]:
        return self.tile_decoder.decode(latents, budget, beat)

    def encode_tiles(
        self, chunks: Iterable[Tensor], height: int, width: int, budget: int = TILE_BUDGET,
        beat: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        return self.tile_encoder.encode(chunks, height, width, budget, beat)


def make_codec(vae: WanVae, kind: KernelKind, device: torch.device) -> Codec:
    """The codec that computes with `kind` on `device`, on which `vae` is."""
    if kind == "torch":
        return PlainCodec(vae)
    from stages.kernels.vae_launch import Kernels

    return FastCodec(vae, Kernels(has_tma(device)), torch.bfloat16)


def has_tma(device: torch.device) -> bool:
    """Whether a GPU has a tensor memory accelerator."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
