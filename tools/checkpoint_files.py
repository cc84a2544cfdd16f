"""Writes checkpoint files piece by piece: safetensors, one or in shards with an index, and torch's `.pth`.

A safetensors file is written as its values come: nothing of a component is held but a stretch of values per thread.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}
"""By the names of the command line."""
THREADS = min(8, len(os.sched_getaffinity(0)))
"""Writing to the page cache is bound by one core's copying and page faults."""
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


class FileTensor(NamedTuple):
    """A tensor as a file has it; `stretches` gives its values in row-major order, as flat tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stretches: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: list[FileTensor]) -> None:
    """One file with these tensors, in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size
        header[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = 8 + len(encoded)
    starts = itertools.accumulate((tensor.size for tensor in tensors), initial=start)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _ in pool.map(functools.partial(_write_tensor, file.fileno()), tensors, starts):
            pass  # raises what a thread raised


def _write_tensor(fd: int, tensor: FileTensor, offset: int) -> None:
    for stretch in tensor.stretches():
        data = stretch.contiguous().view(torch.uint8).numpy().data
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written


def write_sharded(directory: Path, stem: str, tensors: list[FileTensor], shard_bytes: int) -> list[Path]:
    """`STEM.safetensors`; if that would be over `shard_bytes`, shards of at most that many, and their index."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_safetensors(directory / f"{stem}.safetensors", tensors)
        return [directory / f"{stem}.safetensors"]
    files = []
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        files.append(directory / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors")
        write_safetensors(files[-1], shard)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), files[-1].name)
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": weight_map}
    write_json(directory / f"{stem}.safetensors.index.json", index)
    return files


def _shards(tensors: list[FileTensor], shard_bytes: int) -> Iterator[list[FileTensor]]:
    """In order, as many tensors in each as fit; one that does not fit anywhere has a shard of its own."""
    shard: list[FileTensor] = []
    for tensor in tensors:
        if shard and sum(t.size for t in shard) + tensor.size > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def write_pth(path: Path, root: str, tensors: list[FileTensor]) -> None:
    """A state dict as torch saves it, each tensor with a storage of its own; `root` is the folder inside the archive.

    Holds all tensors at once.
    """
    state = {t.name: torch.cat([s.flatten() for s in t.stretches()]).view(t.shape) for t in tensors}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_name(f"{root}.pth"))
    path.with_name(f"{root}.pth").rename(path)


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
