"""Stage processes are forked from one that has torch loaded; without it they are fresh interpreters."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import select
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine import Supervisor, SystemParams, UserParams, forks, process
from ipc.errors import BadConfig
from ipc.messages.names import Seat
from tools.load import children

pytestmark = pytest.mark.usefixtures("fresh_interpreters")

Wait = Callable[..., Awaitable[None]]


def ask(path: Path) -> UserParams:
    return UserParams(prompt="a red circle moves left", seed=3, steps=12, output=str(path))


def pids(supervisor: Supervisor) -> dict[Seat, int | None]:
    return {stage.name: stage.pid for stage in supervisor.status().stages}


def takes_orphans() -> bool:
    on = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(forks.PR_GET_CHILD_SUBREAPER, ctypes.byref(on), 0, 0, 0) == 0
    return bool(on.value)


def interpreter_of(pid: int) -> int:
    """The first address of the stack, which a fork inherits and a fresh interpreter draws at random."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[25])


async def kill_source(supervisor: Supervisor, wait_until: Wait) -> None:
    """The process that stages are forked from is dead, and none is in its place yet."""
    os.kill(supervisor.status().forks_pid or 0, signal.SIGKILL)
    await wait_until(lambda: supervisor.status().forks_pid is None, "the death to be heard of")


async def killed_in_the_middle(supervisor: Supervisor, wait_until: Wait, path: Path, *signals: tuple[int, int]) -> None:
    """A request, during whose denoising these signals are sent to these processes; it is done all the same."""
    task = asyncio.create_task(supervisor.generate(ask(path)))
    await wait_until(lambda: any(t.step >= 2 for t in supervisor.tasks() if t.state == "running"), "denoising")
    for pid, number in signals:
        os.kill(pid, number)
    await asyncio.wait_for(task, 120)


async def test_stages_are_forked_and_are_children_of_the_supervisor(
    tmp_path: Path, read_video: Any, wait_until: Wait
) -> None:
    """All four are forks of one process and children of this one, which takes no other orphans. The dit that is killed
    in the middle of a request comes back as a fork, with the same frames; nobody is left."""
    before = set(children(os.getpid()))
    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.ready()
        source = supervisor.status().forks_pid
        assert source is not None
        stages = pids(supervisor)
        assert set(children(os.getpid())) - before == {source, *stages.values()}
        assert not takes_orphans()
        await supervisor.generate(ask(tmp_path / "calm.mp4"))
        await killed_in_the_middle(supervisor, wait_until, tmp_path / "v.mp4", (stages["dit"] or 0, signal.SIGKILL))
        again = pids(supervisor)
        assert again["dit"] != stages["dit"]
        assert {interpreter_of(pid or 0) for pid in again.values()} == {interpreter_of(source)}
        assert supervisor.status().forks_pid == source
    assert set(children(os.getpid())) == before
    assert read_video(tmp_path / "v.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_source_that_is_killed_or_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait, sent: signal.Signals
) -> None:
    """The process that stages are forked from is killed, or stopped, together with the dit: the dit comes back, in a
    fork of another one or as a fresh interpreter, and nobody is left."""
    monkeypatch.setattr(forks, "FORK_TIMEOUT", 0.5)
    before = set(children(os.getpid()))
    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.ready()
        source, dit = supervisor.status().forks_pid, pids(supervisor)["dit"]
        assert source is not None and dit is not None
        await killed_in_the_middle(supervisor, wait_until, tmp_path / "v.mp4", (source, sent), (dit, signal.SIGKILL))
        assert supervisor.status().forks_pid != source
    assert set(children(os.getpid())) == before


async def test_stages_that_cannot_be_forked_are_fresh_interpreters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process to fork from ends before it is ready: the log says so, once, and the engine serves without it."""
    monkeypatch.setattr(process, "WORKER", "tests.engine.unforkable_worker")
    with caplog.at_level(logging.WARNING):
        async with Supervisor(SystemParams()) as supervisor:
            await supervisor.generate(ask(tmp_path / "v.mp4"))
            assert supervisor.status().forks_pid is None
            assert len({interpreter_of(pid or 0) for pid in pids(supervisor).values()}) == 4
    assert [record.message for record in caplog.records if "exit code 7" in record.message] != []
    assert (tmp_path / "v.mp4").is_file()


async def test_a_source_that_hangs_while_it_loads(caplog: pytest.LogCaptureFixture) -> None:
    """Stopped before it is ready: when the start deadline has passed it is ended, and the stages come up without it."""
    async with Supervisor(SystemParams(placement="fused", start_deadline=10.0)) as supervisor:
        source = supervisor.status().forks_pid
        assert source is not None and set(pids(supervisor).values()) == {None}
        os.kill(source, signal.SIGSTOP)
        await asyncio.wait_for(supervisor.ready(), 120)
        assert supervisor.status().forks_pid is None
    assert [record.message for record in caplog.records if "ended (SIGKILL) before" in record.message] != []


async def test_replaced_stages_come_from_the_code_on_the_disk(wait_until: Wait) -> None:
    """`reload --stage`: the new process is a fresh interpreter, and so is what later ones are forked from, which is
    loaded at once: the first death after it is as quick as others. With settings that cannot be, it changes nothing."""
    async with Supervisor(SystemParams(placement="fused")) as supervisor:
        await supervisor.ready()
        source = supervisor.status().forks_pid
        with pytest.raises(BadConfig):
            await supervisor.replace_stages(["dit"], threads=-1)
        assert supervisor.status().forks_pid == source
        await supervisor.replace_stages(["dit"])
        (replaced,) = set(pids(supervisor).values())
        assert replaced is not None and source is not None
        renewed = supervisor.status().forks_pid
        assert renewed not in (None, source)
        os.kill(replaced, signal.SIGKILL)
        await wait_until(lambda: replaced not in pids(supervisor).values(), "the death to be heard of")
        await supervisor.ready()
        (again,) = set(pids(supervisor).values())
        assert again is not None and renewed is not None
        assert supervisor.status().forks_pid == renewed
        assert interpreter_of(again) == interpreter_of(renewed)


async def test_what_is_further_than_a_fork_does_not_wait_for_one(wait_until: Wait) -> None:
    """Without a process to fork from: one that has proved itself takes over without one being loaded; the spare takes
    the place of a stage that died while one is."""
    async with Supervisor(SystemParams(placement="fused", warm_spare=True)) as supervisor:
        await supervisor.ready()
        await kill_source(supervisor, wait_until)
        (before,) = set(pids(supervisor).values())
        replacing, seen = asyncio.create_task(supervisor.replace_stages(["dit"])), set()
        while not replacing.done():
            status = supervisor.status()
            if any(stage.state != "up" or stage.pid == before for stage in status.stages):
                seen.add(status.forks_pid)
            await asyncio.sleep(0.01)
        await replacing
        assert seen == {None}
        await wait_until(lambda: supervisor.status().spare_pid is not None, "a spare")
        spare, (stage,) = supervisor.status().spare_pid, set(pids(supervisor).values())
        await kill_source(supervisor, wait_until)
        os.kill(stage or 0, signal.SIGKILL)
        await wait_until(lambda: supervisor.status().forks_pid is not None, "another to fork from")
        os.kill(supervisor.status().forks_pid or 0, signal.SIGSTOP)
        await asyncio.wait_for(supervisor.ready(), 30)
        assert set(pids(supervisor).values()) == {spare}


async def test_a_source_that_is_renewed_while_a_stage_waits_for_it(wait_until: Wait) -> None:
    """The writer has died and waits for a process to fork it from, when a replacement of the dit is given up, after
    which that process is of no use any more: the writer comes up with another one."""
    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.ready()
        await kill_source(supervisor, wait_until)
        replacing = asyncio.create_task(supervisor.replace_stages(["dit"]))
        os.kill(pids(supervisor)["writer"] or 0, signal.SIGKILL)
        await wait_until(lambda: supervisor.status().forks_pid is not None, "another to fork from")
        loading = supervisor.status().forks_pid
        replacing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await replacing
        await asyncio.wait_for(supervisor.ready(), 60)
        assert supervisor.status().forks_pid != loading


async def test_a_kill_while_it_loads_says_nothing_of_it(wait_until: Wait, caplog: pytest.LogCaptureFixture) -> None:
    """A host in a hurry: nobody is told of the stages to come, as none come."""
    async with Supervisor(SystemParams(placement="fused")) as supervisor:
        source = supervisor.status().forks_pid
        assert source is not None
        pidfd = os.pidfd_open(source)
        supervisor.kill()
        await wait_until(lambda: select.select([pidfd], [], [], 0)[0] != [], "its end")
        os.close(pidfd)
        await asyncio.sleep(0)  # who listens to the same hears of it now
    assert [record.message for record in caplog.records if "fork" in record.message] == []


@pytest.mark.parametrize("before", [False, True])
def test_a_host_that_takes_orphans_goes_on_to(before: bool) -> None:
    """It is for the host to say what becomes of its other descendants."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(forks.PR_SET_CHILD_SUBREAPER, int(before), 0, 0, 0) == 0
    try:
        with forks.taking_orphans():
            assert takes_orphans()
        assert takes_orphans() == before
    finally:
        prctl(forks.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
