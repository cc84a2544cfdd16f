"""Weights bound to modules: exactly what is in the file, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hotreload.weights import NAMED, load_weights
from ipc.errors import BadCheckpoint


class Net(nn.Module):
    """Parameters and a buffer."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(blocks))
        self.norm = nn.LayerNorm(3)
        self.register_buffer("scale", torch.ones(3))


def on_meta(blocks: int = 2) -> Net:
    with torch.device("meta"):
        return Net(blocks)


def tensors(blocks: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(v.shape, generator=generator) for k, v in Net(blocks).state_dict().items()}


def save(directory: Path, content: Mapping[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(dict(content), directory / "diffusion_pytorch_model.safetensors")
    return directory


def load(module: nn.Module, directory: Path, **options: Any) -> str:
    return load_weights(module, directory, "vae", **{"dtype": lambda name: torch.float32, **options})


def test_the_module_holds_what_is_in_the_file(tmp_path: Path) -> None:
    """Parameters and buffers equal the file bit for bit, in evaluation mode, without gradients; progress is shown."""
    module, content, beats = on_meta(), tensors(), []
    load(module, save(tmp_path, content), beat=lambda: beats.append(1))
    assert module.state_dict().keys() == content.keys()
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in content.items())
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert len(beats) == len(content)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_each_tensor_is_cast_to_the_dtype_asked_for(tmp_path: Path, stored: torch.dtype) -> None:
    """Any floating dtype in the file; the norm is kept in float32, the rest becomes bfloat16."""
    module = on_meta()
    content = {name: tensor.to(stored) for name, tensor in tensors().items()}
    load(module, save(tmp_path, content), dtype=lambda n: torch.float32 if n.startswith("norm") else torch.bfloat16)
    for name, tensor in module.state_dict().items():
        dtype = torch.float32 if name.startswith("norm") else torch.bfloat16
        assert tensor.dtype == dtype
        assert torch.equal(tensor, content[name].to(dtype))


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    """The same tensors in shards, in another order, with other metadata: the same hash. One bit, a name, a shape or the
    dtype of a tensor changed: another hash."""
    content = tensors()
    first = load(on_meta(), save(tmp_path / "a", content))
    (tmp_path / "b").mkdir()
    weight_map = {}
    for index, name in enumerate(reversed(content)):
        save_file({name: content[name]}, tmp_path / "b" / f"{index}.safetensors", metadata={"by": "test"})
        weight_map[name] = f"{index}.safetensors"
    index_file = tmp_path / "b" / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    assert load(on_meta(), tmp_path / "b") == first
    flipped = {**content, "norm.bias": content["norm.bias"].nextafter(torch.tensor(9.0))}
    assert load(on_meta(), save(tmp_path / "c", flipped)) != first
    swapped = {**content, "norm.bias": content["norm.weight"], "norm.weight": content["norm.bias"]}
    assert load(on_meta(), save(tmp_path / "d", swapped)) != first
    assert load(on_meta(), save(tmp_path / "e", {n: t.double() for n, t in content.items()})) != first


def test_every_misfit_is_named(tmp_path: Path) -> None:
    """A missing, an extra, a misshaped and an integer tensor at once: all four are in the message, the component too,
    and the module is still on meta."""
    content = tensors()
    del content["blocks.0.bias"]
    content["blocks.9.bias"] = torch.zeros(3)
    content["norm.bias"] = torch.zeros(4)
    content["norm.weight"] = torch.zeros(3, dtype=torch.int32)
    module = on_meta()
    with pytest.raises(BadCheckpoint) as refused:
        load(module, save(tmp_path, content))
    assert str(refused.value) == (
        "vae does not fit the model: 1 tensor is missing: blocks.0.bias; "
        "1 tensor is not of this model: blocks.9.bias; "
        "1 tensor is of another shape: norm.bias (got [4], expected [3]); "
        "1 tensor is not floating-point: norm.weight (I32)"
    )
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_many_misfits_are_counted(tmp_path: Path) -> None:
    """Thirty missing tensors: the first ten by name, the others by number."""
    with pytest.raises(BadCheckpoint, match=r"30 tensors are missing: .* and 20 more$") as refused:
        load(on_meta(17), save(tmp_path, tensors(2)))
    assert str(refused.value).count("blocks.") == NAMED


def test_a_second_name_is_understood(tmp_path: Path) -> None:
    """A checkpoint that uses another name for a tensor, instead of the module's own or beside it, loads the same."""
    content = tensors()
    renamed = dict(content)
    renamed["other.bias"] = renamed.pop("norm.bias")
    aliases = {"other.bias": "norm.bias"}
    both = {**content, "other.bias": content["norm.bias"].clone()}
    hashes = {
        load(on_meta(), save(tmp_path / str(index), given), aliases=aliases)
        for index, given in enumerate((content, renamed, both))
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-400])])
def test_a_file_that_is_lost_while_it_is_read_is_refused(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    """The file is removed, or cut, when the first tensor has been read: `BadCheckpoint`, and the module is still on
    meta."""
    file = save(tmp_path, tensors(40)) / "diffusion_pytorch_model.safetensors"
    module, spoilt = on_meta(40), []

    def beat() -> None:
        if not spoilt:
            spoilt.append(spoil(file))

    with pytest.raises(BadCheckpoint, match=r"vae/diffusion_pytorch_model\.safetensors"):
        load(module, tmp_path, beat=beat)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
