"""Checkpoints on disk: a directory in the Diffusers layout, its files, and the table of the tensors in them.

    DIR/tokenizer/tokenizer.json
    DIR/text_encoder/model.safetensors                        one file, or
    DIR/transformer/diffusion_pytorch_model.safetensors.index.json    an index and the shards it names
    DIR/transformer_2/...                                     with two experts
    DIR/vae/...

Only headers are read here, without torch, so the supervisor can check a directory before it starts a process. Every
error is a `BadCheckpoint` that names the file relative to the checkpoint directory.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from ipc.errors import BadCheckpoint

TOKENIZER = Path("tokenizer") / "tokenizer.json"
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""safetensors' names of the dtypes we know, and their bytes."""
MAX_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""


class TensorEntry(NamedTuple):
    """Where one tensor is: `size` bytes at `offset` of `file`; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def check_directory(directory: Path, *, two_experts: bool) -> Path:
    """Check that every component is there and whole; return the path of its tokenizer.json. Reads no weights."""
    tokenizer = directory / TOKENIZER
    if not tokenizer.is_file():
        wanted = ", ".join(("tokenizer", *components(two_experts)))
        raise BadCheckpoint(f"the checkpoint lacks {TOKENIZER}; it must be a Diffusers directory with {wanted}")
    for component in components(two_experts):
        tensor_table(directory / component, component)
    return tokenizer


def components(two_experts: bool) -> tuple[str, ...]:
    """The components with weights."""
    return ("text_encoder", "transformer", *(("transformer_2",) if two_experts else ()), "vae")


def find_files(directory: Path, component: str) -> list[Path]:
    """The safetensors files in a component's directory: the single one, or the shards that its index names."""
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise BadCheckpoint(f"the checkpoint lacks {component}/{single.name} (or {index.name} and its shards)")
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except (OSError, msgspec.DecodeError) as error:
        raise BadCheckpoint(f"{component}/{index.name} cannot be read: {error}") from error
    for name in names:
        if os.path.basename(name) != name:
            raise BadCheckpoint(f"{component}/{index.name} names the shard {name!r}; it must be a file beside it")
        if not (directory / name).is_file():
            raise BadCheckpoint(f"the checkpoint lacks {component}/{name}, which {index.name} names")
    return [directory / name for name in names]


def tensor_table(directory: Path, component: str) -> dict[str, TensorEntry]:
    """Every tensor in a component's directory by name, from the headers of its files."""
    table: dict[str, TensorEntry] = {}
    for file in find_files(directory, component):
        for entry in read_header(file, f"{component}/{file.name}"):
            if entry.name in table:
                other = table[entry.name].file.name
                raise BadCheckpoint(f"{component}: {entry.name!r} is in both {other} and {file.name}")
            table[entry.name] = entry
    return table


def read_header(path: Path, label: str) -> list[TensorEntry]:
    """The tensors of one safetensors file, which must fill it exactly. `label` names the file in errors."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise BadCheckpoint(f"{label} is not a safetensors file or is cut short: it has {size} bytes")
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
            raw.pop("__metadata__", None)
            parsed = {name: msgspec.json.decode(entry, type=_HeaderEntry) for name, entry in raw.items()}
    except OSError as error:
        raise BadCheckpoint(f"{label} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise BadCheckpoint(f"{label} has a broken header: {error}") from error
    return _entries(parsed, path, label, start=8 + length, end=size)


def _entries(parsed: Mapping[str, _HeaderEntry], path: Path, label: str, start: int, end: int) -> list[TensorEntry]:
    """Check that the tensors lie one after another from `start` to `end`, each as long as its shape says."""
    entries = []
    position = start
    for name, entry in sorted(parsed.items(), key=lambda item: item[1].data_offsets):
        begin, stop = entry.data_offsets
        if entry.dtype not in ITEM_SIZES:
            raise BadCheckpoint(f"{label}: {name!r} has the dtype {entry.dtype}, which is not supported")
        if min(entry.shape, default=0) < 0 or stop - begin != math.prod(entry.shape) * ITEM_SIZES[entry.dtype]:
            raise BadCheckpoint(f"{label}: {name!r} has {stop - begin} bytes, not those of {entry.dtype} {entry.shape}")
        if start + begin != position:
            raise BadCheckpoint(f"{label}: {name!r} overlaps another tensor or leaves a gap before it")
        entries.append(TensorEntry(name, entry.dtype, tuple(entry.shape), path, position, stop - begin))
        position += stop - begin
    if position != end:
        raise BadCheckpoint(f"{label} has {end} bytes, but its header describes {position}: it is cut short or damaged")
    return entries


def content_hash(digests: Iterable[tuple[TensorEntry, bytes]]) -> str:
    """Hash of a component from the SHA-256 of each tensor's bytes, in hex; the same however the tensors are sharded."""
    total = hashlib.sha256()
    for entry, digest in sorted(digests, key=lambda pair: pair[0].name):
        total.update(f"{entry.name}\0{entry.dtype}\0{entry.shape}\0".encode() + digest)
    return total.hexdigest()
