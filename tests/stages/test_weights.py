"""Weights that are used as one lie as one, wherever they are."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hotreload.placement import joined
from ipc.messages.weights import Component
from stages.dit import DitStage
from stages.models.blank import blank
from stages.models.transformer import WanTransformer
from stages.weights import own_memory, place
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


def test_a_version_that_is_forgotten_is_not_in_memory_any_more(rig: Rig) -> None:
    """Also the one that is bound; the last one stays."""
    stage = rig.load("dit")
    assert isinstance(stage, DitStage)
    network = stage._experts[0]
    first = network.content
    with blank():
        module = WanTransformer(rig.model.transformer)
    second, placement = place(
        module,
        changed(rig),
        device="cpu",
        dtype=lambda name: torch.float32,
        aliases={},
        progress=lambda done, total: None,
    )
    network.adopt(second, placement.fd)
    placement.close()
    del placement, module
    before = mappings()
    network.forget(first)
    gc.collect()
    deadline = time.monotonic() + 30
    while mappings() != before - 1:
        assert time.monotonic() < deadline, "it is unmapped, by a thread"
        time.sleep(0.005)
    assert network.content == second.content
    assert torch.equal(network.module.proj_out.bias, torch.ones_like(network.module.proj_out.bias))
    network.forget(second.content)
    assert torch.equal(network.module.proj_out.bias, torch.ones_like(network.module.proj_out.bias))


def mappings() -> int:
    """Pieces of shared memory that are mapped here."""
    return sum("memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines())


def changed(rig: Rig) -> Component:
    """The transformer with other values in one tensor."""
    (file,) = (rig.checkpoint / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.bias"] = torch.ones_like(tensors["proj_out.bias"])
    target = rig.checkpoint / "changed.safetensors"
    save_file(tensors, target)
    return Component(name="transformer", files=[str(target)])
