"""A spare process takes the place of a stage that dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Supervisor, SystemParams, UserParams, process, records
from ipc.messages.names import Seat
from tools.load import children

Wait = Callable[..., Awaitable[None]]


def ask(path: Path) -> UserParams:
    return UserParams(prompt="a red circle moves left", seed=3, steps=12, output=str(path))


def pid(supervisor: Supervisor, seat: Seat) -> int | None:
    return next(s.pid for s in supervisor.status().stages if s.name == seat)


def state(supervisor: Supervisor, seat: Seat) -> str:
    return next(s.state for s in supervisor.status().stages if s.name == seat)


async def killed_in_the_middle(supervisor: Supervisor, wait_until: Wait, path: Path, *victims: int | None) -> None:
    """A request, during whose denoising these processes are killed; it is done all the same."""
    task = asyncio.create_task(supervisor.generate(ask(path)))
    await wait_until(lambda: any(t.step >= 2 for t in supervisor.tasks() if t.state == "running"), "denoising")
    for victim in victims:
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
    await asyncio.wait_for(task, 120)


async def test_the_spare_becomes_the_stage_that_died(tmp_path: Path, read_video: Any, wait_until: Wait) -> None:
    """The dit is killed in the middle of a request: the spare is the dit now, another spare comes, the frames are
    those of an undisturbed run. Killed together with the spare, the dit comes back too. Nobody is left at the end."""
    before = set(children(os.getpid()))
    async with Supervisor(SystemParams(warm_spare=True)) as supervisor:
        await supervisor.ready()
        await supervisor.generate(ask(tmp_path / "calm.mp4"))
        spare = supervisor.status().spare_pid
        assert spare is not None
        await killed_in_the_middle(supervisor, wait_until, tmp_path / "spare.mp4", pid(supervisor, "dit"))
        assert pid(supervisor, "dit") == spare
        second = supervisor.status().spare_pid
        assert second not in (None, spare)
        await killed_in_the_middle(supervisor, wait_until, tmp_path / "both.mp4", second, pid(supervisor, "dit"))
        assert pid(supervisor, "dit") not in (spare, second)
        await wait_until(lambda: supervisor.status().spare_pid not in (None, second), "a third spare")
    assert set(children(os.getpid())) == before
    hashes = {read_video(tmp_path / name).sha256 for name in ("calm.mp4", "spare.mp4", "both.mp4")}
    assert len(hashes) == 1


@pytest.mark.timeout(600)
async def test_a_failed_dit_does_not_keep_the_spare_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    """One of two dits dies at every start, the first of them as a spare, until it is FAILED: another spare comes. It
    becomes the other dit when that is killed, and the request is done."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.crashing_worker")
    monkeypatch.setattr(records, "RESTART_DELAYS", (0.0, 0.0))
    monkeypatch.setenv("CRASH", str(tmp_path / "crash"))
    params = SystemParams(dit_devices=("cpu", "cpu"), threads=1, warm_spare=True)
    async with Supervisor(params) as supervisor:
        await supervisor.ready()
        first = supervisor.status().spare_pid
        assert first is not None
        (tmp_path / "crash").touch()
        victim = pid(supervisor, "dit:1")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        await wait_until(lambda: state(supervisor, "dit:1") == "failed", "giving up the dit")
        (tmp_path / "crash").unlink()
        second = supervisor.status().spare_pid
        assert second not in (None, first)
        await killed_in_the_middle(supervisor, wait_until, tmp_path / "v.mp4", pid(supervisor, "dit"))
        assert (pid(supervisor, "dit"), state(supervisor, "dit:1")) == (second, "failed")
        await wait_until(lambda: supervisor.status().spare_pid not in (None, second), "a third spare")


async def test_by_default_there_is_no_spare() -> None:
    """It takes memory: whoever wants it says so."""
    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.ready()
        assert supervisor.status().spare_pid is None
