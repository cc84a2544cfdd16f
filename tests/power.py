"""Losses of power, for what SQLite writes: what was written and not synced is lost, in whole, in part, or not at all.

`Recorder` is a VFS of SQLite's own kind, made with ctypes in the library that Python's `sqlite3` uses: it does what the
default one does and notes each write, truncation, sync and deletion in order. `Disk` replays the notes up to a moment
and says what could be on a disk whose power went then. Of what is not synced, each sector of 512 bytes is there or not
by itself; a file whose directory was not synced is there or not. That a sync of a new WAL or rollback journal, and a
deletion that asks for it, sync the directory too is taken from SQLite's source (os_unix.c), not observed.
"""

from __future__ import annotations

import _sqlite3
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int, c_int64, c_void_p, cast
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

SECTOR = 512
OPEN_CREATE, OPEN_JOURNAL_OR_WAL = 0x4, 0x800 | 0x80000

Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, POINTER(c_int))
"""The path as a pointer: SQLite's own layer keeps it, and looks there again when the file is closed."""
Delete = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int)
Write = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
Truncate = CFUNCTYPE(c_int, c_void_p, c_int64)
Sync = CFUNCTYPE(c_int, c_void_p, c_int)


class Vfs(Structure):
    """`sqlite3_vfs`, version 3."""

    _fields_ = [
        ("version", c_int), ("file_size", c_int), ("longest_path", c_int), ("next", c_void_p), ("name", c_char_p),
        ("data", c_void_p), ("open", Open), ("delete", Delete), ("others", c_void_p * 14),
    ]  # fmt: skip


class Methods(Structure):
    """`sqlite3_io_methods`, version 3."""

    _fields_ = [
        ("version", c_int), ("close", c_void_p), ("read", c_void_p), ("write", Write), ("truncate", Truncate),
        ("sync", Sync), ("others", c_void_p * 13),
    ]  # fmt: skip


@dataclass(frozen=True)
class Note:
    """Something that was done to a file, or (`what` = said) that somebody was told something."""

    what: str
    name: str
    at: int = 0
    data: bytes = b""


class Recorder:
    """Notes what SQLite does while `recording`, in every file that is opened meanwhile."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self._library = ctypes.CDLL(_sqlite3.__file__)
        try:
            self._library.sqlite3_vfs_find.restype = POINTER(Vfs)
        except AttributeError:
            pytest.skip("this Python hides its SQLite")
        self._names: dict[int, str] = {}
        self._original: Any = self._library.sqlite3_vfs_find(None)
        self._methods: dict[int, tuple[Methods, Methods]] = {}
        """By the address of the original: that, and the copy that notes."""
        self._of_file: dict[int, Methods] = {}
        self._vfs = Vfs.from_buffer_copy(self._original.contents)
        self._vfs.name = b"power"
        self._vfs.open, self._vfs.delete = Open(self._open), Delete(self._delete)
        self._kept = (Write(self._write), Truncate(self._truncate), Sync(self._sync))

    def say(self, what: str, name: str) -> None:
        self.notes.append(Note(what, name))

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._library.sqlite3_vfs_register(byref(self._vfs), 1)
        try:
            yield
        finally:
            self._library.sqlite3_vfs_unregister(byref(self._vfs))

    def _open(self, _: int, address: int | None, file: int, flags: int, out: Any) -> int:
        path = None if address is None else Path(ctypes.string_at(address).decode())
        existed = path is not None and path.exists()
        result = int(self._original.contents.open(cast(self._original, c_void_p), address, file, flags, out))
        where = cast(file, POINTER(c_void_p))
        if result or path is None or not where[0]:
            return result
        self._names[file] = path.name
        if not existed:
            self.notes.append(Note("create", self._names[file]))
        if flags & OPEN_JOURNAL_OR_WAL and flags & OPEN_CREATE and not existed:
            self._names[file] += "\0"  # its first sync is one of the directory too
        original = where[0]
        if original not in self._methods:
            theirs = cast(original, POINTER(Methods)).contents
            ours = Methods.from_buffer_copy(theirs)
            ours.write, ours.truncate, ours.sync = self._kept
            self._methods[original] = (theirs, ours)
        self._of_file[file] = self._methods[original][0]
        where[0] = ctypes.addressof(self._methods[original][1])
        return result

    def _delete(self, _: int, path: bytes, sync: int) -> int:
        self.notes.append(Note("delete", Path(path.decode()).name, sync))
        return int(self._original.contents.delete(cast(self._original, c_void_p), path, sync))

    def _write(self, file: int, data: int, size: int, at: int) -> int:
        self.notes.append(Note("write", self._names[file].rstrip("\0"), at, ctypes.string_at(data, size)))
        return int(self._of_file[file].write(file, data, size, at))

    def _truncate(self, file: int, size: int) -> int:
        self.notes.append(Note("truncate", self._names[file].rstrip("\0"), size))
        return int(self._of_file[file].truncate(file, size))

    def _sync(self, file: int, flags: int) -> int:
        result = int(self._of_file[file].sync(file, flags))
        name = self._names[file].rstrip("\0")
        self.notes.append(Note("sync", name, int(self._names[file].endswith("\0"))))
        self._names[file] = name
        return result


@dataclass
class Stored:
    """One file: what is synced, and what was written since."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[Note] = field(default_factory=list)
    linked: bool = False
    """Its directory was synced since it was made."""
    deleted: bool = False
    """Not known to be off the disk."""


class Disk:
    """What the notes so far have made certain, and what they have not."""

    def __init__(self) -> None:
        self._files: dict[str, Stored] = {}

    def take(self, note: Note) -> None:
        match note.what:
            case "create":
                self._files[note.name] = Stored()
            case "write" | "truncate":
                self._files[note.name].pending.append(note)
            case "sync":
                stored = self._files[note.name]
                for pending in stored.pending:
                    apply(stored.synced, pending)
                stored.pending.clear()
                if note.at:
                    self._sync_directory()
            case "delete" if note.name in self._files:
                self._files[note.name].deleted = True
                if note.at:
                    self._sync_directory()

    def _sync_directory(self) -> None:
        self._files = {name: stored for name, stored in self._files.items() if not stored.deleted}
        for stored in self._files.values():
            stored.linked = True

    def after_power_loss(self, directory: Path, chance: Random, survival: float) -> None:
        """Write down what is there when power comes back, if each thing that is not certain survives with that
        probability."""
        directory.mkdir()
        for name, stored in self._files.items():
            if (not stored.linked or stored.deleted) and chance.random() >= survival:
                continue
            content = bytearray(stored.synced)
            for note in stored.pending:
                for piece in pieces(note):
                    if chance.random() < survival:
                        apply(content, piece)
            (directory / name).write_bytes(content)


def pieces(note: Note) -> Iterator[Note]:
    """The parts of a write that reach a disk or do not, each by itself."""
    if note.what == "truncate":
        yield note
    for start in range(0, len(note.data), SECTOR):
        yield Note("write", note.name, note.at + start, note.data[start : start + SECTOR])


def apply(content: bytearray, note: Note) -> None:
    if note.what == "truncate":
        del content[note.at :]
        content.extend(bytes(note.at - len(content)))
    else:
        content.extend(bytes(max(0, note.at - len(content))))
        content[note.at : note.at + len(note.data)] = note.data
