"""The resource monitor: what the machine has left (`Sampler`), and what memory plan follows from it (`Policy`).

The policy is pure: samples in, plans out, no clock and no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from engine.footprint import Need, RequestSize

INTERVAL = 0.5
"""Seconds between samples."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU and the host at a moment. Bytes, unless it says otherwise; None: the source is lacking."""

    at: float
    """Seconds of the monotonic clock."""
    total: int | None = None
    """Of the device."""
    ours: int | None = None
    """Used by this engine's processes, and by the memory that outlives them."""
    others: int | None = None
    """Used by other processes."""
    free: int | None = None
    utilisation: float | None = None
    """Share of the last sample period in which a kernel ran, 0 to 1."""
    pcie_rx: float | None = None
    """Bytes per second to the device."""
    pcie_tx: float | None = None
    """Bytes per second from the device."""
    host_total: int | None = None
    host_available: int | None = None
    memlock: int | None = None
    """What a process may lock (RLIMIT_MEMLOCK); None: as much as it likes."""
    pressure: float | None = None
    """Of /proc/pressure/memory, "some avg10": the share of ten seconds in which some task waited for memory, 0 to 1."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows."""

    budget: int | None = None
    """Bytes of the GPU that this engine may use; None: all that others leave."""
    lowest: int = 0
    highest: int = 3
    """Memory levels; the same two: the level never changes."""
    locked: bool = False
    """Host copies are locked by `mlock`, which RLIMIT_MEMLOCK bounds. What CUDA registers is not counted there."""


Ladder = Callable[[RequestSize | None], Sequence[Need]]
"""A running request's size -> what there is to choose from, the most memory first (`footprint.ladder`)."""
