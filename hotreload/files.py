"""Opens files that others may have put anything in place of: a FIFO, a device, a link to /dev/zero."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

_DESCRIPTORS = Path("/proc/self/fd")

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def open_regular(path: Path) -> int:
    """The fd of a regular file, for reading; `OSError` for all else, at once.

    O_NONBLOCK: a FIFO without a writer would block the open; it changes nothing about a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind != stat.S_IFREG:
            what = f"it is {_KINDS.get(kind, 'a special file')}; put a regular file there"
            raise OSError(errno.EINVAL, what, str(path))
    except OSError:
        os.close(fd)
        raise
    return fd


def regular_file(path: Path) -> BinaryIO:
    """The same as a file object, which closes the fd."""
    return os.fdopen(open_regular(path), "rb")


def small_file(path: Path, most: int) -> bytes:
    """A file of at most so many bytes. OSError; ValueError for one that is larger."""
    with regular_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def small_json(path: Path, most: int, type_: type[T]) -> T:
    """What a file of at most so many bytes says. OSError; ValueError for one that is larger, or says something else."""
    content = small_file(path, most)
    try:
        return msgspec.json.decode(content, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


class Stamp(NamedTuple):
    """What changes when a file is replaced or written to. Not the time of the last modification, which a program can
    set."""

    device: int
    inode: int
    size: int
    changed_ns: int
    """Nanoseconds since the epoch."""


def stamp(path: Path) -> Stamp:
    """OSError if there is none."""
    status = os.stat(path)
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)


def path_of_descriptor(fd: int) -> str:
    """A file that this process has open, as a path; `is_descriptor` tells it from others."""
    return str(_DESCRIPTORS / str(fd))


def is_descriptor(path: Path) -> bool:
    return path.parent == _DESCRIPTORS
