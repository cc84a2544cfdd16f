"""Levels that change at random while requests run, stages are killed and weights change: no video differs by a bit."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from random import Random

import pytest

from engine import Supervisor
from ipc.messages import MemoryLevel
from tests.conftest import Video
from tests.engine.reloading import FIRST, SECOND, ask, engine, order, video

REQUESTS = 200
TOGETHER = 3
"""Requests that are there at a time."""
SEEDS = 4

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


async def change(supervisor: Supervisor, random: Random, ended: asyncio.Event, *, faults: bool) -> int:
    """Change the level until the requests have ended; how often. With `faults`, kill a stage in the middle of some
    changes, and reload between others."""
    changes = 0
    while not ended.is_set():
        await asyncio.sleep(random.uniform(0, 0.2))
        level: MemoryLevel = random.choice((0, 1, 2, 3, 3))
        changing = asyncio.create_task(
            supervisor.change_memory(level, random.choice((None, 0, 1)) if level == 3 else None)
        )
        if faults and random.random() < 0.1:
            await asyncio.sleep(random.uniform(0, 0.05))
            stages = [s for s in supervisor.status().stages if s.pid is not None and s.name != "writer"]
            if stages and (pid := random.choice(stages).pid) is not None:
                os.kill(pid, signal.SIGKILL)
        await changing
        changes += 1
        if faults and random.random() < 0.1:
            await supervisor.reload(order(random.choice((FIRST, SECOND))))
    return changes


async def request(supervisor: Supervisor, golden: Golden, path: Path, seed: int, turns: asyncio.Semaphore) -> None:
    async with turns:
        done = await supervisor.generate(ask(path, seed=seed))
        found = await asyncio.to_thread(lambda: Video(done.path).sha256)
        assert found == golden[done.metadata["weights"]["transformer"], seed], f"{path.name} with seed {seed}"
        path.unlink()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("faults", [False, True])
async def test_levels_change_at_random_over_many_requests(tmp_path: Path, faults: bool) -> None:
    """Two hundred requests, a few at a time, while the level changes every moment; and fifty, with stages that are
    killed in the middle of a change and reloads in between: none fails, and none differs by a bit."""
    random = Random(7)
    async with engine() as supervisor:
        golden = await golden_of(supervisor, tmp_path)
        assert len(set(golden.values())) == len(golden)
        ended, turns = asyncio.Event(), asyncio.Semaphore(TOGETHER)
        changing = asyncio.create_task(change(supervisor, random, ended, faults=faults))
        async with asyncio.TaskGroup() as group:
            for number in range(REQUESTS // 4 if faults else REQUESTS):
                path, seed = tmp_path / f"{number}.mp4", random.randrange(SEEDS)
                group.create_task(request(supervisor, golden, path, seed, turns))
        ended.set()
        assert await changing >= 20
        assert not [change for change in supervisor.trace().changes if change.error is not None]
