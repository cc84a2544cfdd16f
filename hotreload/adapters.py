"""LoRA adapters in memory that outlives the process that read them: what requests ask for by name and strength.

The loader places the tensors of one file for one transformer in a memfd, in the file's dtypes, and the supervisor keeps
it. No file is read again, so an adapter stays what it was however often its file is replaced.

Memory layout: as `hotreload/placement.py`, with the tensors `TARGET:up` [out, rank], `TARGET:down` [rank, in] and
`TARGET:scale` [1] float64 of each pair, and `TARGET:diff`, flat, of each full difference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import torch
import xxhash
from torch import Tensor

from hotreload.dtypes import TORCH_DTYPES
from hotreload.lora import Delta, read_lora
from hotreload.merging import check_finite
from hotreload.placement import Placement, Shapes, Table
from hotreload.reading import Files
from hotreload.safetensors_file import TensorEntry
from ipc.errors import OutOfMemory
from ipc.messages.weights import AdapterVersion, WeightVersion
from ipc.tensors import dtype_of


class Part(NamedTuple):
    """What an adapter adds to one tensor, before its strength: scale * up @ down, or else `diff`."""

    scale: float
    up: Tensor | None = None
    """[out, rank], in the file's dtype."""
    down: Tensor | None = None
    """[rank, in], in the file's dtype."""
    diff: Tensor | None = None
    """Flat, in the file's dtype."""


Adapter: TypeAlias = Mapping[str, Sequence[Part]]
"""Tensor of the transformer -> what is added to it, in this order."""


def place_adapter(
    file: Path, component: str, shapes: Mapping[str, tuple[int, ...]], label: str
) -> tuple[AdapterVersion, Placement]:
    """Verify a LoRA file against a transformer whose tensors have these `shapes`, and place what it adds to it.

    `label`: what errors call the file. Raises `BadCheckpoint`, and `OutOfMemory` if there is no room.
    """
    deltas = read_lora(file, component, shapes, label)
    entries = dict(_entries(deltas))
    scales = {f"{delta.target}:scale": delta.scale for delta in deltas if delta.diff is None}
    wanted: Shapes = {name: (TORCH_DTYPES[entry.dtype], _shape(name, entry)) for name, entry in entries.items()}
    try:
        placement = Placement.create(f"lora-{component}", {**wanted, **dict.fromkeys(scales, (torch.float64, (1,)))})
    except OSError as error:
        size = sum(entry.size for entry in entries.values()) / 2**20
        raise OutOfMemory(f"there is no room in memory for the {size:.0f} MiB of {label}; free some") from error
    try:
        with Files(label) as files:
            for name, entry in entries.items():
                tensor = placement.tensors[name]
                files.read_into(entry.file, entry.offset, _bytes(tensor))
                check_finite(tensor.reshape(-1).float(), entry)
        for name, scale in scales.items():
            placement.tensors[name].fill_(scale)
        version = placement.seal(component, _content(placement.tensors))
    except BaseException:
        placement.close()
        raise
    rank = max((delta.down.shape[0] for delta in deltas if delta.down is not None), default=0)
    return AdapterVersion(version=version, rank=rank, tensors=len({delta.target for delta in deltas})), placement


def attach_adapter(version: WeightVersion, fd: int, *, pinned: bool = False) -> dict[str, list[Part]]:
    """Map what `place_adapter` placed; `pinned`, if a GPU is to add it. The descriptor stays the caller's. ValueError
    for memory that is not that."""
    placement = Placement.attach(version, fd, _shapes_in(version, fd), pinned=pinned)
    tensors = placement.tensors
    placement.close()
    parts: dict[str, list[Part]] = {}
    for target in sorted({name.rpartition(":")[0] for name in tensors}):
        parts[target] = []
        if (up := tensors.get(f"{target}:up")) is not None:
            scale = float(tensors[f"{target}:scale"])
            parts[target].append(Part(scale, up=up, down=tensors[f"{target}:down"]))
        if (diff := tensors.get(f"{target}:diff")) is not None:
            parts[target].append(Part(1.0, diff=diff))
    return parts


def _entries(deltas: Sequence[Delta]) -> list[tuple[str, TensorEntry]]:
    """Name in memory -> where it is in the file."""
    every = [(f"{d.target}:{role}", getattr(d, role)) for d in deltas for role in ("up", "down", "diff")]
    return [(name, entry) for name, entry in every if entry is not None]


def _shape(name: str, entry: TensorEntry) -> tuple[int, ...]:
    """Pairs of a convolution lose the axes of its kernel: [out, rank] and [rank, in]."""
    size = 1
    for length in entry.shape:
        size *= length
    match name.rpartition(":")[2]:
        case "up" | "down":
            return entry.shape[0], size // entry.shape[0]
        case _:
            return (size,)


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Hash of all that is added, in hex: the same whoever named the keys of the file."""
    total = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _shapes_in(version: WeightVersion, fd: int) -> Shapes:
    """What the table in the memory says; `Placement.attach` compares it with what it must then be."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    try:
        table = msgspec.msgpack.decode(os.pread(fd, min(length, version.bytes), 8), type=Table)
    except msgspec.DecodeError as error:
        raise ValueError(f"placed {version.component}: there is no table of an adapter in it: {error}") from error
    return {tensor.name: (dtype_of(tensor.dtype), tensor.shape) for tensor in table.tensors}
