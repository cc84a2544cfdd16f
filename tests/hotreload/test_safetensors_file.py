"""Headers of safetensors files: where the tensors are, and every way in which a header can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hotreload.safetensors_file import read_header
from ipc.errors import BadCheckpoint

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.bias": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor(2.0, dtype=torch.float16),
}


def write_header(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def test_the_header_says_where_each_tensor_is(tmp_path: Path) -> None:
    """Name, dtype, shape and bytes of every tensor, and the metadata."""
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    entries, metadata = read_header(tmp_path / "x", "vae/x")
    found = {e.name: (e.dtype, e.shape, (tmp_path / "x").read_bytes()[e.offset : e.offset + e.size]) for e in entries}
    assert found == {
        "a.weight": ("F32", (2, 3), TENSORS["a.weight"].numpy().tobytes()),
        "b.bias": ("BF16", (4,), b"\x80\x3f" * 4),
        "c": ("F16", (), b"\x00\x40"),
    }
    assert metadata == {"format": "pt"}


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    """Truncated to any length, or with a byte too many: `BadCheckpoint` that names the file, never anything else."""
    save_file(TENSORS, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    assert len(read_header(tmp_path / "whole", "vae/x").entries) == 3
    for content in [whole[:length] for length in range(len(whole))] + [whole + b"\0"]:
        (tmp_path / "cut").write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"^vae/x "):
            read_header(tmp_path / "cut", "vae/x")


def test_every_flipped_byte_of_a_header_is_survived(tmp_path: Path) -> None:
    """Each byte of length and header inverted in turn: `BadCheckpoint`, or a header that differs from the true one, in
    a name, say, which is then not the model's; never another exception, and never the old header."""
    save_file(TENSORS, tmp_path / "whole", metadata={"format": "pt"})
    whole, good = (tmp_path / "whole").read_bytes(), read_header(tmp_path / "whole", "x")
    refused = 0
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        (tmp_path / "whole").write_bytes(flipped)
        try:
            assert read_header(tmp_path / "whole", "x") != good
        except BadCheckpoint:
            refused += 1
    assert refused > 100


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "overlaps"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, "gap"),
        ({"a": entry(0, 8, [3])}, "8 bytes, not those of F32"),
        ({"a": entry(0, 8, [-1, -2])}, "broken header: Expected `int` >= 0"),
        ({"a": entry(8, 0, [2])}, "-8 bytes"),
        ({"a": entry(0, 8, [8], "F4_E2M1")}, "F4_E2M1, which is not supported"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "broken header"),
        ({"a": entry(0, 2**70, [2])}, "broken header: Expected `int`"),
        ({"a": entry(0, 8, [2**63])}, "broken header: Expected `int`"),
        ({"a": entry(0, 8, [2] + [1] * 8)}, "broken header: Expected `array` of length <= 8"),
        ({"a" * 301: entry(0, 8, [2])}, r"whose name has 301 characters, expected at most 300: 'a{97}\.\.\.'"),
        ({f"{i}": 0 for i in range(100_001)}, "has 100001 tensors, expected at most 100000"),
        (b"{" + b'"a":0,' * 1_000_000 + b'"a":0}', "expected at most 100000 tensors, got more"),
        ({"__metadata__": {"a": 1}}, "broken header"),
        (b"\xff\xfe{}", "broken header"),
        (b"[" * 5000, "broken header"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: dict[str, Any] | bytes, problem: str) -> None:
    """Overlaps, gaps, sizes that do not fit the shape, unknown dtypes, missing fields, huge numbers, too many
    dimensions, too many tensors, long names, no JSON."""
    write_header(tmp_path / "x", header, bytes(16))
    with pytest.raises(BadCheckpoint, match=problem):
        read_header(tmp_path / "x", "vae/x")


def test_a_header_length_is_checked_before_it_is_read(tmp_path: Path) -> None:
    """A file that claims a header of 2^63 bytes."""
    write_header(tmp_path / "x", {}, length=2**63)
    with pytest.raises(BadCheckpoint, match="is not a safetensors file or is cut short"):
        read_header(tmp_path / "x", "vae/x")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    """A directory in the place of the file: the reason and the name, not the path."""
    (tmp_path / "x").mkdir()
    with pytest.raises(BadCheckpoint, match=r"^vae/x cannot be read: Is a directory$"):
        read_header(tmp_path / "x", "vae/x")
