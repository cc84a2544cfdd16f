"""Files by directory descriptors. A path was checked when its request was accepted; here nothing on it is followed that
has become a symbolic link since, and a directory, once open, stays the same one whatever happens to its name."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from types import TracebackType
from typing import IO, BinaryIO

NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What a file system says that has no (more) hard links."""
NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


def open_directory(path: str) -> int:
    """A descriptor of the directory at an absolute path; OSError (ENOTDIR) if a part of it is a symbolic link."""
    *above, last = [name for name in os.path.abspath(path).split("/") if name] or ["."]
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in above:
        fd = _step(fd, name, os.O_PATH)  # needs no right to read
    return _step(fd, last, os.O_RDONLY)  # O_PATH descriptors cannot be synced


def _step(directory: int, name: str, flags: int) -> int:
    try:
        return os.open(name, flags | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """As `opener` of `open`: the regular file at an absolute path without symbolic links; OSError for anything else."""
    directory = open_directory(os.path.dirname(path))
    try:
        return _open_regular(directory, os.path.basename(path), flags)
    finally:
        os.close(directory)


def _open_regular(directory: int, name: str, flags: int) -> int:
    # O_NONBLOCK: a FIFO in the file's place would be waited for.
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "Not a regular file")
    return fd


class Directory:
    """An open directory, in which files are made and get their names.

    Resource handling: one descriptor until `close`. Error handling: OSError, as the file system says it.
    """

    def __init__(self, path: str) -> None:
        self._fd = open_directory(path)

    def unnamed(self) -> IO[bytes]:
        """A new file without a name: it is gone when it is closed, or with this process."""
        fd = -1
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except OSError as error:
            if error.errno not in NO_UNNAMED_FILES:
                raise
        if fd < 0:
            name = f".{os.urandom(8).hex()}.spool"
            fd = self.create(name)
            self.remove(name)
        return os.fdopen(fd, "w+b")

    def create(self, name: str) -> int:
        """A descriptor of a new file; nobody's file or link of that name is opened."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o666, dir_fd=self._fd)

    def open(self, name: str) -> BinaryIO:
        """A regular file, for reading; OSError for anything else."""
        return os.fdopen(_open_regular(self._fd, name, os.O_RDONLY), "rb")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def place(self, files: Mapping[str, str]) -> None:
        """Give synced files (temporary name -> final name) their names, all or none of them.

        What had the final names before keeps a temporary one, `<temporary>.old`, until the new names are on the disk,
        and has its own again after an error; where the file system has no hard links, it is replaced at once.
        """
        placed: list[tuple[str, str | None]] = []
        try:
            for temporary, final in files.items():
                old = self._keep(final, f"{temporary}.old")
                os.replace(temporary, final, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                placed.append((final, old))
            self.sync()
        except BaseException:
            for final, old in placed:
                with contextlib.suppress(OSError):
                    self._restore(final, old)
            raise
        for _, old in placed:
            if old is not None:
                with contextlib.suppress(OSError):  # the files are in place: what is left over makes no error of it
                    self.remove(old)

    def sync(self) -> None:
        """The names of the files in it are on the disk."""
        os.fsync(self._fd)

    def _keep(self, final: str, old: str) -> str | None:
        """A second name for what is there; None if nothing is, or a second name cannot be had."""
        self.remove(old)
        try:
            os.link(final, old, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return None
        return old

    def _restore(self, final: str, old: str | None) -> None:
        if old is None:
            os.unlink(final, dir_fd=self._fd)
        else:
            os.replace(old, final, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
