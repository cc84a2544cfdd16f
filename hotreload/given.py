"""Weights that a program gives instead of a file: a safetensors file in a memfd that nobody can change any more.

Who trains a model gives new weights after every few steps: no disk, no pickle, one copy. Without torch.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hotreload.safetensors_file import ITEM_SIZES
from hotreload.shown import shown
from ipc.errors import BadCheckpoint, OutOfMemory

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SEALED = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
"""What must not happen any more to memory that is given."""
_ALIGNMENT = 8
"""Of the data, by spaces after the header, as safetensors' own writer does it."""
MOST_AT_ONCE = 1 << 30
"""Bytes per write: Linux takes less than 2 GiB."""


class GivenTensor(NamedTuple):
    """`dtype` is safetensors' name (F32, BF16, ...); `data` has the values in row-major order, contiguous."""

    dtype: str
    shape: Sequence[int]
    data: ReadableBuffer


def pack(tensors: Mapping[str, GivenTensor]) -> int:
    """A descriptor, the caller's, of a sealed memfd with these tensors in it.

    Raises `BadCheckpoint` naming a tensor whose bytes are not those of its dtype and shape; `OutOfMemory`.
    """
    views = {name: _bytes_of(name, tensor) for name, tensor in tensors.items()}
    header = _header(tensors, views)
    fd = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = len(header) + sum(map(len, views.values()))
        try:
            os.posix_fallocate(fd, 0, size)
            for data in (memoryview(header), *views.values()):
                _write(fd, data)
        except OSError as error:
            raise OutOfMemory(f"there is no room for {size:,} bytes of weights: {error.strerror}") from error
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALED | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_given(fd: int) -> None:
    """`BadCheckpoint` unless this is a memfd that nobody can write to or cut."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise BadCheckpoint("what came with the message is not a memfd; put the weights into one") from error
    if seals & SEALED != SEALED:
        raise BadCheckpoint(
            "the memory that came with the message can still be written to or cut; seal it with F_SEAL_WRITE and "
            "F_SEAL_SHRINK"
        )


def _bytes_of(name: str, tensor: GivenTensor) -> memoryview:
    expected = math.prod(tensor.shape) * ITEM_SIZES.get(tensor.dtype, 0)
    if tensor.dtype not in ITEM_SIZES:
        known = ", ".join(ITEM_SIZES)
        raise BadCheckpoint(f"{shown(name)} has the dtype {shown(tensor.dtype)}; expected one of {known}")
    view = memoryview(tensor.data)
    if not view.c_contiguous:
        raise BadCheckpoint(f"{shown(name)} is not contiguous; give a contiguous copy")
    # A view without elements cannot be cast.
    view = view.cast("B") if view.nbytes else memoryview(b"")
    if len(view) != expected:
        raise BadCheckpoint(
            f"{shown(name)} has {len(view)} bytes; {tensor.dtype} of shape {list(tensor.shape)} has {expected}"
        )
    return view


def _header(tensors: Mapping[str, GivenTensor], views: Mapping[str, memoryview]) -> bytes:
    """Length and JSON, padded."""
    described = {
        name: {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": offsets}
        for name, offsets in _offsets(views)
    }
    try:
        text = msgspec.json.encode(described)
    except UnicodeEncodeError as error:
        raise BadCheckpoint("a tensor's name has characters that are not valid Unicode") from error
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _offsets(views: Mapping[str, memoryview]) -> Iterator[tuple[str, tuple[int, int]]]:
    end = 0
    for name, view in views.items():
        begin, end = end, end + len(view)
        yield name, (begin, end)


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data[:MOST_AT_ONCE]) :]
