"""The kernels in Triton, each one pass over its data. `stages/kernels/plain.py` says what they compute.

Both are limited by memory. A program takes `rows` whole rows, so that LayerNorm and RMSNorm need no second pass. Rows
and warps are fixed by the width alone: they decide the order of the sums, and with it the bits. Lengths are no
constants of a kernel: a new size compiles nothing.

Triton is imported with this module, and nowhere else. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How a kernel is cut up."""

    rows: int
    warps: int


def launch(dim: int) -> Launch:
    """By the width of a row: what was fastest in sum over both kernels, on an H100 at 2.7 to 3.0 TB/s of 3.35. More
    rows to a program were slower at both widths, up to 16 times where they no longer fit into registers."""
    return Launch(rows=1, warps=2 if dim <= 2048 else 4)


@triton.jit(do_not_specialize=["rows", "tokens", "run"])
def _residual_norm(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, out_ptr,
    rows, tokens, run,
    branch_stride, gate_batch, gate_run, scale_batch, scale_run, shift_batch, shift_run,
    eps, centre,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows. `run`: tokens per row of modulation. Strides in elements; x and out are contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    batch = row // tokens
    group = (row - batch * tokens) // run
    wide = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * DIM + column[None, :], mask=inside, other=0.0)
    if ADD:
        branch = tl.load(branch_ptr + wide * branch_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            at = (batch * gate_batch + group * gate_run)[:, None] + column[None, :]
            branch *= tl.load(gate_ptr + at, mask=inside, other=0.0)
        x += branch
        tl.store(x_ptr + wide * DIM + column[None, :], x, mask=inside)
    mean = tl.sum(x, axis=1) / DIM
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / DIM
    normed = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
    at = (batch * scale_batch + group * scale_run)[:, None] + column[None, :]
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0)
    at = (batch * shift_batch + group * shift_run)[:, None] + column[None, :]
    shift = tl.load(shift_ptr + at, mask=inside, other=0.0)
    out = normed * (centre + scale) + shift
    tl.store(out_ptr + wide * DIM + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens"])
def _norm_rope(
    x_ptr, weight_ptr, rope_ptr, rows, tokens, stride, eps,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows, in place."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    pointers = x_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / DIM + eps)
    weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    y = x * scale[:, None] * weight[None, :]
    if ROPE:
        # (cos, sin) lie beside each other as the pairs do, so both are loaded whole and then split.
        at = (row % tokens)[:, None] * HEAD_DIM + (column % HEAD_DIM)[None, :]
        table = tl.load(rope_ptr + at, mask=inside, other=0.0)
        cos, sin = tl.split(tl.reshape(table, (ROWS, BLOCK // 2, 2)))
        even, odd = tl.split(tl.reshape(y, (ROWS, BLOCK // 2, 2)))
        y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK))
    tl.store(pointers, y.to(x_ptr.dtype.element_ty), mask=inside)


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    centre: float,
    cut: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm * (centre + scale) + shift of x + branch * gate, as in `stages.kernels`; the sum is in x."""
    assert x.dtype == torch.float32 and x.is_contiguous(), f"{x.dtype}, strides {x.stride()}"
    batch, tokens, dim = x.shape
    cut = launch(dim) if cut is None else cut
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    group = max(table.shape[1] for table in (scale, shift, gate if gate is not None else scale))
    assert tokens % group == 0, f"{tokens} tokens are not {group} equal runs"
    grid = (triton.cdiv(batch * tokens, cut.rows),)
    _residual_norm[grid](
        x, x if branch is None else branch, scale if gate is None else gate, scale, shift, out,
        batch * tokens, tokens, tokens // group,
        0 if branch is None else _row_stride(branch), *_strides(scale if gate is None else gate), *_strides(scale),
        *_strides(shift), eps, centre,
        DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=cut.rows, ADD=branch is not None, GATED=gate is not None,
        num_warps=cut.warps,
    )  # fmt: skip
    return x, out


def norm_rope(
    x: Tensor, weight: Tensor, eps: float, heads: int, rope: Tensor | None, cut: Launch | None = None
) -> Tensor:
    """`stages.kernels.norm_rope`, in place: a view of x."""
    batch, tokens, dim = x.shape
    cut = launch(dim) if cut is None else cut
    assert rope is None or rope.is_contiguous(), f"strides {rope.stride()}"
    _norm_rope[(triton.cdiv(batch * tokens, cut.rows),)](
        x, weight, weight if rope is None else rope, batch * tokens, tokens, _row_stride(x), eps,
        DIM=dim, HEAD_DIM=dim // heads, BLOCK=triton.next_power_of_2(dim), ROWS=cut.rows, ROPE=rope is not None,
        num_warps=cut.warps,
    )  # fmt: skip
    return x.unflatten(-1, (heads, -1))


def _row_stride(x: Tensor) -> int:
    """Elements from a row of [B, L, dim] to the next, across B too."""
    assert x.stride(2) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)), f"strides {x.stride()}"
    return x.stride(1)


def _strides(rows: Tensor) -> tuple[int, int]:
    """Elements from one B, and one S, of [B, S, dim] to the next; 0 where there is only one for all."""
    assert rows.dtype == torch.float32 and rows.stride(2) == 1, f"{rows.dtype}, strides {rows.stride()}"
    return (rows.stride(0) if len(rows) > 1 else 0), (rows.stride(1) if rows.shape[1] > 1 else 0)
