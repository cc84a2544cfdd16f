"""Which code encodes and decodes clips. Within the life of an engine it is chosen once: by the first vae, which tells
the supervisor, which tells all others.

On a GPU whose kernels are right (`stages/models/vae_check.py`), a VAE runs in bfloat16 with `FastDecoder` and
`FastEncoder`. Else `WanVae` in float32, as in the original. The two differ by the rounding of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ipc.architecture import VaeConfig
from ipc.messages.names import KernelKind
from stages.models import vae_plain_tiles
from stages.models.vae import WanVae
from stages.models.vae_decode import FastDecoder
from stages.models.vae_encode import FastEncoder
from stages.models.vae_fast_tiles import TileDecoder, TileEncoder
from stages.models.vae_layers import Cache
from stages.models.vae_tiles import TILE_BUDGET, Piece, Tile
from stages.models.vae_walk import Clip, Operations

Kept: TypeAlias = list[Any]
"""What is between a clip's tiles and the lowest level of the VAE, in host memory. Any codec of the same kind, with the
same weights, can go on with it."""


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

    # A whole clip in tiles, part by part: see `stages/models/vae_tiles.py`. `beat` is as in `Links`.

    def tiles_to_decode(self, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
        """Of a clip of height x width latents, tiles whose activations take at most `budget` bytes. chunk: latent
        frames per `ClipCoder.decode` of the untiled clip that this is to equal."""

    def decode_lowest(self, latents: Tensor, chunk: int, beat: Callable[[], None]) -> Kept:
        """First: all normalised latents [1, z, T, h, w] -> what every tile is made of."""

    def decode_tile(self, kept: Kept, tile: Tile) -> Iterator[Piece]:
        """Then each tile: all its pixels, in the order of time; between pieces who takes them may call `beat`."""

    def tiles_to_encode(self, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
        """As `tiles_to_decode`. chunk: latent frames that the longest of the clip's chunks becomes."""

    def encode_tile(
        self, chunks: Iterable[Tensor], height: int, width: int, tile: Tile, kept: Kept, beat: Callable[[], None]
    ) -> None:
        """First each tile: all frames of a clip of height x width latents, in chunks as `ClipCoder.encode` takes them
        but on any device, -> the tile's part of what is `kept`, which is empty before the first."""

    def encode_lowest(self, kept: Kept) -> Tensor:
        """Then what all tiles have `kept` -> normalised latents [1, z, t, h, w]."""


def decode_tiles(
    codec: Codec, latents: Tensor, chunk: int = 1, budget: int = TILE_BUDGET, beat: Callable[[], None] = lambda: None
) -> Iterator[Piece]:
    """A whole clip, normalised latents [1, z, T, h, w], at once: all its pixels, tile by tile. beat: called before the
    first piece comes."""
    height, width = latents.shape[3:]
    tiles = codec.tiles_to_decode(height, width, chunk, budget)
    kept = codec.decode_lowest(latents, chunk, beat)
    for tile in tiles:
        yield from codec.decode_tile(kept, tile)


def encode_tiles(
    codec: Codec, chunks: Collection[Tensor], height: int, width: int, budget: int = TILE_BUDGET,
    beat: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """All frames of a clip of height x width latents, at once -> its latents. beat: called after every chunk."""
    kept: Kept = []
    chunk = max(-(-chunk.shape[2] // codec.config.temporal_stride) for chunk in chunks)
    for tile in codec.tiles_to_encode(height, width, chunk, budget):
        codec.encode_tile(chunks, height, width, tile, kept, beat)
    return codec.encode_lowest(kept)


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

    def tiles_to_decode(self, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
        return vae_plain_tiles.tiles_to_decode(self.vae, height, width, chunk, budget)

    def decode_lowest(self, latents: Tensor, chunk: int, beat: Callable[[], None]) -> Kept:
        return vae_plain_tiles.decode_lowest(self.vae, latents, chunk, beat)

    def decode_tile(self, kept: Kept, tile: Tile) -> Iterator[Piece]:
        return vae_plain_tiles.decode_tile(self.vae, kept, tile)

    def tiles_to_encode(self, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
        return vae_plain_tiles.tiles_to_encode(self.vae, height, width, chunk, budget)

    def encode_tile(
        self, chunks: Iterable[Tensor], height: int, width: int, tile: Tile, kept: Kept, beat: Callable[[], None]
    ) -> None:
        vae_plain_tiles.encode_tile(self.vae, chunks, height, width, tile, kept, beat)

    def encode_lowest(self, kept: Kept) -> Tensor:
        return vae_plain_tiles.encode_lowest(self.vae, kept)


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

    def tiles_to_decode(self, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
        return self.tile_decoder.tiles(height, width, budget)

    def decode_lowest(self, latents: Tensor, chunk: int, beat: Callable[[], None]) -> Kept:
        return self.tile_decoder.lowest(latents, beat)

    def decode_tile(self, kept: Kept, tile: Tile) -> Iterator[Piece]:
        return self.tile_decoder.tile(kept, tile)

    def tiles_to_encode(self, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
        return self.tile_encoder.tiles(height, width, budget)

    def encode_tile(
        self, chunks: Iterable[Tensor], height: int, width: int, tile: Tile, kept: Kept, beat: Callable[[], None]
    ) -> None:
        self.tile_encoder.tile(chunks, height, width, tile, kept, beat)

    def encode_lowest(self, kept: Kept) -> Tensor:
        return self.tile_encoder.lowest(kept)


def make_codec(vae: WanVae, kind: KernelKind, device: torch.device) -> Codec:
    """The codec that computes with `kind` on `device`, on which `vae` is."""
    if kind == "torch":
        return PlainCodec(vae)
    from stages.kernels.vae_launch import Kernels

    return FastCodec(vae, Kernels(has_tma(device)), torch.bfloat16)


def has_tma(device: torch.device) -> bool:
    """Whether a GPU has a tensor memory accelerator."""
    return torch.cuda.get_device_capability(device) >= (9, 0)
