"""Weights that are used as one lie as one, wherever they are."""

from __future__ import annotations

import pytest
import torch

from hotreload.placement import joined
from stages.dit import DitStage
from stages.weights import own_memory
from tests.stages.rig import Rig, make_job
from tests.stages.test_dit import denoise

RUN = ("q", "k", "v")


def test_own_memory() -> None:
    """A run is one piece, asked for in any order; other tensors are pieces of their own; all are as they were asked."""
    shapes = dict.fromkeys(RUN, (torch.bfloat16, (3, 5))) | {"other": (torch.float32, (7,))}
    allocate = own_memory(shapes, [RUN], "cpu")
    made = {name: allocate(name, *reversed(shapes[name])) for name in ("v", "other", "q", "k")}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in made.items()} == shapes
    assert joined([made[name] for name in RUN]) is not None
    storages = {name: tensor.untyped_storage().data_ptr() for name, tensor in made.items()}
    assert storages["q"] == storages["k"] == storages["v"] != storages["other"]


@pytest.mark.parametrize("outliving", [True, False])
def test_a_dit_has_one_product_of_q_k_and_v(rig: Rig, outliving: bool) -> None:
    """In memory that outlives it or not, read or attached: every block, without a second copy, and the same bytes."""
    reader = rig.load("dit", outliving=outliving)
    assert isinstance(reader, DitStage)
    expected = denoise(rig, make_job(), reader)
    rig.reclaim("dit")
    other = rig.load("dit") if outliving else rig.load("dit", outliving=True)
    assert isinstance(other, DitStage)
    for stage in (reader, other):
        for block in stage._experts[0].module.blocks:
            weight, bias = block.attn1._fused
            assert weight.data_ptr() == block.attn1.to_q.weight.data_ptr()
            assert bias.data_ptr() == block.attn1.to_q.bias.data_ptr()
            whole = torch.cat([linear.weight for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)])
            assert torch.equal(weight, whole)
    assert torch.equal(denoise(rig, make_job(), other), expected)
