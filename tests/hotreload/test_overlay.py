"""Adapters in memory, and what a transformer becomes with them: to the bit what a merge at load makes of it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from hotreload.adapters import Adapter, Part, attach_adapter, place_adapter
from hotreload.content import CHUNK
from hotreload.overlay import Applied, make_overlay, touched
from hotreload.weights import load_weights
from ipc.errors import BadCheckpoint
from ipc.messages.weights import AdapterVersion, Lora
from tests.hotreload.test_lora import FORMATS, pairs
from tests.hotreload.tiny import Tensors, a_component, build, random_tensors, save

QKV = tuple(f"blocks.0.attn1.to_{x}.weight" for x in "qkv")


@pytest.fixture(scope="module")
def base() -> Tensors:
    return random_tensors(build("transformer"))


def place(file: Path, base: Tensors) -> tuple[AdapterVersion, Adapter]:
    """Through memory that the reader has closed, as in the engine."""
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    version, placement = place_adapter(file, "transformer", shapes, f"LoRA {file.name}")
    fd = os.dup(placement.fd)
    placement.close()
    try:
        return version, attach_adapter(version.version, fd)
    finally:
        os.close(fd)


def with_differences(base: Tensors) -> Tensors:
    """Pairs, and whole differences of a weight that has a pair too, a bias and a modulation."""
    generator = torch.Generator().manual_seed(9)
    return pairs(base, FORMATS["comfyui"], alpha=1.5) | {
        f"diffusion_model.blocks.0.{key}": torch.randn(base[f"blocks.0.{name}"].shape, generator=generator)
        for key, name in (
            ("self_attn.q.diff", "attn1.to_q.weight"),
            ("self_attn.k.diff_b", "attn1.to_k.bias"),
            ("diff_m", "scale_shift_table"),
        )
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_as_merged_at_load(tmp_path: Path, base: Tensors, dtype: torch.dtype) -> None:
    """Two adapters of different ranks, dtypes and kinds of keys, in both orders: every tensor has the bits that it has
    when the files are merged while a checkpoint of the engine's dtype is read."""
    file = save(tmp_path / "base.safetensors", {name: tensor.to(dtype) for name, tensor in base.items()})
    stored = {name: tensor.to(dtype) for name, tensor in base.items()}
    one = save(tmp_path / "one.safetensors", with_differences(base))
    other = save(tmp_path / "other.safetensors", {k: v.half() for k, v in pairs(base, FORMATS["kohya"]).items()})
    adapters = {path: place(path, base)[1] for path in (one, other)}
    for order in ([(one, 0.7)], [(one, 0.7), (other, -1.3)], [(other, -1.3), (one, 0.7)]):
        module = build("transformer")
        loras = [Lora(file=str(path), strength=strength) for path, strength in order]
        load_weights(module, a_component("transformer", file, loras=loras), dtype=lambda key: dtype)
        made = make_overlay(stored, [Applied(adapters[path], strength) for path, strength in order])
        for name, merged in module.state_dict().items():
            assert torch.equal(merged, made.get(name, stored[name])), name
            assert name not in made or not torch.equal(merged, stored[name])


def test_a_tensor_of_several_stretches() -> None:
    """A weight that is merged in more than one stretch, cut within a row, is that of the formula."""
    rows, columns, rank = 1500, 1999, 4
    assert rows * columns * 4 > CHUNK
    generator = torch.Generator().manual_seed(1)
    weight, up, down = (torch.randn(s, generator=generator) for s in ((rows, columns), (rows, rank), (rank, columns)))

    made = make_overlay({"w": weight}, [Applied({"w": [Part(0.5, up=up, down=down)]}, 3.0)])
    wanted = weight.double() + 1.5 * up.double() @ down.double()
    assert (made["w"].double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_runs_lie_together(base: Tensors) -> None:
    """Of tensors that are used as one, all are made, the untouched ones as they are, one right behind the other."""

    adapter = {QKV[1]: [Part(1.0, diff=torch.ones(base[QKV[1]].numel()))]}
    made = make_overlay(base, [Applied(adapter, 1.0)], [QKV, ("proj_out.weight", "proj_out.bias")])
    assert set(made) == set(QKV)
    storages = {made[name].untyped_storage().data_ptr() for name in QKV}
    assert len(storages) == 1
    assert [made[name].storage_offset() for name in QKV] == [i * base[QKV[0]].numel() for i in range(3)]
    assert torch.equal(made[QKV[0]], base[QKV[0]]) and torch.equal(made[QKV[1]], base[QKV[1]] + 1)
    assert touched(["b", "x"], [("a", "b")]) == [("a", "b"), ("x",)]


def test_the_content_is_what_is_added(tmp_path: Path, base: Tensors) -> None:
    """The same under other names of the keys; another for other values or another scale."""
    found = {}
    for name, tensors in {
        "comfyui": pairs(base, FORMATS["comfyui"]),
        "kohya": pairs(base, FORMATS["kohya"]),
        "scaled": pairs(base, FORMATS["comfyui"], alpha=1.0),
        "half": {k: v.half() for k, v in pairs(base, FORMATS["comfyui"]).items()},
    }.items():
        version, _ = place(save(tmp_path / f"{name}.safetensors", tensors), base)
        assert (version.rank, version.tensors) == (3, 8)
        found[name] = version.version.content
    assert found["comfyui"] == found["kohya"]
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, base: Tensors, value: float) -> None:
    tensors = pairs(base, FORMATS["comfyui"])
    name = "diffusion_model.blocks.1.ffn.2.lora_B.weight"
    tensors[name] = tensors[name].bfloat16()
    tensors[name][3, 1] = value
    with pytest.raises(BadCheckpoint, match=r"blocks\.1\.ffn\.2\.lora_B\.weight has values that are not finite"):
        place(save(tmp_path / "bad.safetensors", tensors), base)


def test_damaged_memory_is_not_used(tmp_path: Path, base: Tensors) -> None:
    """A fingerprint that is another, and memory that is no adapter, are refused."""

    file = save(tmp_path / "a.safetensors", pairs(base, FORMATS["comfyui"]))
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    version, placement = place_adapter(file, "transformer", shapes, "LoRA a")
    other = msgspec.structs.replace(version.version, fingerprint="0" * 32)
    with pytest.raises(ValueError, match="hash to"):
        attach_adapter(other, placement.fd)
    placement.close()
    fd = os.memfd_create("noise")
    os.write(fd, (8).to_bytes(8, "little") + b"\xff" * (version.version.bytes - 8))
    with pytest.raises(ValueError):
        attach_adapter(version.version, fd)
    os.close(fd)


def test_a_base_is_left_as_it_is(base: Tensors) -> None:

    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in base.items()}
    make_overlay(base, [Applied({QKV[0]: [Part(1.0, diff=torch.ones(base[QKV[0]].numel()))]}, 2.0)])
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
