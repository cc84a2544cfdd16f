"""Levels that change at random while requests run, stages are killed and weights change: no video differs by a bit. A
failure names its seed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path
from random import Random

import pytest

from engine import Supervisor
from ipc.messages.memory import MemoryPlan
from ipc.messages.server import Progress
from tests.conftest import Video
from tests.engine.reloading import FIRST, SECOND, ask, engine, order, video
from tools.load import Tally, timed

REQUESTS = 200
TOGETHER = 3
"""Requests that are there at a time."""
SEEDS = 4
KILLS = 5
"""More of one stage within a minute, and it is FAILED."""
PLANS = [*(MemoryPlan(level=level) for level in (0, 1, 2)), *(MemoryPlan(level=3, blocks=n) for n in (0, 1, 5))]

Golden = dict[tuple[str, int], str]
"""(content hash of the transformer, seed) -> SHA-256 of the frames."""


async def golden_of(supervisor: Supervisor, folder: Path) -> Golden:
    found = {}
    for directory in (SECOND, FIRST):
        await supervisor.reload(order(directory))
        content = supervisor.status().weights["transformer"]
        for seed in range(SEEDS):
            found[content, seed] = await video(supervisor, folder / "calm.mp4", seed=seed)
    return found


async def disturb(supervisor: Supervisor, random: Random, ended: asyncio.Event, tally: Tally, *, faults: bool) -> None:
    """Change the level until the requests have ended. With `faults`, a stage is killed in the middle of some changes,
    and other weights come after some."""
    for number in itertools.count():
        await asyncio.sleep(random.uniform(0, 0.2))
        if ended.is_set():
            return
        kill = faults and tally.faults["kills in a change"] < min(KILLS, 1 + number // 6)
        await change(supervisor, random, tally, kill=kill)
        if faults and number % 6 == 4:
            await supervisor.reload(order(random.choice((FIRST, SECOND))))
            tally.faults["reloads"] += 1


async def change(supervisor: Supervisor, random: Random, tally: Tally, *, kill: bool) -> None:
    """Ask for another plan than the one that holds; it holds when that returns. With `kill`, a stage is killed before,
    if there is time."""
    (device,) = supervisor.memory_levels()
    plan = random.choice([plan for plan in PLANS if plan != device.plan])
    changing = asyncio.create_task(supervisor.change_memory(plan.level, plan.blocks))  # type: ignore[arg-type]
    if kill:
        await asyncio.wait([changing], timeout=random.uniform(0, 0.02))
        stages = [s for s in supervisor.status().stages if s.pid is not None and s.name != "writer"]
        if not changing.done() and stages and (pid := random.choice(stages).pid) is not None:
            os.kill(pid, signal.SIGKILL)
            tally.faults["kills in a change"] += 1
    (device,) = await changing
    assert device.plan == plan and device.last is not None and device.last.error is None
    tally.faults["changes"] += 1


async def request(supervisor: Supervisor, golden: Golden, path: Path, seed: int, tally: Tally) -> None:
    accepted = await supervisor.submit(ask(path, seed=seed))
    levels = {
        event.memory_level
        async for event in supervisor.events(accepted.id)
        if isinstance(event, Progress) and event.phase == "denoise"
    }
    done = await supervisor.result(accepted.id)
    found = await asyncio.to_thread(lambda: Video(done.path).sha256)
    assert found == golden[done.metadata["weights"]["transformer"], seed], f"{path.name} with seed {seed}"
    path.unlink()
    tally.requests += 1
    tally.faults["requests at several levels"] += len(levels) > 1


async def run(folder: Path, tally: Tally, requests: int, least: dict[str, int]) -> None:
    """So many requests, and more until each kind of fault has come as often as it must."""
    async with engine() as supervisor:
        golden = await golden_of(supervisor, folder)
        assert len(set(golden.values())) == len(golden)
        ended, numbers, draw = asyncio.Event(), itertools.count(), Random(tally.seed)

        async def client() -> None:
            while not disturbing.done() and (
                (number := next(numbers)) < requests or any(tally.faults[kind] < n for kind, n in least.items())
            ):
                await request(supervisor, golden, folder / f"{number}.mp4", draw.randrange(SEEDS), tally)

        faults = "kills in a change" in least
        disturbing = asyncio.create_task(disturb(supervisor, Random(tally.seed), ended, tally, faults=faults))
        async with asyncio.TaskGroup() as group:
            for _ in range(TOGETHER):
                group.create_task(client())
        ended.set()
        await disturbing
    print(tally)
    assert tally.requests >= requests


@pytest.mark.timeout(900)
async def test_levels_change_at_random_over_many_requests(tmp_path: Path) -> None:
    """Two hundred requests, a few at a time, while the level changes every moment, for many of them between two steps:
    none fails, and none differs by a bit."""
    async with timed(None) as tally:
        await run(tmp_path, tally, REQUESTS, {"changes": REQUESTS // 2, "requests at several levels": REQUESTS // 4})


@pytest.mark.timeout(900)
async def test_with_stages_that_are_killed_and_weights_that_change(tmp_path: Path) -> None:
    """A quarter as many, with stages that are killed in the middle of a change and reloads in between."""
    async with timed(None) as tally:
        await run(tmp_path, tally, REQUESTS // 4, {"kills in a change": KILLS, "reloads": KILLS})
