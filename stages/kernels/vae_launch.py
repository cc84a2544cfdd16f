"""Launching the kernels of `stages/kernels/vae_conv.py`: the same functions as in `stages/models/vae_conv.py`."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

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
    """How the work of a convolution is cut: pixels and input channels (as one or two powers of two) per step."""

    m: int
    k: tuple[int, int]
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


def choose_tile(layer: Conv, tma: bool) -> Tile:
    """The tile for a layer's widths."""
    channels_in = padded_width(layer.channels_in)
    n = sum(split_width(layer.channels))
    if not tma or layer.space_stride != 1:
        k = next(k for k in (32, 16) if channels_in % k == 0)
        return Tile(128, (k, 0), 8 if n >= 128 else 4, 3, tma=False)
    k = next(k for k in (64, 32, 16) if channels_in % k == 0)
    if n <= 32:
        return Tile(128, (k, 0), 4, 4)
    if n <= 128 and layer.channels > 128:
        return Tile(128, (k, 0), 8, 4)
    return Tile(256 if n < 128 else 128, (k, 0), 8, 4)


@dataclass(slots=True)
class Kernels:
    """Launches on the current device.

    tiles: by name of a layer, for measuring; what is not there is chosen. tma: False on GPUs before compute capability
    9.0, which have none.
    """

    tma: bool
    tiles: dict[str, Tile] = field(default_factory=dict)
    _weights: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    """Descriptors of packed weights, by address and tile. They hold on to the weights."""

    def conv(self, layer: Conv, source: FramePool, slots: list[int], target: Target) -> None:
        """See `stages.models.vae_conv.conv`."""
        pool = target.pool
        scale = 2 if layer.phases == 4 else 1
        self._launch(
            layer, source, slots, pool.frames, target.gamma,
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
            layer, source, slots, pixels, None, (none, none, none), (*pixels.shape[1:3], 0, 0),
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
        out_slots: tuple[int, int, int], sizes: tuple[int, ...], flags: dict[str, bool],
    ) -> None:  # fmt: skip
        # The rows of what TMA fetches are multiples of 16 bytes.
        tma = self.tma and source.channels * source.frames.element_size() % 16 == 0
        tile = self.tiles.get(layer.name) or choose_tile(layer, tma)
        n0, n1 = tile.n or split_width(layer.channels)
        padded_in, padded = layer.weight.shape[2:]
        assert padded % (n0 + n1) == 0 and padded_in % sum(tile.k) == 0, (layer.name, tile)
        height, width = sizes[:2]
        pixels = height * (source.width + 2 if layer.space_stride == 1 else width)
        tiles = -(-pixels // tile.m)
        frames = layer.frames_out(len(slots)) // layer.halves
        grid = (tiles * frames * layer.phases * layer.halves * padded // (n0 + n1),)
        conv_kernel[grid](
            *_describe_frames(source, tile), *self._describe_weights(layer, tile, (n0, n1)), layer.bias,
            layer.bias if gamma is None else gamma, out, pack(slots), *out_slots, source.width + 2, source.rows,
            height, width, sizes[2], sizes[3], tiles, frames, CHANNELS_IN=source.channels, CHANNELS=layer.channels,
            PADDED_IN=padded_in, PADDED=padded, KT=layer.taps[0], KH=layer.taps[1], KW=layer.taps[2],
            OFFSET=layer.offset, TIME_STRIDE=layer.time_stride, SPACE_STRIDE=layer.space_stride, PHASES=layer.phases,
            HALVES=layer.halves, BLOCK_M=tile.m, N0=n0, N1=n1, K0=tile.k[0], K1=tile.k[1], EPS=NORM_EPS, TMA=tile.tma,
            FRAMES_INSIDE=tile.frames_inside,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers, **flags,
        )  # fmt: skip

    def _describe_weights(self, layer: Conv, tile: Tile, n: tuple[int, int]) -> tuple[Any, ...]:
        matrix = layer.weight.view(-1, layer.weight.shape[-1])
        if not tile.tma:
            return matrix, matrix, None, None
        descriptors = []
        for rows in tile.k:
            for columns in n:
                key = matrix.data_ptr(), rows, columns
                if key not in self._weights:
                    self._weights[key] = _describe(matrix, rows, columns)
                descriptors.append(self._weights[key])
        return tuple(descriptors)


def _describe_frames(source: FramePool, tile: Tile) -> tuple[Any, Any]:
    matrix = source.frames.view(-1, source.channels)
    if not tile.tma:
        return matrix, None
    for k in tile.k:
        if (tile.m, k) not in source.views:
            source.views[tile.m, k] = _describe(matrix, tile.m, k)
    return source.views[tile.m, tile.k[0]], source.views[tile.m, tile.k[1]]


def _describe(matrix: Tensor, rows: int, columns: int) -> Any:
    """The TMA descriptor of tiles of a matrix; None of tiles that are not used."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if rows and columns else None
