"""What one program hands to the next that takes its place: plain data, and the descriptors that it speaks of.

Each class that has something to hand over gives its `State` and can be made, or `put_back`, from it; the whole document
is in `engine/handover.py`. In it, a descriptor is named by its place in one list.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Plain data. What a program does not know of, it refuses: it would forget it."""


class Descriptors:
    """That list.

    Resource handling: who gives a descriptor with `put` keeps it. What `take` returns is close-on-exec, and belongs to
    whoever takes it.
    """

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self.fds = list(fds)
        self._taken: set[int] = set()

    def put(self, fd: int) -> int:
        """Its place."""
        self.fds.append(fd)
        return len(self.fds) - 1

    def put_all(self, fds: Iterable[int]) -> list[int]:
        return [self.put(fd) for fd in fds]

    def take(self, place: int) -> int:
        """ValueError for a place that is not in the list, or was taken before."""
        if not 0 <= place < len(self.fds) or place in self._taken:
            raise ValueError(f"descriptor {place} of {len(self.fds)} is not there, or was taken twice")
        self._taken.add(place)
        os.set_inheritable(self.fds[place], False)
        return self.fds[place]

    def take_all(self, places: Iterable[int]) -> list[int]:
        return [self.take(place) for place in places]

    def check_all_taken(self) -> None:
        """ValueError for what nobody has a use for: something that was handed over would be lost."""
        if left := len(self.fds) - len(self._taken):
            raise ValueError(f"{left} of {len(self.fds)} descriptors are of nothing that is known here")
