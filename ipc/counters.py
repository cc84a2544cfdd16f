"""A counter in shared memory by which a stage process shows that it makes progress."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from ipc.memory import PAGE_BYTES, SharedMemory


class ProgressCounter:
    """A u64 that one process increments and others read, without a message or a system call.

    An aligned 8-byte store is atomic on x86-64 and AArch64, so a reader never sees half of a value.

    Resource handling: owns the shared page; `attach` duplicates the descriptor it is given.
    """

    def __init__(self, memory: SharedMemory) -> None:
        """Take over `memory`; use `create` or `attach`. OSError if it cannot be mapped, and the memory is closed."""
        self._memory = memory
        self._words = memory.map_or_close().cast("Q")

    @classmethod
    def create(cls) -> Self:
        """A new counter at 0."""
        return cls(SharedMemory.create("progress", PAGE_BYTES))

    @classmethod
    def attach(cls, fd: int) -> Self:
        """The counter behind a descriptor that another process made."""
        return cls(SharedMemory.attach(fd, PAGE_BYTES))

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """`attach` that takes over the descriptor."""
        return cls(SharedMemory.adopt(fd, PAGE_BYTES))

    @property
    def fd(self) -> int:
        return self._memory.fd

    @property
    def value(self) -> int:
        return self._words[0]

    def increment(self) -> None:
        """Only one process may do this."""
        self._words[0] = (self._words[0] + 1) & 0xFFFF_FFFF_FFFF_FFFF

    def close(self) -> None:
        self._words.release()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
