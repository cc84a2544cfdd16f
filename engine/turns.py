"""One reload after another, of which the last to come wins."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ipc.errors import Superseded


class Turns:
    """Who comes is given a number at once, and may look at files before it gets in line: which of two is the last is
    decided by when they came, not by whose files were found first."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._arrivals = itertools.count(1)
        self._newest = 0
        """The number of the last that overtook."""
        self._in_line: dict[int, asyncio.Event] = {}
        """Set when another one overtakes."""
        self._current = asyncio.Event()

    @property
    def is_taken(self) -> bool:
        """Somebody has a turn."""
        return self._lock.locked()

    def arrive(self) -> int:
        """A number for `take`."""
        return next(self._arrivals)

    @asynccontextmanager
    async def take(self, arrival: int, *, overtakes: bool = True) -> AsyncIterator[None]:
        """Wait for those before; those that came before and have not ended are told that they are overtaken, unless
        not `overtakes`. Raises `Superseded` if a later one overtakes, or has."""
        mine = asyncio.Event()
        if arrival < self._newest:
            mine.set()
        self._check(mine)
        if overtakes:
            self._newest = arrival
            for number, other in self._in_line.items():
                if number < arrival:
                    other.set()
        self._in_line[arrival] = mine
        try:
            async with self._lock:
                self._check(mine)
                self._current = mine
                yield
        finally:
            del self._in_line[arrival]

    def check(self) -> None:
        """Raises `Superseded` if who has the turn is overtaken."""
        self._check(self._current)

    async def overtaken(self) -> None:
        """Return when who has the turn is overtaken."""
        await self._current.wait()

    @staticmethod
    def _check(mine: asyncio.Event) -> None:
        if mine.is_set():
            raise Superseded("another reload came meanwhile and is carried out in place of this one")
