"""Of several at once the last to come wins, whoever gets in line first."""

from __future__ import annotations

import asyncio

import pytest

from engine.turns import Turns
from ipc.errors import Superseded


async def go(turns: Turns, arrival: int, *, overtakes: bool = True, until: asyncio.Event | None = None) -> int:
    async with turns.take(arrival, overtakes=overtakes):
        if until is not None:
            await until.wait()
        turns.check()
        return arrival


async def test_who_came_first_and_is_in_line_last_is_overtaken() -> None:
    """Also when the other one has ended already."""
    turns = Turns()
    first, second = turns.arrive(), turns.arrive()
    assert await go(turns, second) == second
    with pytest.raises(Superseded):
        await go(turns, first)
    assert not turns.is_taken


async def test_those_under_way_and_in_line_are_overtaken() -> None:
    turns, ended = Turns(), asyncio.Event()
    under_way = asyncio.create_task(go(turns, turns.arrive(), until=ended))
    waits = asyncio.create_task(go(turns, turns.arrive()))
    await asyncio.sleep(0)
    assert turns.is_taken
    last = asyncio.create_task(go(turns, turns.arrive()))
    await asyncio.wait_for(turns.overtaken(), 5)
    ended.set()
    for overtaken in (under_way, waits):
        with pytest.raises(Superseded):
            await overtaken
    assert await last == 3


async def test_a_dry_run_overtakes_nobody_and_is_overtaken_by_later_ones_only() -> None:
    turns, ended = Turns(), asyncio.Event()
    under_way = asyncio.create_task(go(turns, turns.arrive(), until=ended))
    late, dry = turns.arrive(), turns.arrive()
    waits = asyncio.create_task(go(turns, dry, overtakes=False))
    await asyncio.sleep(0)
    last = asyncio.create_task(go(turns, late))
    await asyncio.sleep(0)
    ended.set()
    with pytest.raises(Superseded):
        await under_way
    assert (await waits, await last) == (dry, late)


async def test_one_that_fails_lets_the_next_in() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="files"):
        async with turns.take(turns.arrive()):
            raise ValueError("files")
    assert await go(turns, turns.arrive()) == 2
