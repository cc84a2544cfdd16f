"""The measurement of LoRA switches, on the model that ships."""

from __future__ import annotations

import pytest
import torch

from engine.models import load_model
from tools.bench_lora import Size, measure


def test_it_measures_every_switch(capsys: pytest.CaptureFixture[str]) -> None:
    share = measure(load_model("wan-demo"), "cpu", torch.float32, Size(32, 32, 1), rank=4, rounds=1)
    out = capsys.readouterr().out
    assert share > 0
    for line in ("adapter of rank 4", "adapter of rank 2", "step: ", "none -> A", "A -> B", "B -> A", "A -> none"):
        assert line in out
