"""Who waits for whom when many clients ask much."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from engine.pace import INTERVAL, Pace, Turnstile


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
def test_one_goes_through_at_a_time(run: object) -> None:
    """Thirty want to pass five times each, twice: never two within an interval, in the order of their coming; some that
    are cancelled hold nobody up, and it works again when it has been empty."""
    passed: list[tuple[float, int]] = []

    async def ask(turnstile: Turnstile, name: int) -> None:
        for _ in range(5):
            await turnstile.wait()
            passed.append((asyncio.get_running_loop().time(), name))

    async def main() -> None:
        turnstile = Turnstile()
        for first in (0, 100):
            asking = [asyncio.create_task(ask(turnstile, first + number)) for number in range(30)]
            await asyncio.sleep(0)
            for number in (0, 7, 8):
                asking[number].cancel()
            await asyncio.wait(asking)

    run(main())  # type: ignore[operator]
    names = [name for _, name in passed]
    assert names == [first + n for first in (0, 100) for _ in range(5) for n in range(30) if n not in (0, 7, 8)]
    took = passed[-1][0] - passed[0][0]
    assert took >= (len(passed) - 2) * INTERVAL * 0.9, "uvloop's clock has whole milliseconds"
