"""What `test_kernels.py` runs with TRITON_INTERPRET=1: prints "ok" for each check."""

from __future__ import annotations

import torch
from torch import Tensor

from stages import kernels
from stages.kernels import fused, plain
from stages.kernels.fused import Launch

ROUNDED = kernels.TOLERANCE[torch.bfloat16]
"""The interpreter cuts a float32 off to bfloat16 where a GPU rounds."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, expected: Tensor) -> float:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def check_every_width() -> None:
    """The engine's own check, at widths that are no power of two."""
    for heads, head_dim in ((2, 12), (3, 64), (12, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            assert kernels.check(torch.device("cpu"), dtype, heads, head_dim) == "", (heads, head_dim, dtype)
    print("ok")


def check_every_cut() -> None:
    """Rows that do not divide into programs: no row is left out, none written twice, none behind the end."""
    x, branch = normal(1, 13, 48), normal(1, 13, 48, seed=1)
    gate, scale, shift = (normal(1, 13, 48, seed=i) for i in (2, 3, 4))
    expected = plain.residual_modulate(x, branch, gate, scale, shift, 1e-6, torch.float32)
    for rows in (1, 2, 4, 16):
        room = torch.full((15, 48), 7.0)
        mine = room[1:14].view(1, 13, 48)
        mine.copy_(x)
        got = fused.residual_norm(mine, branch, gate, scale, shift, 1e-6, torch.float32, 1.0, Launch(rows, 4))
        assert all(distance(g, e) < 1e-6 for g, e in zip(got, expected, strict=True)), rows
        assert bool((room[[0, 14]] == 7.0).all()), rows
    print("ok")


def check_runs_of_modulation() -> None:
    """One row of modulation for all clips, one per clip, one per frame; no gate; nothing to add."""
    x, branch = normal(2, 12, 20), normal(2, 12, 20, seed=1)
    for shape in ((1, 1, 20), (2, 1, 20), (1, 3, 20), (2, 3, 20)):
        table = normal(*shape[:2], 6, 20, seed=2)
        shift, scale, gate = table.unbind(2)[:3]  # strided, as a block has them
        for with_branch, with_gate in ((True, True), (True, False), (False, False)):
            arguments = (branch if with_branch else None, gate if with_gate else None, scale, shift, 1e-6)
            expected = plain.residual_modulate(x, *arguments, torch.bfloat16)
            got = fused.residual_norm(x.clone(), *arguments, torch.bfloat16, 1.0)
            assert distance(got[0], expected[0]) < 1e-6 and distance(got[1], expected[1]) < ROUNDED, shape
    print("ok")


def check_views_of_a_product() -> None:
    """q and k of a fused product are changed where they are; v and what lies around them is not."""
    for batch in (1, 2):
        qkv, rope = normal(batch, 11, 3 * 36), normal(11, 6, 2, seed=1)
        before = qkv.clone()
        parts = qkv.chunk(3, dim=-1)
        for part, whole in zip(parts[:2], before.chunk(3, dim=-1)[:2], strict=True):
            weight = normal(36, seed=2).bfloat16()
            got = fused.norm_rope(part, weight, 1e-6, 3, rope)
            assert got.data_ptr() == part.data_ptr()
            assert distance(got, plain.norm_rope(whole, weight, 1e-6, 3, rope)) < 1e-6
        assert torch.equal(parts[2], before.chunk(3, dim=-1)[2])
    print("ok")


def check_a_row_with_a_large_mean() -> None:
    """LayerNorm of values around 1,000 that differ by 1: no sum of squares that cancels."""
    x, zero = normal(1, 4, 1536) + 1000, torch.zeros(1, 1, 1536)
    expected = torch.nn.functional.layer_norm(x.double(), (1536,), eps=1e-6).float()
    _, got = fused.residual_norm(x, None, None, zero, zero, 1e-6, torch.float32, 1.0)
    assert distance(got, expected) < 1e-4
    print("ok")


def check_a_wrong_argument() -> None:
    """Strides that a kernel would misread are an AssertionError, not another result."""
    x, rope = normal(2, 6, 24), normal(6, 4, 2)
    for call in (
        lambda: fused.norm_rope(x[:, :4], normal(24), 1e-6, 3, rope[:4]),
        lambda: fused.norm_rope(x.transpose(1, 2), normal(6), 1e-6, 3, None),
        lambda: fused.residual_norm(x.bfloat16(), None, None, x, x, 1e-6, torch.float32, 1.0),
        lambda: fused.residual_norm(x, None, None, x[:, :4], x[:, :4], 1e-6, torch.float32, 1.0),
    ):
        try:
            call()
        except AssertionError:
            continue
        raise SystemExit("a wrong argument was taken")
    print("ok")


if __name__ == "__main__":
    check_every_width()
    check_every_cut()
    check_runs_of_modulation()
    check_views_of_a_product()
    check_a_row_with_a_large_mean()
    check_a_wrong_argument()
