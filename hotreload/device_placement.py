"""Weights in GPU memory that outlives the process that read them: what `hotreload/placement.py` does on a CPU.

The supervisor keeps the descriptor; a process that comes after maps the memory in milliseconds, checks it against its
checksum at the speed of the GPU's memory, and binds its module to it. The table of tensors is not in the memory: both
sides compute it from the model, and it is part of the checksum.
"""

from __future__ import annotations

from typing import Self

import msgspec
import torch
import xxhash
from torch import Tensor

from hotreload.placement import Runs, Shapes, Table, lay_out, view_placed
from ipc.device_memory import DeviceMemory
from ipc.messages.weights import WeightVersion
from ipc.tensors import view_tensor

WORDS = 1 << 24
"""8-byte words that are summed at a time: 128 MiB, and a few times that for what is computed from them."""
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as a signed number: its odd multiples are spread over all bits."""


class DevicePlacement:
    """One component's tensors in memory of GPU number `device`: `create` it, fill it through `tensors`, then `seal`; or
    `attach` to a sealed one.

    Resource handling: owns one descriptor until `close`. The memory stays mapped as long as a tensor refers to it.
    Error handling: `DeviceMemoryError` (an OSError) when the GPU has not the memory; ValueError for memory that is not
    what its version says.
    """

    def __init__(self, memory: DeviceMemory, table: Table) -> None:
        """Take over `memory`; use `create` or `attach`."""
        self._memory = memory
        self._table = table
        self.flat = view_tensor("uint8", (table.size,), memory.view)
        """All data, uint8."""
        self.tensors: dict[str, Tensor] = {t.name: view_placed(self.flat, t) for t in table.tensors}
        """By name: views of the memory."""

    @classmethod
    def create(cls, device: int, tensors: Shapes, runs: Runs = ()) -> Self:
        """Room for these tensors, zero."""
        table = lay_out(tensors, runs)
        return cls(DeviceMemory.create(device, table.size), table)

    @classmethod
    def attach(cls, version: WeightVersion, fd: int, tensors: Shapes, runs: Runs = ()) -> Self:
        """Map what another process placed. The descriptor is duplicated."""
        table = lay_out(tensors, runs)
        assert version.device is not None, f"{version.component} is in host memory"
        if version.bytes != table.size:
            raise ValueError(f"placed {version.component}: got {version.bytes} bytes, expected {table.size}")
        placement = cls(DeviceMemory.attach(fd, version.device, table.size), table)
        if (found := placement.fingerprint()) != version.fingerprint:
            placement.close()
            raise ValueError(f"placed {version.component}: its bytes sum to {found}, not to {version.fingerprint}")
        return placement

    @property
    def fd(self) -> int:
        """The descriptor, to be passed to another process; stays owned by this object."""
        return self._memory.fd

    def seal(self, component: str, content: str) -> WeightVersion:
        """What the supervisor keeps beside the descriptor. Nobody writes from now on."""
        return WeightVersion(
            component=component, content=content, fingerprint=self.fingerprint(), bytes=self._table.size,
            device=self._memory.device,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Of the table and of all data, gaps included, in hex."""
        return xxhash.xxh3_64_hexdigest(msgspec.msgpack.encode(self._table)) + checksum(self.flat)

    def close(self) -> None:
        self._memory.close()


def checksum(data: Tensor) -> str:
    """64 bits of a flat uint8 tensor, computed where it is, in hex. The same on every device.

    A sum, modulo 2^64, of every word mixed with itself and multiplied by an odd number that belongs to its place: a
    changed bit, word or order changes it. It finds damage; it does not resist an attacker.
    """
    padded = torch.nn.functional.pad(data, (0, -len(data) % 8)) if len(data) % 8 else data
    words = padded.view(torch.int64)
    place = torch.arange(min(WORDS, len(words)), device=data.device).mul_(2).add_(1).mul_(_ODD)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for number, first in enumerate(range(0, len(words), WORDS)):
        part = words[first : first + WORDS]
        mixed = (part ^ (part >> 29)).mul_(place[: len(part)])
        mixed ^= mixed >> 32
        total += mixed.sum() * (2 * number + 1)
    return f"{int(total) % (1 << 64):016x}"
