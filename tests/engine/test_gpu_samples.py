"""Whose memory a GPU's is."""

from __future__ import annotations

import os

import pytest

from engine.gpu_samples import Gpu, others_of
from engine.monitor import Sampler

GIB = 2**30


@pytest.mark.parametrize(
    ("listed", "accounted", "others"),
    [
        ({10: 5, 11: 7, 99: 20}, None, 20),  # ours and another's
        ({10: 5, 11: 7}, None, 0),  # what is in no list outlives its process: ours
        ({10: None, 99: 20}, None, 20),  # of ours nothing need be known
        ({10: 5, 99: None}, None, None),  # of the others it must
        ({10: 5, 99: None}, 30, 70),
        ({98: 50, 99: 20}, None, None),  # numbers of another world, as in a container
        ({98: 50, 99: 20}, 60, 40),
        ({}, 120, 0),
        ({10: 5, 99: 300}, None, 100),  # lists that are older than the sum
    ],
)
def test_what_others_have(listed: dict[int, int | None], accounted: int | None, others: int | None) -> None:
    """Of 100 bytes in use, where 10, 11 and 12 are our processes."""
    assert others_of(100, listed, (10, 11, 12), accounted) == others


@pytest.mark.gpu
def test_samples_of_a_gpu() -> None:
    """A gibibyte more is ours, as the driver or our own account says, and not free any more; rates are there or not."""
    import torch

    torch.zeros(1, device="cuda")
    gpu = Gpu(0)
    try:
        before = gpu.sample([os.getpid()], 1 * GIB, 1.0)
        held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        after = gpu.sample([os.getpid()], 2 * GIB, 1.5)
        del held
    finally:
        gpu.close()
    assert before.total is not None and before.free is not None and after.free is not None
    assert before.ours is not None and after.ours is not None and after.others is not None
    assert 0.9 * GIB < before.free - after.free < 1.1 * GIB
    assert 0.9 * GIB < after.ours - before.ours < 1.1 * GIB
    assert abs(after.ours + after.others + after.free - before.total) < GIB // 4
    assert after.pcie_rx is None or after.pcie_rx >= 0
    assert Sampler(0, lambda: [os.getpid()]).sample().total == before.total
