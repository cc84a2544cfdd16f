"""Memory levels of a whole engine on CUDA, with the model that ships."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine import Supervisor, SystemParams, process
from engine.footprint import need, usual_size
from engine.models import load_model
from engine.starting import LEAST, settings_of
from ipc.errors import OutOfMemory
from ipc.messages.memory import MemoryPlan
from ipc.messages.status import DeviceMemory
from tests.engine.reloading import denoising, order, video
from tools.bench_memory import Gauge, Neighbour

pytestmark = pytest.mark.gpu

Wait = Callable[..., Awaitable[None]]
GPU, HOST = "gpu 0", "host"


def device(supervisor: Supervisor) -> DeviceMemory:
    (found,) = supervisor.memory_levels()
    return found


def where(supervisor: Supervisor) -> set[str]:
    """Places that have weights."""
    return {held.where for held in supervisor.memory() if held.state == "placed"}


async def copied(supervisor: Supervisor, wait_until: Wait) -> None:
    await supervisor.ready()
    await wait_until(lambda: device(supervisor).copies.state == "complete", "copies in host memory")


async def test_every_level_in_the_middle_of_a_request(tmp_path: Path, wait_until: Wait) -> None:
    """An engine that may change its level has the weights in host memory, too, soon after it is up. Then each level
    holds when it was asked for, memory on the GPU is given back and comes back, and the frames are the same."""
    async with Supervisor(SystemParams(device="cuda")) as supervisor:
        calm = await video(supervisor, tmp_path / "calm.mp4", steps=40)
        await copied(supervisor, wait_until)
        assert device(supervisor).levels == [0, 1, 2, 3] and where(supervisor) == {GPU, HOST}
        for wanted in (2, 3, 1, 3, 0, 2, 0):
            running = asyncio.create_task(video(supervisor, tmp_path / "v.mp4", steps=40))
            await wait_until(lambda: denoising(supervisor, 2), "denoising")
            await supervisor.change_memory(wanted, 1 if wanted == 3 else None)
            assert where(supervisor) == ({HOST} if wanted >= 2 else {GPU, HOST})
            assert await running == calm, f"at level {wanted}"
        assert not [change for change in supervisor.trace().changes if change.error is not None]
        assert supervisor.check_integrity() == []


async def test_reloads_and_deaths_at_every_level(tmp_path: Path, wait_until: Wait) -> None:
    """New weights are where the level needs them, and a process that was killed comes back from there."""
    async with Supervisor(SystemParams(device="cuda")) as supervisor:
        await copied(supervisor, wait_until)
        first = await video(supervisor, tmp_path / "v.mp4")
        await supervisor.reload(order())
        second = await video(supervisor, tmp_path / "v.mp4")
        assert first != second
        for level in (2, 0, 3, 1):
            await supervisor.change_memory(level)
            await supervisor.rollback()
            assert await video(supervisor, tmp_path / "v.mp4") == first
            for stage in supervisor.status().stages:
                if stage.pid is not None and stage.name != "writer":
                    os.kill(stage.pid, signal.SIGKILL)
            await supervisor.reload(order())
            assert await video(supervisor, tmp_path / "v.mp4") == second
            assert device(supervisor).copies.state == "complete"


async def test_a_level_is_raised_when_nothing_is_free(tmp_path: Path, wait_until: Wait) -> None:
    """Another program has taken all that was free: to go higher takes no memory, it gives some back."""
    neighbour, gauge = Neighbour(), Gauge()
    try:
        async with Supervisor(SystemParams(device="cuda", memory_level=0)) as supervisor:
            await supervisor.change_memory(2)
            calm = await video(supervisor, tmp_path / "v.mp4")
            await supervisor.change_memory(0)
            await asyncio.to_thread(neighbour.hold, gauge.total)
            for level in (2, 3):
                await supervisor.change_memory(level)
            assert where(supervisor) == {HOST}
            await asyncio.to_thread(neighbour.hold, 0)
            assert await video(supervisor, tmp_path / "v.mp4") == calm
    finally:
        neighbour.end()
        gauge.close()


async def test_a_reload_without_room_goes_through_host_memory(tmp_path: Path, wait_until: Wait) -> None:
    """Nothing is free for another version: the weights leave the GPU, and the new ones are served from the host."""
    neighbour, gauge = Neighbour(), Gauge()
    try:
        async with Supervisor(SystemParams(device="cuda")) as supervisor:
            await copied(supervisor, wait_until)
            first = await video(supervisor, tmp_path / "v.mp4")
            await asyncio.to_thread(neighbour.hold, gauge.total)
            await supervisor.reload(order())
            assert where(supervisor) == {HOST}
            await asyncio.to_thread(neighbour.hold, 0)
            assert await video(supervisor, tmp_path / "v.mp4") != first
            await supervisor.rollback()
            assert await video(supervisor, tmp_path / "v.mp4") == first
    finally:
        neighbour.end()
        gauge.close()


@pytest.mark.parametrize("level", [2, 3])
async def test_an_engine_that_begins_offloaded(tmp_path: Path, level: int) -> None:
    """Its weights never were on the GPU, the frames are the same; at level 0 they are there."""
    async with Supervisor(SystemParams(device="cuda", memory_level=0)) as supervisor:
        calm = await video(supervisor, tmp_path / "v.mp4")
        assert where(supervisor) == {GPU}
    async with Supervisor(SystemParams(device="cuda", memory_level=level)) as supervisor:  # type: ignore[arg-type]
        assert await video(supervisor, tmp_path / "v.mp4") == calm
        assert where(supervisor) == {HOST}
        await supervisor.change_memory(0)
        assert where(supervisor) == {GPU, HOST}
        assert await video(supervisor, tmp_path / "v.mp4") == calm


async def test_a_budget_chooses_the_level(tmp_path: Path) -> None:
    """Just enough for what takes the least: level 3 from the start, and it stays."""
    model, params = load_model("wan-demo"), SystemParams(device="cuda")
    setting = settings_of(params, "cuda:0", ("cuda:0",), queues=False)["cuda:0"]
    budget = need(model, usual_size(model), LEAST, setting).gpu // 2**20 + 1
    if need(model, usual_size(model), MemoryPlan(level=2), setting).gpu <= budget * 2**20:
        pytest.skip("the levels of so small a model take the same to a megabyte")
    async with Supervisor(SystemParams(device="cuda", gpu_budget=f"{budget}MiB")) as supervisor:
        await video(supervisor, tmp_path / "v.mp4")
        assert device(supervisor).plan.level == 3 and device(supervisor).mode == "auto"


async def test_a_step_that_lacks_memory_is_tried_at_the_next_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    """The dit's steps fit from level 2 on, which the first request needs before the copies are there: it waits for
    them, and its frames are those of an engine that has enough. What fits at no level fails."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.levels_worker")
    monkeypatch.setenv("LEVELS", str(tmp_path))
    async with Supervisor(SystemParams(device="cuda", memory_level=0)) as supervisor:
        calm = await video(supervisor, tmp_path / "v.mp4")
    (tmp_path / "short").write_text("2")
    async with Supervisor(SystemParams(device="cuda")) as supervisor:
        assert await video(supervisor, tmp_path / "v.mp4") == calm
        assert [(c.before.level, c.after.level) for c in supervisor.trace().changes][:2] == [(0, 1), (1, 2)]
        (tmp_path / "short").write_text("4")
        with pytest.raises(OutOfMemory):
            await video(supervisor, tmp_path / "v.mp4")
        (tmp_path / "short").unlink()
        assert await video(supervisor, tmp_path / "v.mp4") == calm
