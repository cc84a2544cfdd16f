"""How task ids and tensors are described in the headers that live in shared memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"uint8": 1, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
)
"""Bytes per element of every dtype that crosses between processes, by its torch name."""

MAX_DIMS = 8
MAX_U64 = 2**64 - 1
_TASK_BYTES = 16


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a contiguous tensor; ValueError for a dtype or shape that a header cannot carry."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"got dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    if len(shape) > MAX_DIMS or any(size < 1 for size in shape):
        raise ValueError(f"got shape {shape}, expected at most {MAX_DIMS} dimensions, each at least 1")
    return math.prod(shape) * DTYPE_BYTES[dtype]


@functools.lru_cache(maxsize=256)
def pack_task(task: str) -> bytes:
    """The 16 bytes of a task id; ValueError unless it is 32 lower-case hex digits (`uuid4().hex`)."""
    try:
        raw = bytes.fromhex(task)
    except ValueError:
        raw = b""
    if len(raw) != _TASK_BYTES or raw.hex() != task:
        raise ValueError(f"got task id {task!r}, expected 32 lower-case hex digits")
    return raw


def pack_name(name: str, size: int) -> bytes:
    """`name` as ASCII, padded with zero bytes to `size`; ValueError if it does not fit."""
    raw = name.encode("ascii")
    if not 0 < len(raw) <= size:
        raise ValueError(f"got name {name!r}, expected 1 to {size} ASCII characters")
    return raw.ljust(size, b"\0")


def unpack_name(raw: memoryview) -> str:
    """What `pack_name` packed."""
    return bytes(raw).rstrip(b"\0").decode("ascii")
