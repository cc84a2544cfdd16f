"""Cutting the frames of a clip into tiles that are computed one after the other, each over all of the clip.

Beside its middle, whose attention sees all of a frame, a VAE is convolutions of 3x3 pixels, per-pixel norms and
resampling by two: a pixel depends on those at most a few rows and columns away. A tile is computed with that much
around it, the halo, and what is wrong in the halo, because convolutions see zeros beyond it, is cut off: no blending,
no seams. Where the halo meets an edge of the frame, the zeros are what the whole frame has there.

The tile is the outer loop and time the inner one, because what causal convolutions remember of the clip takes more than
all else (in bfloat16, of all tiles of 1280x720 together: 4.6 GiB). It is kept for one tile only. So a tiled clip is
known as a whole before its first frame is. But it is coded in parts, one for each tile and one for the lowest level,
between which all there is of it is in host memory.

Level l is the grid of latents times 2^l. All tiles of a clip have windows of the same size at each level, so that they
use the same memory: at the edges of the frame the halo is larger than it need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

TILE_BUDGET = 1 << 30
"""Bytes that a tile's activations may take: 1 GiB, with which 1280x720 in bfloat16 is 7 tiles and a quarter more work
than untiled."""
MAX_CUTS = 32
"""Tiles along an axis, at most."""


class Span(NamedTuple):
    """A run of pixels along one axis."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Window:
    """What is computed of a frame at each level, the latents' first."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    def size(self, level: int) -> tuple[int, int]:
        """Height and width."""
        return self.rows[level].size, self.columns[level].size

    def origin(self, level: int) -> tuple[int, int]:
        """Row and column, in the window of `level`, of the pixel that becomes the first of the next level's window when
        the size is doubled."""
        return _origin(self.rows, level), _origin(self.columns, level)

    def source(self, level: int) -> tuple[int, int]:
        """Row and column, in the window of `level`, of the pixel from which the first of the window below is made when
        the size is halved."""
        return _source(self.rows, level), _source(self.columns, level)

    def cut(self, x: Tensor, level: int) -> Tensor:
        """The window's part of x [..., height, width, C], which holds the frame at `level`."""
        rows, columns = self.rows[level], self.columns[level]
        return x[..., rows.start : rows.start + rows.size, columns.start : columns.start + columns.size, :]

    def cut_frames(self, frames: Tensor, patch: int) -> Tensor:
        """The window's part, at the highest level, of frames [..., H, W] of which `patch` x `patch` pixels are one
        there."""
        (top, height), (left, width) = self.rows[-1], self.columns[-1]
        return frames[..., top * patch : (top + height) * patch, left * patch : (left + width) * patch]

    def follow(self, x: Tensor, level: int) -> Tensor:
        """The part of x [..., height, width, C], this window at `level` with the size doubled, that is the window of
        the next level."""
        (row, column), (height, width) = self.origin(level), self.size(level + 1)
        return x[..., 2 * row : 2 * row + height, 2 * column : 2 * column + width, :]


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of what is made, decoded pixels at the highest level or encoded ones at the lowest, and the
    window that they need."""

    rows: Span
    columns: Span
    window: Window

    def crop(self, x: Tensor) -> Tensor:
        """The tile's part of x [..., height, width, C], which holds the window at the highest level."""
        row = self.rows.start - self.window.rows[-1].start
        column = self.columns.start - self.window.columns[-1].start
        return x[..., row : row + self.rows.size, column : column + self.columns.size, :]


class Piece(NamedTuple):
    """Some frames of a tile, as they are decoded."""

    frame: int
    """In the clip, as `row` and `column` in the frame: where the first pixel is."""
    row: int
    column: int
    pixels: Tensor
    """[1, 3, T, H, W] in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a network takes per pixel of a window, level by level, the latents' first."""

    reach: tuple[int, ...]
    """Convolutions of 3x3 pixels one after the other: how far wrong pixels spread. 0 at the lowest level, which sees
    whole frames."""
    nbytes: tuple[int, ...]
    """Of activations."""
    work: tuple[int, ...]
    """In any unit."""


Cut: TypeAlias = Callable[[int, int, Sequence[int]], Iterator[tuple[Span, tuple[Span, ...]]]]
"""How an axis is cut: `cut_pixels` or `cut_latents`."""


def whole(height: int, width: int, levels: int) -> Window:
    """All of a frame of height x width latents."""
    return Window(
        tuple(Span(0, height << level) for level in range(levels)),
        tuple(Span(0, width << level) for level in range(levels)),
    )


def plan(height: int, width: int, costs: Costs, budget: int, cut: Cut) -> list[Tile]:
    """The tiles of frames of height x width latents with the least work of those that take at most `budget` bytes; if
    none do, those that take the least. cut: `cut_pixels` or `cut_latents`."""
    levels = range(len(costs.reach))
    sizes = [[_sizes(next(cut(n, count, costs.reach))) for count in range(1, MAX_CUTS + 1)] for n in (height, width)]
    ranked = []
    for down, rows in enumerate(sizes[0], 1):
        for across, columns in enumerate(sizes[1], 1):
            nbytes = sum(costs.nbytes[level] * rows[level] * columns[level] for level in levels)
            work = sum(costs.work[level] * rows[level] * columns[level] for level in levels)
            ranked.append((max(nbytes, budget), down * across * work, down, across))
    return list(tiles(height, width, *min(ranked)[2:], costs.reach, cut))


def tiles(height: int, width: int, down: int, across: int, reach: Sequence[int], cut: Cut) -> Iterator[Tile]:
    """At most down x across tiles, which are equal but for the last of each axis, row by row."""
    columns = list(cut(width, across, reach))
    for rows, row_window in cut(height, down, reach):
        for cols, column_window in columns:
            yield Tile(rows, cols, Window(row_window, column_window))


def cut_pixels(length: int, count: int, reach: Sequence[int]) -> Iterator[tuple[Span, tuple[Span, ...]]]:
    """For decoding: at most `count` tiles of pixels, those of the highest level, along an axis of `length` latents, and
    their windows."""
    total = length << len(reach) - 1
    size = -(-total // count)
    for start in range(0, total, size):
        yield Span(start, min(size, total - start)), _spans_to_decode(start, size, length, reach)


def cut_latents(length: int, count: int, reach: Sequence[int]) -> Iterator[tuple[Span, tuple[Span, ...]]]:
    """For encoding: at most `count` tiles of the lowest level along an axis of `length` latents, and their windows. The
    last tile is as large as the others and takes some pixels again."""
    size = -(-length // count)
    for start in range(0, length, size):
        start = min(start, length - size)
        yield Span(start, size), _spans_to_encode(start, size, length, reach)


def _sizes(tile: tuple[Span, tuple[Span, ...]]) -> list[int]:
    return [span.size for span in tile[1]]


def _spans_to_decode(start: int, size: int, length: int, reach: Sequence[int]) -> tuple[Span, ...]:
    """What is computed at each level, along an axis of `length` latents, for `size` pixels from `start` on."""
    found: list[Span] = []
    for level in reversed(range(len(reach))):
        # Doubling makes pairs of pixels, and the convolution in it sees one more on each side.
        margin = reach[level] + (1 if found else 0)
        start, size = start - margin, size + 2 * margin
        if level:
            start, size = start & ~1, (size + 2) & ~1
        size = min(size, length << level)
        start = min(max(start, 0), (length << level) - size)
        found.append(Span(start, size))
        start, size = start // 2, size // 2
    return tuple(reversed(found))


def _spans_to_encode(start: int, size: int, length: int, reach: Sequence[int]) -> tuple[Span, ...]:
    """What is computed at each level, along an axis of `length` latents, for `size` latents from `start` on."""
    found = [Span(start, size)]
    for level in range(1, len(reach)):
        # The convolution that halves makes a pixel of two and the one after them.
        size = min(2 * size + 1 + 2 * reach[level], length << level)
        start = min(max(2 * start - reach[level], 0), (length << level) - size)
        found.append(Span(start, size))
    return tuple(found)


def _source(spans: tuple[Span, ...], level: int) -> int:
    return 2 * spans[level - 1].start - spans[level].start


def _origin(spans: tuple[Span, ...], level: int) -> int:
    return spans[level + 1].start // 2 - spans[level].start
