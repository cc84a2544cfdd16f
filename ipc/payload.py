"""Where the bytes of slots live: one small interface, so that a queue need not know what kind of memory it is."""

from __future__ import annotations

from typing import Protocol, Self

from ipc.memory import PAGE_BYTES, SharedMemory, round_up


class Payload(Protocol):
    """Room for a fixed number of slots of a fixed size.

    Resource handling: `create` allocates; the maker keeps the descriptors open, so that the bytes outlive the processes
    that use them. `attach` duplicates the descriptors it is given.
    """

    @property
    def fds(self) -> list[int]:
        """The descriptors another process needs for `attach`; they stay owned by this object."""

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot, page aligned, writable."""

    def close(self) -> None:
        """Give up the descriptors; memory that a view still refers to stays mapped until the view is gone."""


class HostPayload:
    """Slots in one memfd. The maker does not map it, so its resident memory does not grow."""

    def __init__(self, memory: SharedMemory, slot_bytes: int) -> None:
        """Take over `memory`; use `create` or `attach`."""
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._stride = round_up(slot_bytes, PAGE_BYTES)

    @classmethod
    def create(cls, name: str, slots: int, slot_bytes: int) -> Self:
        return cls(SharedMemory.create(name, slots * round_up(slot_bytes, PAGE_BYTES)), slot_bytes)

    @classmethod
    def attach(cls, slots: int, slot_bytes: int, fds: list[int]) -> Self:
        """Map all of it now, so that no later access faults."""
        (fd,) = fds
        payload = cls(SharedMemory.attach(fd, slots * round_up(slot_bytes, PAGE_BYTES)), slot_bytes)
        payload.view(0)
        return payload

    @property
    def fds(self) -> list[int]:
        return [self._memory.fd]

    def view(self, slot: int) -> memoryview:
        start = slot * self._stride
        return self._memory.view[start : start + self._slot_bytes]

    def close(self) -> None:
        self._memory.close()
