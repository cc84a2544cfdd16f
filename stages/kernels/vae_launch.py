"""Launching the kernels of `stages/kernels/vae_conv.py`: the same functions as in `stages/models/vae_conv.py`."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stages.kernels.vae_conv import conv_kernel, norm_silu_kernel
from stages.models.vae_conv import NORM_EPS, Conv, Target, padded_width, split_width
from stages.models.vae_frames import FramePool, pack

NORM_ROWS = 8
"""Pixels per program of the norm kernel."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work of a convolution is cut."""

    m: int
    """Pixels per program."""
    k: int
    """Input channels per step."""
    warps: int
    stages: int
    n: tuple[int, int] | None = None
    """Output channels per program, of those of which there are more than 256. None: as `split_width` says."""
    registers: int | None = None
    """At most so many per thread; None leaves it to the compiler."""
    frames_inside: bool = False
    """Whether the frames of a launch take turns tile by tile; see `conv_kernel`."""
    tma: bool = True
    """Whether the tensor memory accelerator fetches; else threads do, which any GPU and any stride can."""


WIDE_FROM = 12800
"""Pixels of a frame from which one program makes all of 384 channels. It reads each pixel once, but of smaller frames
there are fewer such programs than an H100 has multiprocessors."""


def choose_tile(layer: Conv, tma: bool, *, residual: bool, wide: bool) -> Tile:
    """The fastest tile on an H100 for what a launch does (docs/performance.md). residual: it reads one; wide: frames
    are of `WIDE_FROM` pixels at least."""
    channels_in = padded_width(layer.channels_in)
    k = next(k for k in (64, 32, 16) if channels_in % k == 0)
    n = sum(split_width(layer.channels))
    if not tma or layer.space_stride != 1:
        return Tile(128, min(k, 32), 8 if n >= 128 else 4, 3, tma=False)
    if n <= 32:
        return Tile(128, k, 4, 4)
    long = math.prod(layer.taps) == 27
    if n < 128:
        # Where the sums are short beside what is read and stored after them, small programs hide one behind another.
        return Tile(256, min(k, 32), 8, 4, registers=128) if long and not residual else Tile(128, min(k, 32), 4, 4)
    if long and k == 64 and padded_width(layer.channels) % 384 == 0:
        return Tile(128, k, 8, 3, n=(256, 128)) if wide else Tile(128, k, 8, 4, n=(128, 64))
    if long and k == 64 and n == 192 and not residual:
        return Tile(256, k, 8, 3)
    return Tile(128, k, 8, 4)


@dataclass(slots=True)
class Kernels:
    """Launches on the current device.

    tiles: by name of a layer, for measuring; what is not there is chosen. tma: False on GPUs before compute capability
    9.0, which have none. wide_from: as `WIDE_FROM`; another one lets a small frame try the kernels of a large one.
    """

    tma: bool
    wide_from: int = WIDE_FROM
    tiles: dict[str, Tile] = field(default_factory=dict)
    _weights: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    """Descriptors of packed weights, by address and tile. They hold on to the weights."""

    def conv(self, layer: Conv, source: FramePool, slots: list[int], target: Target) -> None:
        """See `stages.models.vae_conv.conv`."""
        pool = target.pool
        scale = 2 if layer.phases == 4 else 1
        self._launch(
            layer, source, slots, pool.frames, target.gamma, target.origin,
            (pack(target.residual), pack(target.raw), pack(target.normed)),
            (pool.height // scale, pool.width // scale, pool.width + 2, pool.rows),
            {
                "DENSE": False, "RESIDUAL": bool(target.residual), "RAW": bool(target.raw),
                "NORM": bool(target.normed),
            },
        )  # fmt: skip

    def conv_to_pixels(self, layer: Conv, source: FramePool, slots: list[int], pixels: Tensor) -> None:
        """See `stages.models.vae_conv.conv_to_pixels`."""
        none = pack([])
        self._launch(
            layer, source, slots, pixels, None, (0, 0), (none, none, none), (*pixels.shape[1:3], 0, 0),
            {"DENSE": True, "RESIDUAL": False, "RAW": True, "NORM": False},
        )  # fmt: skip

    def norm_silu(self, pool: FramePool, slots: list[int], gamma: Tensor, into: list[int]) -> None:
        """See `stages.models.vae_conv.norm_silu`."""
        tiles = -(-pool.rows // NORM_ROWS)
        norm_silu_kernel[(tiles * len(slots),)](
            pool.frames, gamma, pack(slots), pack(into), pool.rows, tiles, CHANNELS=pool.channels, BLOCK_M=NORM_ROWS,
            BLOCK_N=1 << (pool.channels - 1).bit_length(), EPS=NORM_EPS, num_warps=4,
        )  # fmt: skip

    def _launch(
        self, layer: Conv, source: FramePool, slots: list[int], out: Tensor, gamma: Tensor | None,
        origin: tuple[int, int], out_slots: tuple[int, int, int], sizes: tuple[int, ...], flags: dict[str, bool],
    ) -> None:  # fmt: skip
        # The rows of what TMA fetches are multiples of 16 bytes.
        tma = self.tma and source.channels * source.frames.element_size() % 16 == 0
        height, width = sizes[:2]
        tile = self.tiles.get(layer.name) or choose_tile(
            layer, tma, residual=flags["RESIDUAL"], wide=height * width >= self.wide_from
        )
        n0, n1 = tile.n or split_width(layer.channels)
        padded_in, padded = layer.weight.shape[2:]
        assert padded % (n0 + n1) == 0 and padded_in % tile.k == 0, (layer.name, tile)
        pixels = height * (source.width + 2 if layer.space_stride == 1 else width)
        tiles = -(-pixels // tile.m)
        frames = layer.frames_out(len(slots)) // layer.halves
        grid = (tiles * frames * layer.phases * layer.halves * padded // (n0 + n1),)
        conv_kernel[grid](
            _describe_frames(source, tile, origin), *self._describe_weights(layer, tile, (n0, n1)), layer.bias,
            layer.bias if gamma is None else gamma, out, pack(slots), *out_slots, source.width + 2, source.rows,
            height, width, sizes[2], sizes[3], tiles, frames, CHANNELS_IN=source.channels, CHANNELS=layer.channels,
            PADDED_IN=padded_in, PADDED=padded, KT=layer.taps[0], KH=layer.taps[1], KW=layer.taps[2],
            DOWN=layer.offset[0], RIGHT=layer.offset[1], TIME_STRIDE=layer.time_stride, SPACE_STRIDE=layer.space_stride,
            PHASES=layer.phases, HALVES=layer.halves, BLOCK_M=tile.m, N0=n0, N1=n1, BLOCK_K=tile.k, EPS=NORM_EPS,
            TMA=tile.tma, FRAMES_INSIDE=tile.frames_inside,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, **flags,
        )  # fmt: skip

    def _describe_weights(self, layer: Conv, tile: Tile, n: tuple[int, int]) -> tuple[Any, ...]:
        matrix = layer.weight.view(-1, layer.weight.shape[-1])
        if not tile.tma:
            return matrix, matrix
        for columns in n:
            key = matrix.data_ptr(), tile.k, columns
            if key not in self._weights:
                self._weights[key] = _describe(matrix, tile.k, columns)
        return tuple(self._weights[matrix.data_ptr(), tile.k, columns] for columns in n)


def _describe_frames(source: FramePool, tile: Tile, origin: tuple[int, int]) -> Any:
    """The pixels of all slots as rows, from `origin` on: every slot's rows are that much further on."""
    first = origin[0] * (source.width + 2) + origin[1]
    matrix = source.frames.view(-1, source.channels)[first:]
    if not tile.tma:
        return matrix
    if (tile.m, tile.k, first) not in source.views:
        source.views[tile.m, tile.k, first] = _describe(matrix, tile.m, tile.k)
    return source.views[tile.m, tile.k, first]


def _describe(matrix: Tensor, rows: int, columns: int) -> Any:
    """The TMA descriptor of tiles of a matrix; None of no columns."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if columns else None
