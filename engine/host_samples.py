"""The host's memory: what there is, what may be taken of it, and whether it is short. Linux's files; what is lacking is
None."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path
from typing import NamedTuple

import psutil

CAP_IPC_LOCK = 14
"""Number of the capability of locking any amount of memory."""


class HostSample(NamedTuple):
    """As in `engine.monitor.Sample`."""

    total: int | None
    available: int | None
    memlock: int | None
    pressure: float | None


def host_sample(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> HostSample:
    memory, limit, left = psutil.virtual_memory(), cgroup_limit(cgroup), cgroup_left(cgroup)
    total = memory.total if limit is None else min(memory.total, limit)
    available = memory.available if left is None else min(memory.available, left)
    return HostSample(total, available, lockable(proc), waiting(proc))


def cgroup_limit(cgroup: Path) -> int | None:
    """Bytes of memory that the control group may have; None: no limit."""
    with contextlib.suppress(OSError, ValueError):
        return int((cgroup / "memory.max").read_text())
    return None


def cgroup_left(cgroup: Path) -> int | None:
    """What the control group's limit leaves, the page cache that can be given up counted as free; None: no limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, used = cgroup_limit(cgroup), int((cgroup / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (cgroup / "memory.stat").read_text(), re.MULTILINE)
        return None if limit is None else max(0, limit - used + (int(cached[1]) if cached else 0))
    return None


def lockable(proc: Path) -> int | None:
    """RLIMIT_MEMLOCK, for who is bound by it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", (proc / "self" / "status").read_text(), re.MULTILINE)
        if found and int(found[1], 16) >> CAP_IPC_LOCK & 1:
            return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def waiting(proc: Path) -> float | None:
    """Share of the last ten seconds in which some task waited for memory, 0 to 1; None: a kernel without PSI."""
    with contextlib.suppress(OSError):
        found = re.search(r"^some avg10=([\d.]+)", (proc / "pressure" / "memory").read_text(), re.MULTILINE)
        return None if found is None else float(found[1]) / 100
    return None
