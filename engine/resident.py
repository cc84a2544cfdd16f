"""How much memory a process has: a look into /proc takes longer than all the rest of a status."""

from __future__ import annotations

import os
import time

AGE = 0.25
"""Seconds for which what was seen is told again."""


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class Resident:
    """Of one process, as of at most `AGE` ago."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen, self._at = 0, float("-inf")

    def bytes(self) -> int:
        if (now := time.monotonic()) > self._at + AGE:
            self._seen, self._at = resident_bytes(self._pid), now
        return self._seen
