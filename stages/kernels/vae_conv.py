"""Triton kernels for `stages/models/vae_conv.py`: convolutions of frame pools as implicit matrix products.

The pixels of a slot, border included, are the rows of a matrix [rows, C]. BLOCK_M consecutive output pixels need, at
each tap, as many consecutive rows at an offset: a plain 2-D tile, which the tensor memory accelerator fetches. No
im2col, no padded copies. The border's left and right pixels are computed too and not stored.

A tile holds all output channels up to 256, so that residual, RMS norm and SiLU work on the float32 sums before these
are rounded. Triton's tiles are powers of two: channels are two tiles, 96 = 64 + 32.

Sizes in pixels are never specialised on: a new resolution compiles nothing.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="import-untyped"
# Triton's kernels are no Python functions, and their arguments no Python values.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_at(packed, index):
    """Entry `index` of the list that `stages.models.vae_frames.pack` made."""
    return ((packed >> (7 * index).to(tl.int64)) & 127).to(tl.int32)


@triton.jit
def load_input(
    x, pixel_row, tap_row, valid, k, channels: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] of the source: with TMA the rows from `tap_row` on, else row `pixel_row` + `tap_row` each."""
    if TMA:
        tile = x.load([tap_row, k])
    else:
        column = k + tl.arange(0, BLOCK_K)
        rows = (pixel_row + tap_row).to(tl.int64)
        mask = valid[:, None] & (column < channels)[None, :]
        tile = tl.load(x + rows[:, None] * channels + column[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def load_weight(
    weight, row, column, padded: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr
):
    """[BLOCK_K, BLOCK_N] of the packed weights."""
    if TMA:
        tile = weight.load([row, column])
    else:
        rows = (row + tl.arange(0, BLOCK_K)).to(tl.int64)
        tile = tl.load(weight + rows[:, None] * padded + (column + tl.arange(0, BLOCK_N))[None, :])
    return tile


@triton.jit
def add_inputs(
    acc, bias, out, column, out_row, residual_base, valid, channels: tl.constexpr, BLOCK_N: tl.constexpr,
    RESIDUAL: tl.constexpr, RAW: tl.constexpr, raw_base,
):  # fmt: skip
    """Bias and residual are added; the sum is stored as `raw`."""
    columns = column + tl.arange(0, BLOCK_N)
    acc += tl.load(bias + columns)[None, :]
    mask = valid[:, None] & (columns < channels)[None, :]
    offset = out_row[:, None] * channels + columns[None, :]
    if RESIDUAL:
        acc += tl.load(out + residual_base * channels + offset, mask=mask, other=0.0).to(tl.float32)
    if RAW:
        tl.store(out + raw_base * channels + offset, acc.to(out.dtype.element_ty), mask=mask)
    return acc


@triton.jit
def store_normed(
    acc, scale, gamma, out, column, out_row, base, valid, channels: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """silu(acc * scale * gamma) is stored."""
    columns = column + tl.arange(0, BLOCK_N)
    y = acc * scale[:, None] * tl.load(gamma + columns)[None, :]
    y = y * tl.sigmoid(y)
    mask = valid[:, None] & (columns < channels)[None, :]
    offset = out_row[:, None] * channels + columns[None, :]
    tl.store(out + base * channels + offset, y.to(out.dtype.element_ty), mask=mask)


SIZES = [
    "in_slots", "residual_slots", "raw_slots", "normed_slots", "source_width", "source_rows", "height", "width",
    "out_width", "out_rows", "tiles", "frames",
]  # fmt: skip
"""Arguments of `conv_kernel` that are not specialised on."""


@triton.jit(do_not_specialize=SIZES)
def conv_kernel(
    x, w0, w1, bias, gamma, out,
    in_slots, residual_slots, raw_slots, normed_slots,
    source_width, source_rows, height, width, out_width, out_rows, tiles, frames,
    CHANNELS_IN: tl.constexpr, CHANNELS: tl.constexpr, PADDED_IN: tl.constexpr, PADDED: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr,
    TIME_STRIDE: tl.constexpr, SPACE_STRIDE: tl.constexpr, PHASES: tl.constexpr, HALVES: tl.constexpr,
    DENSE: tl.constexpr, BLOCK_M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, BLOCK_K: tl.constexpr,
    RESIDUAL: tl.constexpr, RAW: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, TMA: tl.constexpr,
    FRAMES_INSIDE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M pixels and N0 + N1 channels of one output frame.

    x: the source [slots * source_rows, CHANNELS_IN] in tiles of BLOCK_K channels; w0, w1: the weights in tiles of
    BLOCK_K rows and N0 or N1 columns; descriptors with TMA, else pointers. out: the target pool, or with DENSE frames
    [T, height, width, CHANNELS]. DOWN, RIGHT: `Conv.offset`.
    height, width: of the grid of pixels that share a kernel, which with PHASES 4 is half of the target's.
    FRAMES_INSIDE: programs that follow one another make the same pixels of all frames, which read the same input; else
    they go through one frame after the other.
    tiles: of BLOCK_M pixels per frame, counted over rows of source_width pixels, or of `width` where SPACE_STRIDE is 2.
    """
    n_tiles: tl.constexpr = HALVES * PADDED // (N0 + N1)
    chunks: tl.constexpr = PADDED_IN // BLOCK_K
    taps: tl.constexpr = KT * KH * KW
    pid = tl.program_id(0)
    n_tile = pid % n_tiles
    phase = pid // n_tiles % PHASES
    index = pid // (n_tiles * PHASES)
    if FRAMES_INSIDE:
        tile = index // frames
        frame = index % frames
    else:
        tile = index % tiles
        frame = index // tiles
    half = n_tile // (n_tiles // HALVES)
    column = n_tile % (n_tiles // HALVES) * (N0 + N1)
    down, right = DOWN, RIGHT
    if PHASES == 4:
        down, right = phase // 2, phase % 2

    first = tile * BLOCK_M
    pixel = first + tl.arange(0, BLOCK_M)
    if SPACE_STRIDE == 1:
        row = pixel // source_width
        at = pixel % source_width - 1
        valid = (row < height) & (at >= 0) & (at < width)
        pixel_row = pixel
        first_row = first - 1
    else:
        row = pixel // width
        at = pixel % width
        valid = row < height
        pixel_row = row * SPACE_STRIDE * source_width + at * SPACE_STRIDE + 1
        first_row = -1
    start = frame * TIME_STRIDE
    base0 = slot_at(in_slots, start) * source_rows
    base1 = base0
    base2 = base0
    if KT == 3:
        base1 = slot_at(in_slots, start + 1) * source_rows
        base2 = slot_at(in_slots, start + 2) * source_rows
    if not TMA:
        first_row = -1

    acc0 = tl.zeros((BLOCK_M, N0), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, N1 if N1 > 0 else 16), dtype=tl.float32)
    weight_row = (phase + half) * taps * PADDED_IN
    for step in range(taps * chunks):
        k = step % chunks * BLOCK_K
        tap = step // chunks
        kw = tap % KW
        kh = tap // KW % KH
        kt = tap // (KW * KH)
        base = tl.where(kt == 0, base0, tl.where(kt == 1, base1, base2))
        tap_row = base + first_row + (down + kh) * source_width + right + kw
        a = load_input(x, pixel_row, tap_row, valid, k, CHANNELS_IN, BLOCK_M, BLOCK_K, TMA)
        b0 = load_weight(w0, weight_row + tap * PADDED_IN + k, column, PADDED, BLOCK_K, N0, TMA)
        acc0 = tl.dot(a, b0, acc0, input_precision="ieee")
        if N1 > 0:
            b1 = load_weight(w1, weight_row + tap * PADDED_IN + k, column + N0, PADDED, BLOCK_K, N1, TMA)
            acc1 = tl.dot(a, b1, acc1, input_precision="ieee")

    if DENSE:
        out_row = row * width + at
        raw_base = frame.to(tl.int64) * height * width
        residual_base = raw_base
        normed_base = raw_base
    else:
        if PHASES == 4:
            out_row = (2 * row + down + 1) * out_width + 2 * at + right + 1
        else:
            out_row = (row + 1) * out_width + at + 1
        t = frame * HALVES + half
        residual_base = slot_at(residual_slots, t).to(tl.int64) * out_rows
        raw_base = slot_at(raw_slots, t).to(tl.int64) * out_rows
        normed_base = slot_at(normed_slots, t).to(tl.int64) * out_rows
    bias += half * PADDED
    acc0 = add_inputs(acc0, bias, out, column, out_row, residual_base, valid, CHANNELS, N0, RESIDUAL, RAW, raw_base)
    if N1 > 0:
        acc1 = add_inputs(
            acc1, bias, out, column + N0, out_row, residual_base, valid, CHANNELS, N1, RESIDUAL, RAW, raw_base
        )
    if NORM:
        squares = tl.sum(acc0 * acc0, axis=1)
        if N1 > 0:
            squares += tl.sum(acc1 * acc1, axis=1)
        scale = 1.0 / tl.sqrt(squares / CHANNELS + EPS)
        store_normed(acc0, scale, gamma, out, column, out_row, normed_base, valid, CHANNELS, N0)
        if N1 > 0:
            store_normed(acc1, scale, gamma, out, column + N0, out_row, normed_base, valid, CHANNELS, N1)


@triton.jit(do_not_specialize=["slots", "into_slots", "rows", "tiles"])
def norm_silu_kernel(
    x, gamma, slots, into_slots, rows, tiles, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one frame, border included: silu(rms_norm(x) * gamma), which keeps a border of zeros zero."""
    frame = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < CHANNELS)[None, :]
    offset = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    source = slot_at(slots, frame).to(tl.int64) * rows * CHANNELS
    target = slot_at(into_slots, frame).to(tl.int64) * rows * CHANNELS
    y = tl.load(x + source + offset, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / CHANNELS + EPS)
    y = y * scale[:, None] * tl.load(gamma + column, mask=column < CHANNELS, other=0.0)[None, :]
    tl.store(x + target + offset, (y * tl.sigmoid(y)).to(x.dtype.element_ty), mask=mask)
