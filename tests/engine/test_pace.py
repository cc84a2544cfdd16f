"""Who waits for whom when many clients ask much."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import uvloop

from engine.pace import Pace, Turnstile


def test_a_burst_then_a_rate() -> None:
    """Three at once; the fourth when a quarter of a second has passed, at four per second; after long, three again."""
    pace = Pace(3, 4.0, 100.0)
    for _ in range(3):
        assert pace.wait(100.0) == 0.0
        pace.count(100.0)
    pace.count(100.0)
    assert pace.wait(100.0) == 0.25 and pace.wait(100.25) == 0.0
    assert pace.left(1000.0) == 3.0


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_one_passes_in_each_turn_of_the_loop(run: object) -> None:
    """Thirty want to pass five times each, beside one that is there in every turn: no turn has two of them, the order
    is that of their coming, some that are cancelled hold nobody up, and it works again when it has been empty."""
    passed: list[tuple[int, int]] = []
    turn = 0

    async def tick() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    async def ask(turnstile: Turnstile, name: int) -> None:
        for _ in range(5):
            await turnstile.wait()
            passed.append((turn, name))

    async def main() -> None:
        turnstile = Turnstile()
        ticking = asyncio.create_task(tick())
        for first in (0, 100):
            asking = [asyncio.create_task(ask(turnstile, first + number)) for number in range(30)]
            await asyncio.sleep(0)
            for number in (0, 7, 8):
                asking[number].cancel()
            await asyncio.wait(asking)
        ticking.cancel()

    run(main())  # type: ignore[operator]
    assert len(passed) == 2 * 27 * 5
    assert max(Counter(turn for turn, _ in passed).values()) == 1
    for first in (0, 100):
        names = [name - first for _, name in passed if first <= name < first + 30]
        assert names == [number for number in range(30) if number not in (0, 7, 8)] * 5
