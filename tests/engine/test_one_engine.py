"""Requests on one engine with the model that ships: real stage processes, real videos, real deaths. Each test leaves
the engine as it found it, or with a stage restarted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine import Supervisor, SystemParams
from ipc.errors import BadRequest, Cancelled, DeadlineExceeded, NotFound
from ipc.messages.names import StageName
from ipc.messages.server import Done, Progress
from ipc.messages.status import TaskInfo
from tests.engine.test_supervisor import PROMPT, ask, clean, pid_of

Wait = Callable[..., Awaitable[None]]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def supervisor() -> AsyncIterator[Supervisor]:
    async with Supervisor(SystemParams()) as supervisor:
        yield supervisor


def quanta(supervisor: Supervisor) -> int:
    """Denoising steps that were run so far."""
    return next(stage.quanta for stage in supervisor.status().stages if stage.name == "dit")


def newest(supervisor: Supervisor) -> TaskInfo:
    return supervisor.tasks()[-1]


async def test_a_prompt_becomes_a_video(
    supervisor: Supervisor, tmp_path: Path, read_video: Any, wait_until: Wait
) -> None:
    """One request: progress through every phase, an H.264 yuv420p file with the metadata inside and beside it, and
    nothing left behind."""
    accepted = await supervisor.submit(ask(tmp_path / "v.mp4", metadata_json=True))
    events = [event async for event in supervisor.events(accepted.id)]
    await wait_until(lambda: clean(supervisor), "giving every slot back")
    phases = [event.phase for event in events if isinstance(event, Progress)]
    assert {"denoise"} <= set(phases)
    done = events[-1]
    assert isinstance(done, Done)
    video = read_video(done.path)
    assert (video.codec, video.pixel_format, video.fps) == ("h264", "yuv420p", 8)
    assert video.frames.shape == (17, 96, 96, 3)
    inside = json.loads(video.metadata["comment"])
    assert inside["parameters"]["prompt"] == PROMPT
    assert inside["seed"] == 3
    assert set(inside["weights"]) == {"text_encoder", "transformer", "vae"}
    assert set(inside["seconds"]) >= {"text", "denoise", "decode"}
    assert json.loads((tmp_path / "v.json").read_text()) == inside == done.metadata
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.json", "v.mp4"]


async def test_placement_does_not_change_a_byte(supervisor: Supervisor, tmp_path: Path, read_video: Any) -> None:
    """The same seed in split and in fused placement, alone and between other requests: identical frames."""
    names = ["a", "b", "c"]
    await asyncio.gather(*(supervisor.generate(ask(tmp_path / f"{n}.mp4", seed=i)) for i, n in enumerate(names)))
    async with Supervisor(SystemParams(placement="fused")) as fused:
        await fused.generate(ask(tmp_path / "fused.mp4", seed=1))
    assert read_video(tmp_path / "b.mp4").sha256 == read_video(tmp_path / "fused.mp4").sha256
    assert read_video(tmp_path / "a.mp4").sha256 != read_video(tmp_path / "b.mp4").sha256


@pytest.mark.parametrize("stage", ["text", "dit", "vae", "writer"])
async def test_a_killed_stage_costs_nothing_but_time(
    supervisor: Supervisor, tmp_path: Path, read_video: Any, wait_until: Wait, stage: StageName
) -> None:
    """SIGKILL of a stage while three requests are under way: it comes back, all three finish, frames as undisturbed."""
    before = {s.name: s.restarts for s in supervisor.status().stages}
    await supervisor.generate(ask(tmp_path / "calm.mp4", seed=1))
    tasks = [asyncio.create_task(supervisor.generate(ask(tmp_path / f"{i}.mp4", seed=i))) for i in range(3)]

    def in_the_middle() -> bool:
        return any(t.phase == "denoise" and t.step >= 3 for t in supervisor.tasks() if t.state == "running")

    await wait_until(in_the_middle, "denoising")
    pid = pid_of(supervisor, stage)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    await wait_until(lambda: pid_of(supervisor, stage) not in (pid, None), "the restart")
    await wait_until(lambda: clean(supervisor), "giving every slot back")
    assert {s.name: s.restarts for s in supervisor.status().stages} == {**before, stage: before[stage] + 1}
    assert read_video(tmp_path / "1.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256
    assert not list(tmp_path.glob(".*"))


async def test_cancel_stops_computing_and_gives_everything_back(
    supervisor: Supervisor, tmp_path: Path, wait_until: Wait
) -> None:
    """Cancel in mid-denoising of a 200-step request: its listener hears at once, the dit runs at most two more steps,
    no slot and no file stays."""
    before = quanta(supervisor)
    task = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4", steps=200)))
    await wait_until(lambda: any(t.step >= 3 for t in supervisor.tasks() if t.state == "running"), "denoising")
    steps = newest(supervisor).step
    await supervisor.cancel(newest(supervisor).id)
    with pytest.raises(Cancelled):
        await task
    await wait_until(lambda: clean(supervisor), "giving every slot back")
    assert quanta(supervisor) - before <= steps + 3
    assert newest(supervisor).state == "cancelled"
    with pytest.raises(NotFound):
        await supervisor.cancel("0" * 32)
    assert not list(tmp_path.iterdir())


async def test_cancelling_the_waiting_coroutine_cancels_the_task(
    supervisor: Supervisor, tmp_path: Path, wait_until: Wait
) -> None:
    """The host service cancels its own coroutine: the engine stops working on it."""
    task = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4", steps=500)))
    await wait_until(lambda: any(t.state == "running" for t in supervisor.tasks()), "running")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: newest(supervisor).state == "cancelled", "the cancellation")
    await wait_until(lambda: clean(supervisor), "giving every slot back")


async def test_a_deadline_that_passes(supervisor: Supervisor, tmp_path: Path) -> None:
    """A request that cannot be done in half a second fails with DeadlineExceeded; the next one is served."""
    await supervisor.ready()
    with pytest.raises(DeadlineExceeded):
        await supervisor.generate(ask(tmp_path / "late.mp4", steps=500, deadline=0.5))
    await supervisor.generate(ask(tmp_path / "v.mp4"))
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


async def test_two_requests_do_not_write_one_file(supervisor: Supervisor, tmp_path: Path) -> None:
    """A second request for the output of an unfinished one is refused; after the end the name is free again."""
    accepted = await supervisor.submit(ask(tmp_path / "v.mp4"))
    with pytest.raises(BadRequest, match="another unfinished request"):
        await supervisor.submit(ask(tmp_path / "v.mp4"))
    await supervisor.result(accepted.id)
    await supervisor.generate(ask(tmp_path / "v.mp4"))


async def test_video_to_video(supervisor: Supervisor, tmp_path: Path, read_video: Any) -> None:
    """From a video of a red circle: a small strength with the same prompt keeps it; strength 0.6 with "blue" recolours
    it where it is; strength 1 ignores it."""
    await supervisor.generate(ask(tmp_path / "a.mp4", steps=16))
    source = {"steps": 16, "seed": 5, "video": str(tmp_path / "a.mp4")}
    blue = PROMPT.replace("red", "blue")
    await supervisor.generate(ask(tmp_path / "near.mp4", strength=0.2, **source))
    await supervisor.generate(ask(tmp_path / "blue.mp4", prompt=blue, strength=0.6, **source))
    await supervisor.generate(ask(tmp_path / "free.mp4", prompt=blue, strength=1.0, **source))
    await supervisor.generate(ask(tmp_path / "none.mp4", prompt=blue, steps=16, seed=5))
    frames = {n: read_video(tmp_path / f"{n}.mp4").frames.astype(int) for n in ("a", "near", "blue", "free", "none")}
    assert abs(frames["a"] - frames["near"]).mean() < 2
    red, recoloured = (frames["a"][..., 0] > 128, frames["blue"][..., 2] > 128)
    assert (frames["blue"][red].mean(0)[2]) > 2 * frames["blue"][red].mean(0)[0], "what was red is blue"
    assert (red & recoloured).sum() > 0.5 * (red | recoloured).sum(), "where it was"
    assert abs(frames["free"] - frames["none"]).mean() < 2
