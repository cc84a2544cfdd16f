"""Weights bound to modules: exactly what is in the files, or nothing; in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor, nn

from hotreload import reading
from hotreload.checkpoint import open_checkpoint
from hotreload.content import CHUNK
from hotreload.reading import Files
from hotreload.safetensors_file import TensorEntry
from hotreload.shown import MOST
from hotreload.weights import load_weights
from ipc.errors import BadCheckpoint
from stages.models import text_encoder
from tests.hotreload.tiny import (
    Tensors,
    a_component,
    build,
    networks,
    originals,
    random_tensors,
    save,
    save_shards,
    write_comfyui,
    write_diffusers,
    write_original,
)

FILE = "diffusion_pytorch_model.safetensors"


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


def tensors(blocks: int = 2) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(v.shape, generator=generator) for k, v in Net(blocks).state_dict().items()}


def store(directory: Path, content: Mapping[str, Tensor]) -> Path:
    return save(directory / FILE, content)


def load(module: nn.Module, *files: Path, **options: Any) -> str:
    return load_weights(module, a_component("vae", *files), **{"dtype": lambda name: torch.float32, **options})


def test_the_module_holds_what_is_in_the_file(tmp_path: Path) -> None:
    """Parameters and buffers equal the file bit for bit, in evaluation mode, without gradients; progress grows to all
    bytes of all tensors."""
    module, content, heard = on_meta(), tensors(), []
    load(module, store(tmp_path, content), progress=lambda done, total: heard.append((done, total)))
    assert module.state_dict().keys() == content.keys()
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in content.items())
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    total = sum(tensor.nbytes for tensor in content.values())
    assert heard[-1] == (total, total)
    assert heard == sorted(heard)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_each_tensor_is_cast_to_the_dtype_asked_for(tmp_path: Path, stored: torch.dtype) -> None:
    """Any floating dtype in the file; the norm is kept in float32, the rest becomes bfloat16."""
    module = on_meta()
    content = {name: tensor.to(stored) for name, tensor in tensors().items()}
    load(module, store(tmp_path, content), dtype=lambda n: torch.float32 if n.startswith("norm") else torch.bfloat16)
    for name, tensor in module.state_dict().items():
        dtype = torch.float32 if name.startswith("norm") else torch.bfloat16
        assert tensor.dtype == dtype
        assert torch.equal(tensor, content[name].to(dtype))


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 4])
def test_tensors_of_many_chunks_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: torch.dtype, threads: int
) -> None:
    """A matrix of four chunks and a bit, an empty tensor and a scalar, with one thread and several: every element is
    in its place, and the hash is that of its definition."""
    monkeypatch.setattr(reading, "THREADS", threads)
    monkeypatch.setattr(reading, "BUFFERS", threads + 1)
    with torch.device("meta"):
        module = nn.ParameterDict({"big": torch.empty(4099, 2050), "empty": torch.empty(0, 3), "one": torch.empty(())})
    content = {"big": torch.randn(4099, 2050), "empty": torch.empty(0, 3), "one": torch.tensor(3.0)}
    content["big"] = torch.arange(content["big"].numel(), dtype=torch.float32).view(4099, 2050)
    assert content["big"].nbytes > 4 * CHUNK
    digest = load(module, store(tmp_path, content), dtype=lambda name: target)
    assert all(torch.equal(module[name], tensor.to(target)) for name, tensor in content.items())
    assert digest == hash_by_definition(content)


def hash_by_definition(content: Tensors) -> str:
    """The content hash of float32 tensors, written out."""
    digests = b""
    for name, tensor in sorted(content.items()):
        raw = tensor.numpy().tobytes()
        chunks = [xxhash.xxh3_128(raw[i : i + (8 << 20)]).digest() for i in range(0, len(raw), 8 << 20)]
        head = f"{name}\0F32\0{tuple(tensor.shape)}\0".encode()
        digests += xxhash.xxh3_128(head + b"".join(chunks)).digest()
    return xxhash.xxh3_128(digests).hexdigest()


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    """The same tensors in shards, in another order, with other metadata: the same hash. One bit, a name, a shape or the
    dtype of a tensor changed: another hash."""
    content = tensors()
    first = load(on_meta(), store(tmp_path / "a", content))
    shards = save_shards(tmp_path / "b", "x", dict(reversed(content.items())), count=len(content))
    assert load(on_meta(), *shards) == first
    assert load(on_meta(), *reversed(shards)) == first
    assert load(on_meta(), store(tmp_path / "a", content), dtype=lambda name: torch.float16) == first
    flipped = {**content, "norm.bias": content["norm.bias"].nextafter(torch.tensor(9.0))}
    swapped = {**content, "norm.bias": content["norm.weight"], "norm.weight": content["norm.bias"]}
    double = {name: tensor.double() for name, tensor in content.items()}
    hashes = {load(on_meta(), store(tmp_path / str(i), c)) for i, c in enumerate((flipped, swapped, double))}
    assert len({first} | hashes) == 4


@pytest.mark.parametrize("residual", [False, True])
def test_all_layouts_give_the_same_module_and_hash(tmp_path: Path, residual: bool) -> None:
    """Each network of an image-to-video model, from the three layouts: equal tensors, one hash per component."""
    names = ("text_encoder", "image_encoder", "transformer", "vae")
    content = networks(names, residual=residual, image_dim=16)
    hashes: dict[str, set[str]] = {name: set() for name in names}
    for directory in (
        write_diffusers(tmp_path / "diffusers", content),
        write_original(tmp_path / "original", content, residual=residual),
        write_comfyui(tmp_path / "comfyui", content, residual=residual, prefix="model.diffusion_model."),
    ):
        for name, component in open_checkpoint(directory, names).components.items():
            module = build(name, residual=residual, image_dim=16)
            hashes[name].add(
                load_weights(module, component, dtype=lambda n: torch.float32, aliases=text_encoder.ALIASES)
            )
            state = module.state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in content[name].items())
    assert all(len(found) == 1 for found in hashes.values())


def test_misfits_have_the_names_that_the_file_has(tmp_path: Path) -> None:
    """A transformer with original names: what is missing, of another shape, or no number is named as the Wan
    repositories do; of a VAE of the other family it is said which it is."""
    module, content = build("transformer"), random_tensors(build("transformer"))
    del content["blocks.0.ffn.net.0.proj.weight"]
    content["blocks.1.attn1.to_q.bias"] = torch.zeros(3)
    content["proj_out.bias"] = torch.zeros(16, dtype=torch.int32)
    file = save(tmp_path / "t.safetensors", originals("transformer", content))
    with pytest.raises(BadCheckpoint) as refused:
        load_weights(module, a_component("transformer", file, naming="original"), dtype=lambda n: torch.float32)
    assert str(refused.value) == (
        "transformer does not fit the model: 1 tensor is missing: blocks.0.ffn.0.weight; "
        "1 tensor is of another shape: blocks.1.self_attn.q.bias (got [3], expected [24]); "
        "1 tensor is not floating-point: head.head.bias (I32)"
    )
    for residual, says in ((False, "this is the Wan2.1 VAE, the model needs the Wan2.2 VAE"), (True, "the Wan2.1 VAE")):
        vae = originals("vae", random_tensors(build("vae", residual=residual)), residual=residual)
        component = a_component("vae", save(tmp_path / "v.safetensors", vae), naming="original")
        with pytest.raises(BadCheckpoint, match=f"vae does not fit the model: .*{says}$"):
            load_weights(build("vae", residual=not residual), component, dtype=lambda n: torch.float32)


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
        load(module, store(tmp_path, content))
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
        load(on_meta(17), store(tmp_path, tensors(2)))
    assert str(refused.value).count("blocks.") == MOST


def test_a_second_name_is_understood(tmp_path: Path) -> None:
    """A checkpoint that uses another name for a tensor, instead of the module's own or beside it, loads the same."""
    content = tensors()
    renamed = dict(content)
    renamed["other.bias"] = renamed.pop("norm.bias")
    aliases = {"other.bias": "norm.bias"}
    both = {**content, "other.bias": content["norm.bias"].clone()}
    hashes = {
        load(on_meta(), store(tmp_path / str(index), given), aliases=aliases)
        for index, given in enumerate((content, renamed, both))
    }
    assert len(hashes) == 1


def test_the_weights_go_where_they_are_to_live(tmp_path: Path) -> None:
    """`allocate` is asked once for each tensor, with its name, shape and dtype; the module is bound to what it gave."""
    module, content = on_meta(), tensors()
    memory: Tensors = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert name not in memory
        memory[name] = torch.full(shape, float("nan"), dtype=dtype)
        return memory[name]

    load(module, store(tmp_path, content), dtype=lambda name: torch.float16, allocate=allocate)
    assert memory.keys() == content.keys()
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == memory[name].data_ptr()
        assert torch.equal(memory[name], content[name].half())


@pytest.mark.parametrize("target", [torch.float32, torch.float16])
def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, target: torch.dtype) -> None:
    """A shard is cut when the first tensor has been read: `BadCheckpoint` that names it, where a mapping would have
    killed the process, and the module is still on meta."""
    blocks = 40
    first, last = save_shards(tmp_path, "x", tensors(blocks), count=2)
    module, cut = on_meta(blocks), []

    def progress(done: int, total: int) -> None:
        if not cut:
            cut.append(os.truncate(last, last.stat().st_size - 400))

    with pytest.raises(BadCheckpoint, match=rf"^vae: {last.name} was cut short while it was read"):
        load(module, first, last, progress=progress, dtype=lambda name: target)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Gone since the checkpoint was opened; or it cannot be opened again after its header was read."""
    first, last = save_shards(tmp_path, "x", tensors(), count=2)
    last.unlink()
    with pytest.raises(BadCheckpoint, match=rf"^vae: {last.name} cannot be read: No such file or directory$"):
        load(on_meta(), first, last)
    entry = TensorEntry("a", "F32", (1,), last, 0, 4)
    with Files("vae") as files, pytest.raises(BadCheckpoint, match=rf"^vae: {last.name} cannot be read: No such file"):
        files.read_tensor(entry, torch.float32)
    with Files("vae") as files, pytest.raises(BadCheckpoint, match=rf"^vae: {tmp_path.name} cannot be read: Is a dir"):
        files.read_tensor(entry._replace(file=tmp_path), torch.float32)


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    """After a load, and after one that failed, the process has the descriptors it had before."""
    file = store(tmp_path, tensors())
    load(on_meta(), file)
    before = os.listdir("/proc/self/fd")
    load(on_meta(), file)
    with pytest.raises(ZeroDivisionError):
        load(on_meta(), file, progress=lambda done, total: done // 0)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("target", "merged"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_memory_is_bounded_whatever_the_size(tmp_path: Path, target: str, merged: bool) -> None:
    """A tensor of 320 MiB in float32, in a process of its own: beyond the weights it needs less than 160 MiB, as it is,
    cast, and with a LoRA merged (where a second copy would be 320)."""
    script = (
        "import resource, sys, torch; from torch import nn; from hotreload.weights import load_weights\n"
        "from ipc.messages.weights import Component, Lora\n"
        "loras = [Lora(file=file, strength=1.0) for file in sys.argv[3:]]\n"
        "def load(file, rows):\n"
        "    module = nn.Module(); module.proj_out = nn.Linear(1024, rows, bias=False, device='meta')\n"
        "    component = Component(name='transformer', files=[file], loras=loras if rows > 1 else [])\n"
        f"    load_weights(module, component, dtype=lambda name: torch.{target})\n"
        "    return module.proj_out.weight.nbytes\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "load(sys.argv[1], 1)\n"
        "before = rss()\n"
        "extra = -load(sys.argv[2], 80 << 10) + rss() - before\n"
        "assert extra < 160 << 20, extra\n"
    )
    small = save(tmp_path / "small.safetensors", {"proj_out.weight": torch.zeros(1, 1024)})
    large = save(tmp_path / "large.safetensors", {"proj_out.weight": torch.zeros(80 << 10, 1024)})
    halves = {"proj_out.lora_A.weight": torch.ones(8, 1024), "proj_out.lora_B.weight": torch.ones(80 << 10, 8)}
    loras = [save(tmp_path / "lora.safetensors", halves)] if merged else []
    subprocess.run([sys.executable, "-c", script, *map(str, (small, large, *loras))], check=True, timeout=60)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_same_weights(tmp_path: Path, stored: torch.dtype, target: torch.dtype) -> None:
    """More chunks than buffers, on a CUDA device: what the CPU gets, and the same hash."""
    content = {"a": torch.randn(30, CHUNK // 16).to(stored), "b": torch.randn(3).to(stored)}
    modules: dict[str, nn.Module] = {}
    for device in ("cpu", "cuda"):
        with torch.device("meta"):
            modules[device] = nn.ParameterDict({name: torch.empty(t.shape) for name, t in content.items()})
    file = store(tmp_path, content)
    hashes = {load(module, file, device=device, dtype=lambda name: target) for device, module in modules.items()}
    assert len(hashes) == 1
    for name, tensor in modules["cuda"].state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), modules["cpu"].state_dict()[name])
