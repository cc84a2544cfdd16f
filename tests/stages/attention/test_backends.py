"""Every attention backend that this machine has, against float64."""

from __future__ import annotations

import pytest
import torch

from ipc.messages.names import AttentionBackend
from stages.attention import attention
from stages.attention.backends import IMPLEMENTATIONS, Case, Implementation
from stages.attention.choice import LSE_TOLERANCE, TOLERANCE

LENGTHS = [(1, 1), (1, 257), (333, 1), (129, 77), (515, 515)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS = [("cpu", 3, 128), ("cpu", 5, 64)] + [
    pytest.param("cuda", *heads, marks=pytest.mark.gpu) for heads in ((12, 128), (40, 128), (12, 64), (40, 64))
]
"""Device, heads and head_dim: those of the models on a GPU, whose kernels divide them up; a CPU does one after the
other."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, in float64, all at once."""
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) / q.shape[3] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device, heads, head_dim", HEADS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_against_float64(name: AttentionBackend, device: str, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Odd lengths, one token, one key: output and log-sum-exp are those of float64, of views of a fused tensor too."""
    case = Case(torch.device(device), dtype, head_dim)
    if missing := IMPLEMENTATIONS[name].missing(case):
        pytest.skip(f"{name}: {missing}")
    for queries, keys in LENGTHS:
        fused = normal(2, max(queries, keys), 3, heads, head_dim).to(device, dtype)
        q, k, v = fused.unbind(2)
        q, k, v = 2 * q[:, :queries] if queries % 2 else q[:, :queries], k[:, :keys], v[:, :keys]
        expected, expected_lse = exact(q, k, v)
        out, lse = attention(q, k, v, name, return_lse=True)
        assert (lse.dtype, lse.shape) == (torch.float32, expected_lse.shape)
        assert float((lse - expected_lse).abs().max()) <= LSE_TOLERANCE
        for got in (out, attention(q, k, v, name)):
            assert (got.dtype, got.shape) == (dtype, q.shape)
            assert float((got.double() - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_two_halves_of_the_keys_are_joined_by_their_log_sum_exp(name: AttentionBackend, device: str) -> None:
    """Attention to each half of the keys, weighted by exp(lse) and added, is attention to all of them."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if missing := IMPLEMENTATIONS[name].missing(Case(torch.device(device), dtype, 64)):
        pytest.skip(f"{name}: {missing}")
    q, k, v = (normal(1, 201, 3, 64, seed=i).to(device, dtype) for i in range(3))
    outs, sums = zip(
        *(attention(q, k[:, part], v[:, part], name, return_lse=True) for part in (slice(0, 90), slice(90, None))),
        strict=True,
    )
    weights = torch.stack(sums).softmax(0).transpose(2, 3).unsqueeze(-1)
    joined = (torch.stack(outs) * weights).sum(0)
    expected, _ = exact(q, k, v)
    assert float((joined.double() - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


def test_math_takes_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula in pieces is the formula."""
    q, k, v = (normal(2, 37, 3, 16, seed=i) for i in range(3))
    whole, whole_lse = attention(q, k, v, "math", return_lse=True)
    monkeypatch.setattr("stages.attention.backends.MATH_SCORES", 2 * 3 * 37 * 5)
    parts, parts_lse = attention(q, k, v, "math", return_lse=True)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_lse, whole_lse)


def test_the_formula_in_float64_stays_there() -> None:
    """The specification in float64 is float64 throughout, its log-sum-exp too."""
    q, k, v = (normal(1, 9, 2, 8, seed=i).double() for i in range(3))
    out, lse = attention(q, k, v, "math", return_lse=True)
    expected, expected_lse = exact(q, k, v)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_every_backend_says_what_it_is() -> None:
    """Each has a version, and a reason where it cannot be tried on a CPU; two can."""
    here = Case(torch.device("cpu"), torch.float32, 64)
    able = [name for name, entry in IMPLEMENTATIONS.items() if not entry.missing(here)]
    assert able == ["sdpa", "math"]
    assert all(isinstance(entry, Implementation) and entry.version() for entry in IMPLEMENTATIONS.values())
