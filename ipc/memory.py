"""Memory that several processes map: a memfd, sealed at its size.

A memfd has no name in any file system and dies with its last holder, so a process that is killed leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import threading
from types import TracebackType
from typing import Self

PAGE_BYTES = mmap.PAGESIZE
KEEPS_ORDER = platform.machine() == "x86_64"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


def fence() -> None:
    """Keep every load and store before this call before every load and store after it, as other processors see them.

    x86-64 keeps the order of stores and of loads by itself; AArch64 does not. A release followed by an acquire is a
    barrier for both there, and taking a private lock twice performs one for about 0.3 us.
    """
    if KEEPS_ORDER:
        return
    lock = threading.Lock()
    with lock:
        pass
    with lock:
        pass


class SharedMemory:
    """`size` bytes of host memory behind a file descriptor.

    Resource handling: owns one descriptor, and after the first use of `view` one mapping (which holds a second
    descriptor). `attach` duplicates the descriptor it is given; the caller still owns that one. `close` closes the
    descriptor at once; the mapping goes when the last memoryview or tensor made from `view` does, so that closing never
    pulls memory from under a reader.

    Error handling: the pages are allocated in `create`, so that memory which is not there is an OSError now and not a
    SIGBUS later. The size is sealed: no holder can shrink the file under another's mapping.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Take over `fd`; use `create` or `attach`."""
        self._fd = fd
        self._size = size
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    @classmethod
    def create(cls, name: str, size: int, *, more_seals: bool = False) -> Self:
        """Allocate `size` zero bytes. `name` is what /proc shows; it need not be unique. `more_seals`: the holder may
        forbid more than a change of size later."""
        if size <= 0:
            raise ValueError(f"shared memory {name!r}: got size {size}, expected at least 1 byte")
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | (0 if more_seals else fcntl.F_SEAL_SEAL))
        except OSError as error:
            os.close(fd)
            raise OSError(error.errno, f"cannot allocate {size} bytes for {name!r}: {error.strerror}") from error
        return cls(fd, size)

    @classmethod
    def attach(cls, fd: int, size: int) -> Self:
        """Use memory that another process made; ValueError if it has another size or could be shrunk."""
        got = os.fstat(fd).st_size
        if got != size:
            raise ValueError(f"shared memory: got {got} bytes, expected {size}")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("shared memory: its size is not sealed")
        return cls(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0), size)

    @classmethod
    def adopt(cls, fd: int, size: int) -> Self:
        """`attach` that takes over the descriptor."""
        memory = cls.attach(fd, size)
        os.close(fd)
        return memory

    @property
    def fd(self) -> int:
        """The descriptor, to be passed to another process; stays owned by this object."""
        self._check_open()
        return self._fd

    @property
    def size(self) -> int:
        return self._size

    @property
    def view(self) -> memoryview:
        """All bytes, writable. The first use maps them, with page tables filled, so that no later access faults."""
        self._check_open()
        if self._view is None:
            self._map = mmap.mmap(self._fd, self._size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._view = memoryview(self._map)
        return self._view

    def map_or_close(self) -> memoryview:
        """`view`, for who takes the memory over: if it cannot be mapped, it is closed, and OSError raised."""
        try:
            return self.view
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        view, mapping, self._view, self._map = self._view, self._map, None, None
        if view is not None and mapping is not None:
            with contextlib.suppress(BufferError):  # views are still out: the mapping goes with the last of them
                view.release()
                mapping.close()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ValueError("shared memory is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
