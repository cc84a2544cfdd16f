"""Checkpoints on disk: which files, which tensors, and every way in which they can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hotreload.checkpoint import check_directory, find_files, read_header, tensor_table
from ipc.errors import BadCheckpoint

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(2.0, dtype=torch.float16),
}


def write_header(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def make_directory(path: Path, experts: int = 1) -> Path:
    """A checkpoint of one expert or two, with three tensors in each component."""
    names = {"text_encoder": "model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    if experts == 2:
        names["transformer_2"] = "diffusion_pytorch_model"
    for component, stem in names.items():
        (path / component).mkdir(parents=True)
        save_file(TENSORS, path / component / f"{stem}.safetensors", metadata={"format": "pt"})
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    return path


def shard(directory: Path) -> None:
    """Replace the single file of a component by two shards and an index."""
    (directory / "diffusion_pytorch_model.safetensors").unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [{"a.weight": TENSORS["a.weight"]}, {k: TENSORS[k] for k in ("b.bias", "c")}]
    for name, part in zip(names, parts, strict=True):
        save_file(part, directory / name)
    index = {"metadata": {"total_size": 34}, "weight_map": {k: n for n, part in zip(names, parts) for k in part}}  # noqa: B905
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_a_whole_checkpoint_gives_its_tokenizer(tmp_path: Path) -> None:
    """Single files and shards, one expert and two."""
    directory = make_directory(tmp_path, experts=2)
    shard(directory / "transformer")
    assert check_directory(directory, two_experts=False) == tmp_path / "tokenizer" / "tokenizer.json"
    assert check_directory(directory, two_experts=True) == tmp_path / "tokenizer" / "tokenizer.json"


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/tokenizer.json",
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer_2/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    """Whatever file is missing, the error has its name relative to the checkpoint, and not where that is."""
    directory = make_directory(tmp_path, experts=2)
    (directory / file).unlink()
    with pytest.raises(BadCheckpoint, match=f"lacks {file}") as refused:
        check_directory(directory, two_experts=True)
    assert str(tmp_path) not in str(refused.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """The index names a shard that is not there."""
    directory = make_directory(tmp_path) / "transformer"
    shard(directory)
    (directory / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"lacks transformer/diffusion_pytorch_model-00002-of-00002\.safetensors"):
        find_files(directory, "transformer")


@pytest.mark.parametrize("index", ["not json", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../vae/x"}}'])
def test_a_broken_index_is_refused(tmp_path: Path, index: str) -> None:
    """Not JSON, no map, a number for a file, a file elsewhere: the error names the index."""
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(BadCheckpoint, match=r"vae/diffusion_pytorch_model\.safetensors\.index\.json"):
        find_files(tmp_path, "vae")


def test_the_table_says_where_each_tensor_is(tmp_path: Path) -> None:
    """Name, dtype, shape and bytes of every tensor, the same for one file and for shards."""
    directory = make_directory(tmp_path) / "transformer"
    single = tensor_table(directory, "transformer")
    content = single["a.weight"].file.read_bytes()[single["a.weight"].offset :][: single["a.weight"].size]
    assert content == TENSORS["a.weight"].numpy().tobytes()
    assert {name: (e.dtype, e.shape, e.size) for name, e in single.items()} == {
        "a.weight": ("F32", (2, 3), 24),
        "b.bias": ("BF16", (4,), 8),
        "c": ("F16", (), 2),
    }
    shard(directory)
    sharded = tensor_table(directory, "transformer")
    assert {n: e[:3] for n, e in sharded.items()} == {n: e[:3] for n, e in single.items()}


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """The same name in both shards."""
    directory = make_directory(tmp_path) / "transformer"
    shard(directory)
    first, second = sorted(directory.glob("*.safetensors"))
    shutil.copy(second, first)
    with pytest.raises(BadCheckpoint, match=r"'b\.bias' is in both"):
        tensor_table(directory, "transformer")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    """Truncated to any length, or with a byte too many: `BadCheckpoint` that names the file, never anything else."""
    save_file(TENSORS, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    assert len(read_header(tmp_path / "whole", "vae/x")) == 3
    for content in [whole[:length] for length in range(len(whole))] + [whole + b"\0"]:
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"^vae/x "):
            read_header(tmp_path / "cut", "vae/x")


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "overlaps"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, "gap"),
        ({"a": entry(0, 8, [3])}, "8 bytes, not those of F32"),
        ({"a": entry(0, 8, [-1, -2])}, "not those of F32"),
        ({"a": entry(8, 0, [2])}, "-8 bytes"),
        ({"a": entry(0, 8, [8], "F8_E4M3")}, "F8_E4M3, which is not supported"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "broken header"),
        ({"a": entry(0, 2**70, [2])}, "1180591620717411303424 bytes"),
        (b"\xff\xfe{}", "broken header"),
        (b"[" * 5000, "broken header"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: dict[str, Any] | bytes, problem: str) -> None:
    """Overlaps, gaps, sizes that do not fit the shape, unknown dtypes, missing fields, huge numbers, no JSON."""
    write_header(tmp_path / "x", header, bytes(16))
    with pytest.raises(BadCheckpoint, match=problem):
        read_header(tmp_path / "x", "vae/x")


def test_a_header_length_is_checked_before_it_is_read(tmp_path: Path) -> None:
    """A file that claims a header of 2^63 bytes."""
    write_header(tmp_path / "x", {}, length=2**63)
    with pytest.raises(BadCheckpoint, match="is not a safetensors file or is cut short"):
        read_header(tmp_path / "x", "vae/x")
