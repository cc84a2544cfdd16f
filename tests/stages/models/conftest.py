"""What the parity tests of the models share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """Names and shapes of the tensors of the published models."""
    loaded: dict[str, Any] = json.loads((Path(__file__).parents[1] / "wan_facts.json").read_text())
    return loaded


@pytest.fixture
def harden() -> Callable[[nn.Module], nn.Module]:
    """Random weights that hide nothing: norms around 1.5, biases and modulation well away from zero."""

    def apply(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name and not name.endswith("bias"):
                    parameter.copy_(1.5 + 0.2 * noise)
                elif name.endswith("scale_shift_table") or "relative_attention_bias" in name:
                    parameter.copy_(0.5 * noise)
                elif name.endswith("bias"):
                    parameter.copy_(0.2 * noise)
                else:
                    parameter.copy_(noise / parameter[0].numel() ** 0.5)
        return module.eval().requires_grad_(False)

    return apply


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """|actual - expected| / |expected|, and infinite where the shapes differ."""

    def compare(actual: Tensor, expected: Tensor) -> float:
        if actual.shape != expected.shape:
            return float("inf")
        return float((actual.double() - expected.double()).norm() / expected.double().norm())

    return compare
