"""A cancel, or a deadline, when the writer has all frames and dies: how far it was says whether it is too late."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine import Cancelled, DeadlineExceeded, Supervisor, SystemParams, process
from ipc.messages.names import Seat
from tests.engine.reloading import ask

Wait = Callable[..., Awaitable[None]]


def pid(supervisor: Supervisor, seat: Seat) -> int | None:
    return next(stage.pid for stage in supervisor.status().stages if stage.name == seat)


@asynccontextmanager
async def writer_lost(
    supervisor: Supervisor, wait_until: Wait, path: Path, *, in_place: bool, deadline: float | None = None
) -> AsyncIterator[str]:
    """A request whose writer has died with the last frames, before or after it put the file in place, while the vae is
    stopped, so that they are not decoded again until the end of this."""
    await supervisor.ready()
    writer, vae = pid(supervisor, "writer"), pid(supervisor, "vae")
    assert writer is not None and vae is not None
    os.kill(writer, signal.SIGSTOP)
    identity = (await supervisor.submit(ask(path, deadline=deadline))).id

    def decoded() -> bool:
        (task,) = [task for task in supervisor.tasks() if task.id == identity]
        return task.phase == "decode" and task.step == task.steps

    await wait_until(decoded, "the last frame to be decoded")
    os.kill(vae, signal.SIGSTOP)
    try:
        os.kill(writer, signal.SIGCONT if in_place else signal.SIGKILL)
        await wait_until(lambda: pid(supervisor, "writer") not in (None, writer), "another writer")
        yield identity
    finally:
        os.kill(vae, signal.SIGCONT)


async def test_a_cancel_when_the_file_is_not_in_place(tmp_path: Path, wait_until: Wait) -> None:
    """It is cancelled, at once, and nothing is left in the directory; nor with a deadline that passes then."""
    async with Supervisor(SystemParams()) as supervisor:
        async with writer_lost(supervisor, wait_until, tmp_path / "v.mp4", in_place=False) as identity:
            await supervisor.cancel(identity)
            with pytest.raises(Cancelled):
                await asyncio.wait_for(supervisor.result(identity), 1)
        await wait_until(lambda: not len(supervisor._scheduler), "the task to be dropped")
        async with writer_lost(supervisor, wait_until, tmp_path / "w.mp4", in_place=False, deadline=8) as identity:
            with pytest.raises(DeadlineExceeded):
                await asyncio.wait_for(supervisor.result(identity), 30)
        await wait_until(lambda: not len(supervisor._scheduler), "the task to be dropped")
        assert not supervisor.check_integrity()
    assert list(tmp_path.iterdir()) == []


async def test_a_cancel_when_the_file_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_video: Any, wait_until: Wait
) -> None:
    """The writer was killed after it had put the file in place and before it could say so: too late, and the request
    ends well, with the same frames."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.placing_worker")
    monkeypatch.setenv("PLACING", str(tmp_path / "placing"))
    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.generate(ask(tmp_path / "calm.mp4"))
        (tmp_path / "placing").touch()
        async with writer_lost(supervisor, wait_until, tmp_path / "v.mp4", in_place=True) as identity:
            assert (tmp_path / "v.mp4").is_file()
            await supervisor.cancel(identity)
            (task,) = [task for task in supervisor.tasks() if task.id == identity]
            assert task.state == "running"
        await asyncio.wait_for(supervisor.result(identity), 60)
    assert read_video(tmp_path / "v.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256
    assert {path.name for path in tmp_path.iterdir()} == {"calm.mp4", "v.mp4"}
