"""Where the bytes of slots live: one small interface, so that a queue need not know what kind of memory it is."""

from __future__ import annotations

import os
from typing import NamedTuple, Protocol

from ipc.device_memory import DeviceMemory, DeviceView
from ipc.memory import PAGE_BYTES, SharedMemory, round_up

Room = memoryview | DeviceView
"""Bytes in host memory or on a GPU."""


class Payload(Protocol):
    """Room for a fixed number of slots of a fixed size.

    Resource handling: `create` allocates; the maker keeps the descriptors open, so that the bytes outlive the processes
    that use them. `attach` duplicates the descriptors it is given.
    """

    @property
    def fds(self) -> list[int]:
        """The descriptors another process needs for `attach`; they stay owned by this object."""

    def view(self, slot: int) -> Room:
        """The bytes of one slot, page aligned, writable."""

    def close(self) -> None:
        """Give up the descriptors; memory that a view still refers to stays mapped until the view is gone."""


class MappedPayload:
    """Slots in one piece of memory, a memfd or on a GPU, that is mapped here. A memfd only from the first `view` on, so
    the resident memory of a maker that never looks does not grow."""

    def __init__(self, memory: SharedMemory | DeviceMemory, slot_bytes: int) -> None:
        """Take over `memory`."""
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._stride = round_up(slot_bytes, PAGE_BYTES)

    @property
    def fds(self) -> list[int]:
        return [self._memory.fd]

    def view(self, slot: int) -> Room:
        start = slot * self._stride
        return self._memory.view[start : start + self._slot_bytes]

    def close(self) -> None:
        self._memory.close()


class DeviceFd(NamedTuple):
    """Memory on GPU number `device`, by its descriptor."""

    device: int
    fd: int


class HeldPayload:
    """GPU memory in the hands of a process that has no CUDA context: it keeps the descriptor, and with it the bytes.

    Resource handling: takes over `fd`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fds(self) -> list[int]:
        return [self._fd]

    def view(self, slot: int) -> DeviceView:
        raise AssertionError(f"slot {slot} is on a GPU; whoever reads it attaches to it")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def place_name(device: int | None) -> str:
    """How a person is told where memory is."""
    return "host" if device is None else f"gpu {device}"


def payload_bytes(slots: int, slot_bytes: int) -> int:
    """What the payload of so many slots takes: each starts on a page."""
    return slots * round_up(slot_bytes, PAGE_BYTES)


def make_payload(name: str, slots: int, slot_bytes: int, on: DeviceFd | None) -> Payload:
    """Room in host memory, or in memory of a GPU that somebody has made for it."""
    if on is not None:
        return HeldPayload(on.fd)
    return MappedPayload(SharedMemory.create(name, payload_bytes(slots, slot_bytes)), slot_bytes)


def adopt_payload(slots: int, slot_bytes: int, fd: int, device: int | None) -> Payload:
    """The room that a program before this one has made, in the hands of who only holds it: takes over the descriptor.
    ValueError if it has another size."""
    if device is not None:
        return HeldPayload(fd)
    return MappedPayload(SharedMemory.adopt(fd, payload_bytes(slots, slot_bytes)), slot_bytes)


def attach_payload(slots: int, slot_bytes: int, fds: list[int], device: int | None) -> Payload:
    """The payload behind these descriptors, on this GPU or in host memory; all of it is mapped now, so that no later
    access faults."""
    (fd,) = fds
    size = payload_bytes(slots, slot_bytes)
    memory = SharedMemory.attach(fd, size) if device is None else DeviceMemory.attach(fd, device, size)
    payload = MappedPayload(memory, slot_bytes)
    try:
        payload.view(0)
    except OSError:
        payload.close()
        raise
    return payload
