"""safetensors files, headers only: which tensors a file has, and where in it their bytes are. Without torch.

Every error is a `BadCheckpoint` that starts with `label`, the file's name as the operator knows it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from hotreload.files import regular_file
from hotreload.shown import shown
from ipc.errors import BadCheckpoint

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""safetensors' names of the dtypes we know, and their bytes."""
FLOATING = ("F64", "F32", "F16", "BF16")
"""The dtypes that weights may have."""
MAX_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
MAX_TENSORS = 100_000
"""Wan's largest files have about 2,000."""
MAX_NAME = 300
"""Characters of a tensor's name; Wan's and LoRA files' have less than 150."""


class TensorEntry(NamedTuple):
    """Where one tensor is: `size` bytes at `offset` of `file`; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


class Header(NamedTuple):
    """What a file says about itself."""

    entries: list[TensorEntry]
    metadata: dict[str, str]


_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _HeaderEntry(msgspec.Struct):
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[list[_Number], msgspec.Meta(max_length=8)]
    data_offsets: tuple[_Number, _Number]


def read_header(path: Path, label: str) -> Header:
    """The tensors of one file, which must fill it exactly, in the order of their bytes."""
    try:
        with regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise BadCheckpoint(f"{label} is not a safetensors file: it has {size} bytes")
            if length > min(size - 8, MAX_HEADER):
                raise BadCheckpoint(
                    f"{label} is not a safetensors file or is cut short: it has {size} bytes, of which its header "
                    f"would be {length}"
                )
            content = file.read(length)
        # A colon for each tensor at least, so that no header becomes gigabytes of objects before they are counted.
        if content.count(b":") > 10 * MAX_TENSORS:
            raise BadCheckpoint(f"{label} has a broken header: expected at most {MAX_TENSORS} tensors, got more")
        raw = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        check_names(raw, label)
        parsed = {name: msgspec.json.decode(entry, type=_HeaderEntry) for name, entry in raw.items()}
    except OSError as error:
        raise BadCheckpoint(f"{label} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{label} has a broken header: {error}") from error
    return Header(_entries(parsed, path, label, start=8 + length, end=size), metadata)


def check_names(names: Collection[object], label: str) -> None:
    """Raise `BadCheckpoint` for more tensors than any model has, or names longer than any model's."""
    if len(names) > MAX_TENSORS:
        raise BadCheckpoint(f"{label} has {len(names)} tensors, expected at most {MAX_TENSORS}")
    for name in names:
        if isinstance(name, str) and len(name) > MAX_NAME:
            raise BadCheckpoint(
                f"{label} has a tensor whose name has {len(name)} characters, expected at most {MAX_NAME}: "
                f"'{shown(name)}'"
            )


def _entries(parsed: Mapping[str, _HeaderEntry], path: Path, label: str, start: int, end: int) -> list[TensorEntry]:
    """Check that the tensors lie one after another from `start` to `end`, each as long as its shape says."""
    entries = []
    position = start
    for name, entry in sorted(parsed.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        if entry.dtype not in ITEM_SIZES:
            raise BadCheckpoint(f"{label}: '{shown(name)}' has the dtype {shown(entry.dtype)}, which is not supported")
        if stop - begin != math.prod(entry.shape) * ITEM_SIZES[entry.dtype]:
            raise BadCheckpoint(
                f"{label}: '{shown(name)}' has {stop - begin} bytes, not those of {entry.dtype} {entry.shape}"
            )
        if start + begin != position:
            raise BadCheckpoint(f"{label}: '{shown(name)}' overlaps another tensor or leaves a gap before it")
        entries.append(TensorEntry(name, entry.dtype, tuple(entry.shape), path, position, stop - begin))
        position += stop - begin
    if position != end:
        raise BadCheckpoint(f"{label} has {end} bytes, but its header describes {position}: it is cut short or damaged")
    return entries
