"""Memory levels that are asked for while a reload of weights is under way: at once while it reads, afterwards while
processes map what it has read. Where the weights are then needed elsewhere, they are read again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import Supervisor, levels
from engine.checkpoint import open_components
from engine.footprint import Setting
from engine.levels import Levels
from engine.loader import Loader
from engine.params import SystemParams, UserParams
from engine.plans import HOST
from engine.reload import Order, Reloader
from engine.weights import Placed
from ipc.errors import Busy
from ipc.messages.loader import Read
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import MemoryLevel, Seat
from ipc.messages.status import MemoryChange
from tests.engine.gpu_crew import GPU, GpuCrew
from tests.engine.reloading import SECOND, engine, order, video
from tools.chaos import pid_of

Wait = Callable[..., Awaitable[None]]


def plan(supervisor: Supervisor) -> MemoryPlan:
    (device,) = supervisor.memory_levels()
    return device.plan


async def test_while_weights_are_read(tmp_path: Path, wait_until: Wait) -> None:
    """The process that reads is as slow as can be: levels change meanwhile, requests are made, and the reload ends as
    it would have."""
    async with engine() as supervisor:
        first = await video(supervisor, tmp_path / "v.mp4")
        reload = asyncio.create_task(supervisor.reload(order()))
        loader = supervisor._reloader._loader
        await wait_until(lambda: loader.pid is not None, "the process that reads")
        pid = loader.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        for level in (2, 3, 0, 2):
            await asyncio.wait_for(supervisor.change_memory(level), 60)
            assert plan(supervisor).level == level
        assert await video(supervisor, tmp_path / "v.mp4") == first
        assert not reload.done()
        os.kill(pid, signal.SIGCONT)
        done = await asyncio.wait_for(reload, 120)
        assert supervisor.status().weights["transformer"] == done.weights["transformer"]
        second = await video(supervisor, tmp_path / "v.mp4")
        assert second != first
        await supervisor.change_memory(0)
        await supervisor.rollback()
        await supervisor.reload(order())
        assert await video(supervisor, tmp_path / "v.mp4") == second


async def test_while_weights_are_mapped(monkeypatch: pytest.MonkeyPatch, wait_until: Wait) -> None:
    """The dit is stopped, and cannot map them: a level waits for it, for so long, and then comes as an error that says
    why; one that waits when the dit goes on holds."""
    async with engine() as supervisor:
        pid = pid_of(supervisor, "dit")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        reload = asyncio.create_task(supervisor.reload(order()))
        await wait_until(supervisor._levels._mapping.locked, "the mapping")
        with monkeypatch.context() as patched:
            patched.setattr(levels, "MAPPING_PATIENCE", 0.05)
            with pytest.raises(Busy, match="a process is not done with it"):
                await supervisor.change_memory(2)
        assert plan(supervisor) == MemoryPlan()
        waits = asyncio.create_task(supervisor.change_memory(2))
        await asyncio.sleep(0.2)
        assert not waits.done() and not reload.done()
        os.kill(pid, signal.SIGCONT)
        await asyncio.wait_for(asyncio.gather(reload, waits), 60)
        assert plan(supervisor) == MemoryPlan(level=2)


class Host:
    """What `Levels` and `Reloader` need of an engine without requests."""

    def __init__(self, crew: GpuCrew, params: SystemParams) -> None:
        self.model, self.params = crew.model, params
        self.levels = Levels(self, crew, params, crew.model, {GPU: Setting(queues=False)})  # type: ignore[arg-type]
        self.reloader = Reloader(crew.model, params, crew, self.levels, self, self.try_weights)  # type: ignore[arg-type]

    def handle_level(self, seat: Seat, level: int, top: int) -> None: ...
    def handle_memory_change(self, change: MemoryChange) -> None: ...
    def change_weights(self, weights: dict[str, str]) -> None: ...
    def running_size(self) -> None: ...

    def ending_with_others(self, weights: dict[str, str]) -> int:
        return 0

    def weights_in_use(self) -> list[frozenset[tuple[str, str]]]:
        return []

    async def try_weights(self, user: UserParams, weights: dict[str, str]) -> str:
        raise AssertionError("nobody asks for a canary")

    @property
    def is_exchanging_weights(self) -> bool:
        return self.reloader.is_busy


class GpuLoader(Loader):
    """Reads to host memory, and says of each version that it is where it was wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[list[str]] = []
        self.may_end = asyncio.Event()

    async def read(self, asked: Read, fds: Sequence[int], on_loading: Any) -> list[Placed]:
        (places,) = asked.devices.values()
        self.wanted.append(list(places))
        read = msgspec.structs.replace(asked, devices={name: [HOST] for name in asked.devices})
        (placed,) = await super().read(read, fds, on_loading)
        await self.may_end.wait()
        copies = [Placed(place, placed.version, os.dup(placed.fd)) for place in places]
        os.close(placed.fd)
        return copies


@pytest.mark.parametrize(
    ("begin", "copies", "asked", "wanted", "kept"),
    [
        (0, False, 1, [[GPU]], [GPU]),
        (0, False, 2, [[GPU], [HOST]], [HOST]),
        (0, True, 2, [[GPU, HOST]], [HOST]),
        (2, True, 3, [[HOST]], [HOST]),
        (2, True, 0, [[HOST], [GPU, HOST]], [GPU, HOST]),
    ],
)
async def test_where_a_gpu_needs_them(
    crew: GpuCrew,
    wait_until: Wait,
    begin: MemoryLevel,
    copies: bool,
    asked: MemoryLevel,
    wanted: list[list[str]],
    kept: list[str],
) -> None:
    """The level is changed while new weights are read. They are read once more if they are not where they are needed
    then, and are kept only where they are."""
    host = Host(crew, SystemParams(memory_level=begin))
    if copies:
        await host.levels.copies.ensure()
    await host.levels.change(begin, None)
    host.reloader._loader = loader = GpuLoader()
    components = open_components(crew.model, SystemParams(), SECOND, ["transformer"])
    reload = asyncio.create_task(host.reloader.carry_out(Order(components, "revision-2", "drain")))
    await wait_until(lambda: loader.wanted or reload.done(), "the reading")
    await host.levels.change(asked, None)
    assert crew.plans.held[GPU].level == asked and not reload.done()
    loader.may_end.set()
    content = (await reload).weights["transformer"]
    assert loader.wanted == wanted
    places = [placed.device for placed in crew.placed if placed.version.content == content]
    assert sorted(places) == sorted(kept)
    assert crew.weights.serving["transformer"] == content
    await host.reloader.end()
    await host.levels.end()
