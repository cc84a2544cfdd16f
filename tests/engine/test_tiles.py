"""Clips in tiles on the whole engine, with the model that ships at memory level 1: a tile in each quantum, so that
progress, cancels, other requests and the watch over hung stages need not wait for a clip."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine import Supervisor, process
from ipc.errors import Cancelled
from ipc.messages.names import Phase
from ipc.messages.server import Progress
from ipc.messages.status import Span
from tests.conftest import Video
from tests.engine.reloading import ask, engine, order, vary, video
from tests.engine.tiles_worker import PARTS, TILE_SECONDS, TILES

Wait = Callable[..., Awaitable[None]]


@pytest.fixture(autouse=True)
def slow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WORKER", "tests.engine.tiles_worker")


def at_step(supervisor: Supervisor, id: str, phase: Phase, step: int) -> bool:
    return any(t.id == id and t.phase == phase and t.step >= step for t in supervisor.tasks())


def spans_of(supervisor: Supervisor, id: str, phase: Phase) -> list[Span]:
    return [span for span in supervisor.trace().spans if (span.task, span.phase) == (id, phase)]


async def test_every_tile_is_progress_and_none_is_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """17 frames are 5 chunks: the client hears of each part, and then of chunks. The clip takes longer than a stage may
    be silent, a tile does not: nothing is restarted. The frames are the untiled ones."""
    async with engine() as supervisor:
        calm = await video(supervisor, tmp_path / "calm.mp4", num_frames=17)
    monkeypatch.setenv("TILE_SECONDS", "1.0")
    async with engine(memory_level=1, stage_deadline=4.0) as supervisor:
        accepted = await supervisor.submit(ask(tmp_path / "v.mp4", num_frames=17))
        heard: list[Progress] = []
        async for event in supervisor.events(accepted.id):
            if isinstance(event, Progress) and event.phase == "decode":
                heard.append(event)
        quanta = spans_of(supervisor, accepted.id, "decode")
        assert sum(span.end - span.begin for span in quanta) > 4.0
        assert {event.steps for event in heard} == {PARTS - 1 + 5}
        steps = [event.step for event in heard]
        assert steps == sorted(steps) and set(range(1, PARTS)) <= set(steps)
        assert all(stage.restarts == 0 for stage in supervisor.status().stages)
        assert Video(tmp_path / "v.mp4").sha256 == calm


async def test_a_cancel_waits_for_one_tile(tmp_path: Path, wait_until: Wait) -> None:
    """In the middle of decoding: what is in hand is done, and no tile after it; the vae has forgotten the task then,
    and decodes the next one."""
    async with engine(memory_level=1) as supervisor:
        accepted = await supervisor.submit(ask(tmp_path / "v.mp4"))
        await wait_until(lambda: at_step(supervisor, accepted.id, "decode", 2), "decoding")
        before = len(spans_of(supervisor, accepted.id, "decode"))
        await supervisor.cancel(accepted.id)
        await wait_until(lambda: accepted.id not in supervisor._scheduler, "dropping")
        assert len(spans_of(supervisor, accepted.id, "decode")) <= before + 1 < TILES
        with pytest.raises(Cancelled):
            await supervisor.result(accepted.id)
        assert not list(tmp_path.iterdir())
        await video(supervisor, tmp_path / "w.mp4")


async def test_an_urgent_request_goes_between_two_tiles(tmp_path: Path, wait_until: Wait) -> None:
    """On one compute token, one of higher priority that comes while another is decoded is denoised at once: tiles of
    the other one come after its last step, as they came before its first, and none between. The frames of the other one
    are the undisturbed ones."""
    async with engine(memory_level=1, placement="fused") as supervisor:
        calm = await video(supervisor, tmp_path / "calm.mp4", num_frames=17)
        accepted = await supervisor.submit(ask(tmp_path / "v.mp4", num_frames=17))
        await wait_until(lambda: at_step(supervisor, accepted.id, "decode", 2), "decoding")
        urgent = await supervisor.submit(ask(tmp_path / "u.mp4", priority=5))
        await supervisor.result(urgent.id)
        await supervisor.result(accepted.id)
        quanta, steps = spans_of(supervisor, accepted.id, "decode"), spans_of(supervisor, urgent.id, "denoise")
        tiles = [span for span in quanta if span.end - span.begin >= TILE_SECONDS]
        before = sum(span.end <= steps[0].begin for span in tiles)
        after = sum(span.begin >= steps[-1].end for span in tiles)
        assert before and after and before + after == TILES
        assert Video(tmp_path / "v.mp4").sha256 == calm


async def test_weights_that_come_between_two_tiles(tmp_path: Path, wait_until: Wait) -> None:
    """Another VAE is to be served at once, for running requests, too, while one is half decoded and another goes first:
    its clip is of the VAE that it was begun with, every tile, and says so."""
    other = vary(tmp_path / "other", seed=1)
    async with engine(memory_level=1, placement="fused") as supervisor:
        await supervisor.reload(order(other, "vae", when="pin"))
        await supervisor.rollback("pin")  # serves the first, and has the other in memory
        calm = await video(supervisor, tmp_path / "calm.mp4")
        accepted = await supervisor.submit(ask(tmp_path / "v.mp4"))
        await wait_until(lambda: at_step(supervisor, accepted.id, "decode", 2), "decoding")
        urgent = await supervisor.submit(ask(tmp_path / "u.mp4", priority=5, steps=1000))
        await wait_until(lambda: at_step(supervisor, urgent.id, "denoise", 1), "denoising")
        served = supervisor.status().weights["vae"]
        await supervisor.rollback("now")
        assert at_step(supervisor, urgent.id, "denoise", 1), "it came in the middle"
        await supervisor.cancel(urgent.id)
        done = await supervisor.result(accepted.id)
        assert done.metadata["weights"]["vae"] == served
        assert Video(tmp_path / "v.mp4").sha256 == calm
        assert await video(supervisor, tmp_path / "w.mp4") != calm


async def test_a_vae_that_is_killed_between_two_tiles(tmp_path: Path, wait_until: Wait) -> None:
    """Its successor begins the clip again, and the frames are the same."""
    async with engine(memory_level=1) as supervisor:
        calm = await video(supervisor, tmp_path / "calm.mp4")
        running = asyncio.create_task(video(supervisor, tmp_path / "v.mp4"))
        await wait_until(lambda: any(t.phase == "decode" and t.step >= 3 for t in supervisor.tasks()), "decoding")
        (vae,) = [stage for stage in supervisor.status().stages if stage.name == "vae"]
        assert vae.pid is not None
        os.kill(vae.pid, signal.SIGKILL)
        assert await running == calm
        (vae,) = [stage for stage in supervisor.status().stages if stage.name == "vae"]
        assert vae.restarts == 1


async def test_an_init_video_is_encoded_tile_by_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    """Video to video: each tile of the encoding is progress; a cancel in the middle is obeyed after one; the next
    request, at a level that changes meanwhile, gives the frames of an undisturbed one."""
    monkeypatch.setenv("TILE_SECONDS", "0.75")
    async with engine(memory_level=1) as supervisor:
        first = await supervisor.generate(ask(tmp_path / "first.mp4"))
        fields = {"video": first.path, "strength": 0.5}
        cancelled = await supervisor.submit(ask(tmp_path / "v.mp4", **fields))
        await wait_until(lambda: at_step(supervisor, cancelled.id, "encode", 2), "encoding")
        before = len(spans_of(supervisor, cancelled.id, "encode"))
        await supervisor.cancel(cancelled.id)
        await wait_until(lambda: cancelled.id not in supervisor._scheduler, "dropping")
        assert len(spans_of(supervisor, cancelled.id, "encode")) <= before + 1 < TILES
        calm = await video(supervisor, tmp_path / "w.mp4", **fields)
        running = asyncio.create_task(video(supervisor, tmp_path / "x.mp4", **fields))
        await wait_until(lambda: any(t.phase == "encode" and t.step >= 2 for t in supervisor.tasks()), "encoding")
        await supervisor.change_memory(3)
        assert any(t.phase == "encode" and t.step < PARTS for t in supervisor.tasks()), "it did not wait for the clip"
        assert await running == calm
