"""Where the directory of a zip archive is, and how large, found out before anybody reads it.

Two programs read a `.pth` file: Python's zipfile and the reader in torch. Each takes the whole directory into memory,
as many bytes as the file says, and a sparse file of a few KiB can say terabytes. They also look for it by different
ways. So only an archive that ends as torch.save, and zipfile, end one is let through: directory, ZIP64 records or none,
end record without a comment, each right behind the other. (PKWARE's APPNOTE.TXT 4.3.14 to 4.3.16.)
"""

from __future__ import annotations

import os
import struct
import zipfile
from typing import BinaryIO

MAX_DIRECTORY = 4 << 20
"""Bytes; about 100 for each tensor. Wan's largest files have about 0.2 MB."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END_SIGNATURE, _LOCATOR_SIGNATURE, _END64_SIGNATURE = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


def check_directory(file: BinaryIO) -> None:
    """Raise `zipfile.BadZipFile` unless the archive ends as above with a directory of at most `MAX_DIRECTORY` bytes.
    Reads 98 bytes."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _END64.size - _LOCATOR.size - _END.size))
    tail = file.read()
    if len(tail) < _END.size or not tail[-_END.size :].startswith(_END_SIGNATURE):
        raise zipfile.BadZipFile("it does not end with the record that ends a zip archive")
    *_, size, offset, comment = _END.unpack(tail[-_END.size :])
    if comment:
        raise zipfile.BadZipFile(f"it ends with a comment of {comment} bytes")
    records = _END.size
    if tail[-_END.size - _LOCATOR.size :].startswith(_LOCATOR_SIGNATURE):
        records += _LOCATOR.size + _END64.size
        size, offset = _directory64(tail, length - records)
    if size > MAX_DIRECTORY:
        raise zipfile.BadZipFile(f"its directory has {size} bytes, expected at most {MAX_DIRECTORY}")
    if offset + size + records != length:
        raise zipfile.BadZipFile(f"its directory is not where it says: {size} bytes at {offset} of {length}")


def _directory64(tail: bytes, expected: int) -> tuple[int, int]:
    """Size and offset of the directory, from the ZIP64 record, which must be `expected` bytes into the file."""
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    _, _, where, _ = _LOCATOR.unpack(locator)
    if where != expected or not tail.startswith(_END64_SIGNATURE):
        raise zipfile.BadZipFile(f"its ZIP64 record is not where it says, at {where}")
    *_, size, offset = _END64.unpack(tail[: _END64.size])
    return int(size), int(offset)
