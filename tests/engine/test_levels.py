"""Memory levels on the whole engine, with the model that ships: they change while requests run, by hand and because
memory is short, and what cannot change stays as it was. What the stages do at a level is tested in `tests/stages`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine import Client, Supervisor, process
from engine.amounts import size
from ipc.errors import OutOfMemory
from ipc.messages.memory import MemoryPlan
from ipc.messages.server import Progress
from tests.engine.reloading import ask, denoising, engine, order, video
from tests.engine.wire import EngineProcess

Wait = Callable[..., Awaitable[None]]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `levels_worker` is told what to be short of."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.levels_worker")
    monkeypatch.setenv("LEVELS", str(tmp_path))
    return tmp_path


def plan(supervisor: Supervisor) -> MemoryPlan:
    (device,) = supervisor.memory_levels()
    return device.plan


async def test_levels_change_while_a_request_runs(said: Path, wait_until: Wait) -> None:
    """Every level in turn during one request: each holds when `change_memory` returns, is in the status, in the trace
    and in the request's events, and the frames are those of an undisturbed run."""
    async with engine() as supervisor:
        calm = await video(supervisor, said / "calm.mp4", steps=30)
        accepted = await supervisor.submit(ask(said / "v.mp4", steps=30))
        heard: list[int] = []

        async def listen() -> None:
            async for event in supervisor.events(accepted.id):
                if isinstance(event, Progress) and event.phase == "denoise":
                    heard.append(event.memory_level)

        listening = asyncio.create_task(listen())
        await wait_until(lambda: denoising(supervisor, 1), "denoising")
        for wanted in (2, 3, 1, 3, 0):
            (device,) = await supervisor.change_memory(wanted, 1 if wanted == 3 else None)
            blocks = 1 if wanted == 3 else None
            assert device.plan == plan(supervisor) == MemoryPlan(level=wanted, blocks=blocks)
            assert device.mode == "fixed" and device.last is not None and device.last.error is None
            await asyncio.sleep(0)
        await listening
        assert (await supervisor.result(accepted.id)).path == str(said / "v.mp4")
        changes = supervisor.trace().changes
        assert [(c.before.level, c.after.level) for c in changes] == [(0, 2), (2, 3), (3, 1), (1, 3), (3, 0)]
        assert {2, 3} <= set(heard)
        assert await video(supervisor, said / "w.mp4", steps=30) == calm


async def test_a_step_that_lacks_memory_fails_where_the_level_is_fixed(said: Path) -> None:
    """On a CPU auto is level 0, and stays there: the request fails with a typed error, the next one does not."""
    async with engine() as supervisor:
        (said / "short").write_text("2")
        with pytest.raises(OutOfMemory, match="the dit stage ran out of memory"):
            await video(supervisor, said / "v.mp4")
        await supervisor.change_memory(2)
        await video(supervisor, said / "v.mp4")
        (device,) = await supervisor.change_memory("auto")
        assert (device.plan, device.mode) == (MemoryPlan(), "auto")


async def test_pages_that_could_not_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    """Every process says so of what it maps: the status has it, with all bytes and what to change; requests are done,
    as ever. It is true of a process that takes the place of one that died, and of new weights, not of those that were
    let go of."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.unlocked_worker")
    async with engine() as supervisor:

        def unlocked() -> int:
            (device,) = supervisor.memory_levels()
            found = supervisor._crew.upkeep.unlocked("cpu")
            assert (found is None) == (device.slow == "")
            if found is None:
                return 0
            assert device.slow.startswith(
                f"the pages of {size(found.bytes)} of weights in host memory cannot be locked"
            )
            assert "(CUDA error 2)" in device.slow and "ulimit -l" in device.slow
            return found.bytes

        def in_memory() -> int:
            return sum(holding.bytes for holding in supervisor.memory() if holding.state == "placed")

        assert unlocked() == in_memory() > 0
        await video(supervisor, tmp_path / "v.mp4")
        killed = supervisor.status().stages[2]
        assert killed.name == "vae" and killed.pid is not None
        os.kill(killed.pid, signal.SIGKILL)
        await wait_until(lambda: unlocked() < in_memory(), "the end of the vae")
        await wait_until(lambda: unlocked() == in_memory(), "its successor")
        await supervisor.reload(order())
        await video(supervisor, tmp_path / "v.mp4")
        await wait_until(lambda: unlocked() == in_memory(), "the end of the old version")
        known = {version for each in supervisor._crew._posts.processes() for version in each.unlocked}
        assert known == {(h.name, h.generation) for h in supervisor.memory() if h.state == "placed"}


def let_choose(supervisor: Supervisor) -> None:
    """As on a GPU: the level may rise."""
    (level,) = supervisor._levels._devices.values()
    supervisor._levels._let_choose(level)
    supervisor._levels._announce(level)


async def test_a_step_that_lacks_memory_is_tried_at_the_next_levels(said: Path) -> None:
    """The dit's steps fit from level 2 on: the request goes up there, one level after the other, from the step that it
    was at, and the frames are the same; the next request finds the level as it is. When the next level is refused, the
    request fails with what the stage said, and the level is as before."""
    async with engine() as supervisor:
        calm = await video(supervisor, said / "calm.mp4")
        let_choose(supervisor)
        (said / "short").write_text("2")
        assert await video(supervisor, said / "v.mp4") == calm
        assert [(c.before.level, c.after.level, c.why) for c in supervisor.trace().changes] == [
            (0, 1, "the dit stage ran out of memory"), (1, 2, "the dit stage ran out of memory")
        ]  # fmt: skip
        failed = sum(span.failed for span in supervisor.trace().spans)
        assert await video(supervisor, said / "v.mp4") == calm
        assert sum(span.failed for span in supervisor.trace().spans) == failed, "it began at level 2"
        (said / "short").write_text("3")
        (said / "refuse").write_text("3")
        with pytest.raises(OutOfMemory, match="the dit stage ran out of memory"):
            await video(supervisor, said / "v.mp4")
        assert plan(supervisor) == MemoryPlan(level=2)


async def test_a_step_that_fits_at_no_level(said: Path) -> None:
    """It is tried at each, and fails then; the engine goes on, at what leaves the most room."""
    async with engine() as supervisor:
        calm = await video(supervisor, said / "calm.mp4")
        let_choose(supervisor)
        (said / "short").write_text("4")
        with pytest.raises(OutOfMemory):
            await video(supervisor, said / "v.mp4")
        assert plan(supervisor) == MemoryPlan(level=3, blocks=0)
        (said / "short").unlink()
        assert await video(supervisor, said / "v.mp4") == calm


async def test_a_change_that_one_process_refuses(said: Path) -> None:
    """It does not hold for any: the plan before does, `last` and the trace say why, and requests go on."""
    async with engine() as supervisor:
        await supervisor.change_memory(2)
        (said / "refuse").write_text("3")
        with pytest.raises(OutOfMemory):
            await supervisor.change_memory(3)
        (device,) = supervisor.memory_levels()
        assert device.plan == MemoryPlan(level=2)
        assert device.last is not None and device.last.error is not None and device.last.error.code == "out_of_memory"
        assert supervisor.trace().changes[-1] == device.last
        await video(supervisor, said / "v.mp4")
        (said / "refuse").unlink()
        assert (await supervisor.change_memory(3))[0].plan.level == 3


async def test_a_process_that_dies_of_a_change(said: Path, wait_until: Wait) -> None:
    """In the middle of a request: its successor begins with the new plan, the change is carried out, and the frames are
    the same."""
    async with engine() as supervisor:
        calm = await video(supervisor, said / "calm.mp4", steps=20)
        running = asyncio.create_task(video(supervisor, said / "v.mp4", steps=20))
        await wait_until(lambda: denoising(supervisor, 2), "denoising")
        (said / "die").write_text("2")
        (device,) = await supervisor.change_memory(2)
        assert device.plan == MemoryPlan(level=2) and not (said / "die").exists()
        assert sum(stage.restarts for stage in supervisor.status().stages) == 1
        assert await running == calm


async def test_an_engine_that_starts_with_a_level(said: Path) -> None:
    """It is in the status at once, its processes come up with it, and a killed one comes back with it."""
    async with engine(memory_level=3) as supervisor:
        (device,) = supervisor.memory_levels()
        assert device.plan == MemoryPlan(level=3, blocks=0) and device.mode == "fixed" and device.last is None
        assert device.copies.state == "complete"
        first = await video(supervisor, said / "v.mp4")
        for stage in supervisor.status().stages:
            if stage.name in ("text", "dit", "vae") and stage.pid is not None:
                os.kill(stage.pid, signal.SIGKILL)
        assert await video(supervisor, said / "v.mp4") == first


async def test_a_reload_at_a_level(said: Path) -> None:
    """New weights at level 2 and back to level 0: what is made with them is the same."""
    async with engine() as supervisor:
        await supervisor.change_memory(2)
        await supervisor.reload(order())
        second = await video(supervisor, said / "v.mp4")
        await supervisor.change_memory(0)
        assert await video(supervisor, said / "v.mp4") == second
        await supervisor.rollback()
        assert await video(supervisor, said / "v.mp4") != second


def test_the_next_program_keeps_the_level(short_dir: Path) -> None:
    """`engine serve --memory-level 2`, then 3 by hand, then `engine reload --supervisor`: plan, mode, last change and
    trace are as before, and it can be changed again."""
    with EngineProcess(short_dir, "--memory-level", "2") as served:
        served.wait_ready()
        client = Client(served.socket)
        assert client.memory_levels()[0].plan == MemoryPlan(level=2)
        before = client.change_memory(3, 1)
        client.reload_supervisor()
        assert client.memory_levels() == before
        assert [change.after.level for change in client.trace().changes] == [3]
        done = client.generate(prompt="a red circle", steps=2, num_frames=5, output=str(short_dir / "v.mp4"))
        assert Path(done.path).exists()
        (device,) = client.change_memory("auto")
        assert (device.plan, device.mode) == (MemoryPlan(), "auto")
