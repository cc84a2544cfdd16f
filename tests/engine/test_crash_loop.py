"""A stage that dies at every start."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine import StageFailed, Supervisor, SystemParams, UserParams, process
from engine.records import RESTART_DELAYS
from ipc.messages.status import StageStatus

Wait = Callable[..., Awaitable[None]]


@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_a_stage_that_dies_at_every_start_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    """The dit is killed in the middle of a request, and every successor dies as it starts: five of them, then it is
    FAILED. The request gets a typed error within a second of that, the next one within a second of its submission; a
    request that is being decoded meanwhile is finished; the other stages are up; the log stays short."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.crashing_worker")
    monkeypatch.setenv("CRASH", str(tmp_path / "crash"))

    def ask(name: str, steps: int) -> UserParams:
        return UserParams(prompt="a red circle", steps=steps, output=str(tmp_path / name))

    def stage(name: str) -> StageStatus:
        return next(s for s in supervisor.status().stages if s.name == name)

    with caplog.at_level(logging.INFO):
        async with Supervisor(SystemParams()) as supervisor:
            await supervisor.ready()
            decoded = asyncio.create_task(supervisor.generate(ask("decoded.mp4", 1)))
            await wait_until(lambda: any(t.phase == "decode" for t in supervisor.tasks()), "decoding")
            denoised = asyncio.create_task(supervisor.generate(ask("lost.mp4", 1000)))
            await wait_until(lambda: any(t.phase == "denoise" for t in supervisor.tasks()), "denoising")
            (tmp_path / "crash").touch()
            pid = stage("dit").pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await wait_until(lambda: stage("dit").state == "failed", "the dit to be given up", 200)
            given_up = time.monotonic()
            with pytest.raises(StageFailed, match=f"dit process died {len(RESTART_DELAYS) + 1} times"):
                await asyncio.wait_for(denoised, 60)
            assert time.monotonic() - given_up < 1
            assert len(RESTART_DELAYS) == 5
            assert stage("dit").restarts == 1 + 5, "the first one replaced what somebody killed, which is no crash"
            began = time.monotonic()
            with pytest.raises(StageFailed):
                await supervisor.generate(ask("late.mp4", 1))
            assert time.monotonic() - began < 1
            await asyncio.wait_for(decoded, 60)
            assert {stage(name).state for name in ("text", "vae", "writer")} == {"up"}
            assert not supervisor.check_integrity()
    assert f"process {pid} of dit died: SIGKILL" in caplog.text
    assert len(caplog.records) < 100
