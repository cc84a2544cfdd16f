"""How fast clients are answered: what one may ask, and who goes before whom when many ask."""

from __future__ import annotations

import asyncio
import collections

INTERVAL = 0.001
"""Seconds between two who go through a turnstile, most of which others have."""


class Pace:
    """How fast one client is answered: `burst` messages at once, then `rate` per second. Who asks more often waits,
    so that it takes next to nothing of the loop from the others."""

    def __init__(self, burst: int, rate: float, now: float) -> None:
        self._burst, self._rate = burst, rate
        self._left, self._since = float(burst), now

    def count(self, now: float) -> None:
        """A message was answered."""
        self._left, self._since = self.left(now) - 1, now

    def wait(self, now: float) -> float:
        """The seconds until the next message may be answered."""
        return max(0.0, -self.left(now) / self._rate)

    def left(self, now: float) -> float:
        """Messages that may be answered at once; below zero: that must be waited for."""
        return min(self._burst, self._left + (now - self._since) * self._rate)

    def set_left(self, left: float) -> None:
        self._left = left


class Turnstile:
    """Lets one through every `INTERVAL`, in the order in which they came.

    Who asks much goes through it, however many they are. So a client that asks little waits for one message of theirs,
    not for one of each, and the threads that work for it find a core free.
    """

    def __init__(self) -> None:
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def wait(self) -> None:
        """Return when all who came before have gone through."""
        loop = asyncio.get_running_loop()
        mine = loop.create_future()
        self._waiting.append(mine)
        if len(self._waiting) == 1:
            loop.call_soon(self._let_through)
        await mine

    def _let_through(self) -> None:
        while self._waiting and self._waiting[0].done():  # cancelled
            self._waiting.popleft()
        if self._waiting:
            self._waiting[0].set_result(None)
            asyncio.get_running_loop().call_later(INTERVAL, self._let_through)
