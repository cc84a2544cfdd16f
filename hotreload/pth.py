"""`.pth` files: where in the archive each tensor's bytes are, without reading them.

torch.load under a FakeTensorMode makes tensors without memory whose storages know their offset in the file (torch's
notes on serialization document it). The bytes are then read like those of a safetensors file; nothing is mapped, since
a file that is cut under a mapping kills the process.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

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
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_pth(path: Path, label: str) -> list[TensorEntry]:
    """The tensors of a state dict that torch.save wrote. `label` names the file in errors, all `BadCheckpoint`.

    The first call in a process takes seconds: FakeTensorMode imports torch's compiler.
    """
    check_archive(path, label)
    content = _load(path, label)
    try:
        records = _records(path)
    except (OSError, *ARCHIVE_ERRORS) as error:
        raise BadCheckpoint(f"{label} cannot be read: {error}") from error
    check_names(content.keys(), label)
    return [_entry(name, value, path, records, label) for name, value in content.items()]


def _records(path: Path) -> dict[int, int]:
    """Where the archive's members begin, and where each of them ends."""
    with regular_file(path) as file, zipfile.ZipFile(file) as archive:
        found = {}
        for member in archive.infolist():
            file.seek(member.header_offset + LOCAL_LENGTHS)
            start = member.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))
            found[start] = start + member.file_size
    return found


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
