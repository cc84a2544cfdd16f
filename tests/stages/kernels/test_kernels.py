"""The Triton kernels against plain torch: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages import kernels

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = [(2, 12), (3, 64), (12, 128), (40, 128)]
"""Heads and head_dim: widths that are no power of two, the published ones among them."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_in_the_interpreter() -> None:
    """In a process of its own, because Triton reads TRITON_INTERPRET when a kernel is defined: every check below."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py"))], env=env, capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.split() == ["ok"] * 6


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, head_dim", WIDTHS)
def test_on_a_gpu(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """All kernels at this width are those of plain torch, within one rounding."""
    assert kernels.check(torch.device("cuda"), dtype, heads, head_dim) == ""


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is off by a hundredth, or fails: it is said which, or why, and plain torch is used."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernels, "norm_rope", _off(kernels.norm_rope))
    monkeypatch.setattr(kernels, "residual_modulate", _as_plain(kernels.residual_modulate))
    monkeypatch.setattr(kernels, "residual_layer_norm", _as_plain(kernels.residual_layer_norm))
    said = kernels.check(cpu, torch.float32, 3, 64)
    assert "RMSNorm and RoPE is 1.0e-02 from plain torch" in said and "LayerNorm" not in said
    monkeypatch.setattr(kernels, "norm_rope", _failing)
    assert kernels.check(cpu, torch.float32, 3, 64) == "RuntimeError: no compiler"


def test_the_choice() -> None:
    """Plain torch where there is no GPU or where it is asked for; what was chosen before is not tested again."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert kernels.choose("auto", cpu, torch.float32, 3, 64) == ("torch", "needs a GPU")
    assert kernels.choose("torch", gpu, torch.float32, 3, 64) == ("torch", "")
    assert kernels.choose("triton", gpu, torch.float32, 3, 64) == ("triton", "")


def _as_plain(function):  # type: ignore[no-untyped-def]
    return lambda kind, *arguments: function("torch", *arguments)


def _off(function):  # type: ignore[no-untyped-def]
    return lambda kind, *arguments: function("torch", *arguments) * (1.01 if kind == "triton" else 1)


def _failing(*arguments: object) -> torch.Tensor:
    raise RuntimeError("no compiler\nwas found")
