"""`.pth` files: where in the archive each tensor's bytes are, without reading them.

torch.load under a FakeTensorMode makes tensors without memory whose storages know their offset in the file (torch's
notes on serialization document it). The bytes are then read like those of a safetensors file; nothing is mapped, since
a file that is cut under a mapping kills the process.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hotreload.dtypes import TORCH_DTYPES
from hotreload.files import regular_file
from hotreload.safetensors_file import TensorEntry, check_names
from hotreload.shown import shown
from hotreload.tables import ARCHIVE_ERRORS, check_archive
from ipc.errors import BadCheckpoint

LOCAL_HEADER = 30
"""Bytes of a zip member's own header, before its name and extra field."""
LOCAL_LENGTHS = 26
"""Where in it their lengths are."""
MAX_TUPLES = 20_000
"""A tensor takes four. Hashing a tuple takes about 100 bytes of stack for each level."""
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_pth(path: Path, label: str) -> list[TensorEntry]:
    """The tensors of a state dict that torch.save wrote. `label` names the file in errors, all `BadCheckpoint`.

    The first call in a process takes seconds: FakeTensorMode imports torch's compiler.
    """
    check_archive(path, label)
    try:
        records = _records(path)
        _check_nesting(path, label)
    except (OSError, *ARCHIVE_ERRORS) as error:
        raise BadCheckpoint(f"{label} cannot be read: {shown(error)}") from error
    content = _load(path, label)
    check_names(content.keys(), label)
    return [_entry(name, value, path, records, label) for name, value in content.items()]


def _records(path: Path) -> dict[int, int]:
    """Where the archive's members begin, and where each of them ends."""
    with regular_file(path) as file, zipfile.ZipFile(file) as archive:
        found = {}
        for member in archive.infolist():
            start = _start(file, member)
            found[start] = start + member.file_size
    return found


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin. (Its checksum is not looked at: torch can be told to write none.)"""
    file.seek(member.header_offset + LOCAL_LENGTHS)
    name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + LOCAL_HEADER + int(name) + int(extra)


def _check_nesting(path: Path, label: str) -> None:
    """Refuse a pickle that could nest tuples so deep that hashing them overflows the stack, which ends the process."""
    tuples = 0
    with regular_file(path) as file, zipfile.ZipFile(file) as archive:
        pickle = next(member for member in archive.infolist() if member.filename.endswith("/data.pkl"))
        file.seek(_start(file, pickle))
        for code, _, _ in pickletools.genops(file.read(pickle.file_size)):
            tuples += code.name.startswith("TUPLE")
            if tuples > MAX_TUPLES:
                raise BadCheckpoint(
                    f"{label} has more than {MAX_TUPLES} tuples in its pickle, as no model has: save only the tensors"
                )


def _load(path: Path, label: str) -> dict[object, object]:
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle or archive fails in any way; none of them is a fault of ours
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {shown(code[1])}, which is code" if code else f"it is damaged ({type(error).__name__})"
        raise BadCheckpoint(f"{label} cannot be read as plain tensors: {reason}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{label} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _entry(name: object, value: object, path: Path, records: Mapping[int, int], label: str) -> TensorEntry:
    if not isinstance(name, str):
        raise BadCheckpoint(f"{label} has a key that is a {type(name).__name__}; expected nothing but named tensors")
    if not isinstance(value, Tensor):
        raise BadCheckpoint(f"{label}: '{shown(name)}' is a {type(value).__name__}; expected nothing but named tensors")
    if value.layout != torch.strided or not value.is_contiguous():
        raise BadCheckpoint(f"{label}: '{shown(name)}' is not contiguous; save it again after .contiguous()")
    if value.dtype not in NAMES:
        raise BadCheckpoint(f"{label}: '{shown(name)}' has the dtype {value.dtype}, which is not supported")
    if value.is_neg():
        raise BadCheckpoint(
            f"{label}: '{shown(name)}' is stored as the negative of its bytes; save it again after .resolve_neg()"
        )
    start = value.untyped_storage()._checkpoint_offset
    if start is None:
        raise BadCheckpoint(
            f"{label}: torch does not say where the bytes of '{shown(name)}' are; convert it to safetensors"
        )
    offset = start + int(value.storage_offset()) * value.element_size()
    size = value.numel() * value.element_size()
    if offset + size > records.get(start, 0):
        raise BadCheckpoint(
            f"{label}: the bytes of '{shown(name)}' are not where torch.save puts them; save it again with torch"
        )
    return TensorEntry(name, NAMES[value.dtype], tuple(value.shape), path, offset, size)
