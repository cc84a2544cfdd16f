"""Which stages share a process changes while requests run: all old processes leave, and all new ones begin."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from engine import Supervisor, SystemParams
from engine.client import Client
from engine.models import CONFIGS
from engine.process import StageProcess
from engine.successor import successor
from ipc.errors import BadConfig, StageFailed
from ipc.messages.names import Placement
from ipc.messages.stage import Stop
from tests.conftest import Video, until
from tests.engine.test_replace import ask, denoising, pids, restarts
from tests.engine.wire import EngineProcess, run_engine, wait_for

SHORT = {"steps": 8, "num_frames": 17, "height": 32, "width": 32}


def processes(supervisor: Supervisor) -> int:
    """That serve; each is up."""
    stages = supervisor.status().stages
    assert {stage.state for stage in stages} == {"up"}
    return len({stage.pid for stage in stages})


def tokens(supervisor: Supervisor) -> set[str | None]:
    """What the scheduler has the stages take turns by."""
    return set(supervisor._scheduler._capacity.devices.values())


async def test_it_changes_under_a_request(tmp_path: Path) -> None:
    """To one process and back, with the files of the weights gone: all is mapped from memory. The frames are those of
    an undisturbed run; the old processes are gone; what was asked for is no restart, and a death is still one of all
    that shared the process."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("revision-2"))
    async with Supervisor(SystemParams(device="cpu", checkpoint=str(tmp_path / "demo"))) as supervisor:
        golden = Video((await supervisor.generate(ask(tmp_path / "calm.mp4"))).path).sha256
        for folder in ("transformer", "vae", "text_encoder"):
            shutil.rmtree(tmp_path / "demo" / folder)
        held, before = [(h.name, h.generation) for h in supervisor.memory()], tokens(supervisor)
        kinds: tuple[tuple[Placement, int], ...] = (("fused", 1), ("split", 4))
        for placement, count in kinds:
            running = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4")))
            await until(lambda: denoising(supervisor, 3), "the third step")
            old = pids(supervisor)
            replaced = await supervisor.replace_stages(placement=placement)
            assert processes(supervisor) == count
            assert replaced.pids == pids(supervisor) and not set(replaced.pids.values()) & set(old.values())
            assert all(not Path(f"/proc/{pid}").exists() for pid in old.values())
            assert not running.done(), "the request was still there"
            done = await asyncio.wait_for(running, 120)
            assert Video(done.path).sha256 == golden
            assert "compute_changes" not in done.metadata, "no result depends on it"
            assert [(h.name, h.generation) for h in supervisor.memory()] == held
            assert restarts(supervisor) == dict.fromkeys(old, 0)
            assert not supervisor.check_integrity()
            assert tokens(supervisor) == ({"process"} if placement == "fused" else before)
            spans = [span for span in supervisor.trace().spans if span.task == done.id]
            assert {span.device for span in spans} > {"process", "cpu:dit"}, "before and after"
        await supervisor.replace_stages(placement="fused")
        os.kill(pids(supervisor)["dit"] or 0, signal.SIGKILL)
        await until(lambda: set(restarts(supervisor).values()) == {1}, "all to be started again")
        await supervisor.ready()
        assert processes(supervisor) == 1
        assert Video((await supervisor.generate(ask(tmp_path / "v.mp4"))).path).sha256 == golden


async def test_many_changes_under_a_queue(tmp_path: Path) -> None:
    """Six in a row, with requests in every stage: none fails, each has the frames of an undisturbed run."""
    async with Supervisor(SystemParams(device="cpu")) as supervisor:
        golden = Video((await supervisor.generate(ask(tmp_path / "calm.mp4", **SHORT))).path).sha256
        done: list[Path] = []
        ended = asyncio.Event()

        async def client(number: int) -> None:
            while not ended.is_set():
                path = tmp_path / f"{number}-{len(done)}.mp4"
                await supervisor.generate(ask(path, **SHORT))
                done.append(path)

        clients = [asyncio.create_task(client(number)) for number in range(4)]
        for placement in ("fused", "split") * 3:
            await supervisor.replace_stages(placement=placement)
            assert processes(supervisor) == (1 if placement == "fused" else 4)
            many = len(done)
            await until(lambda many=many: len(done) > many, "a request is done")  # type: ignore[misc]
        ended.set()
        await asyncio.wait_for(asyncio.gather(*clients), 120)
        assert {Video(path).sha256 for path in done} == {golden}
        assert not supervisor.check_integrity()


async def test_one_that_is_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processes that are to take the place of one, the third is not fit: the one goes on, and the others that
    were tried are gone."""
    tried: list[Any] = []

    async def third_fails(*asked: Any) -> Any:
        if len(tried) == 2:
            raise StageFailed("it is not fit")
        tried.append(await successor(*asked))
        return tried[-1]

    async with Supervisor(SystemParams(device="cpu", placement="fused")) as supervisor:
        await supervisor.ready()
        before = pids(supervisor)
        with monkeypatch.context() as patched:
            patched.setattr("engine.takeover.successor", third_fails)
            with pytest.raises(StageFailed, match="it is not fit"):
                await supervisor.replace_stages(placement="split")
        assert len(tried) == 2 and not any(body.lives() for body in tried)
        assert pids(supervisor) == before and tokens(supervisor) == {"process"}
        assert not supervisor.is_reloading
        await supervisor.replace_stages(placement="split")
        assert processes(supervisor) == 4


async def test_several_dits_share_no_process() -> None:
    async with Supervisor(SystemParams(dit_devices=("cpu", "cpu"), threads=1)) as supervisor:
        await supervisor.ready()
        before = pids(supervisor)
        with pytest.raises(BadConfig, match=r"placement fused is one process with one dit .* use placement split"):
            await supervisor.replace_stages(placement="fused")
        assert pids(supervisor) == before
        await supervisor.replace_stages(placement="split")
        assert processes(supervisor) == 5


@pytest.mark.parametrize("who", ["old", "new", "asker"])
async def test_faults_while_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """One of the old processes, or the new one, is killed when the old ones have been asked to leave, or who asked goes
    away: the new placement is there in the end, and the request has its frames."""
    async with Supervisor(SystemParams(device="cpu")) as supervisor:
        golden = Video((await supervisor.generate(ask(tmp_path / "calm.mp4"))).path).sha256
        running = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4")))
        await until(lambda: denoising(supervisor, 3), "the third step")
        leaving = asyncio.Event()
        send, start = StageProcess.send, StageProcess.__init__

        def send_and_tell(self: StageProcess, message: Any, fds: Any = ()) -> None:
            send(self, message, fds)
            if isinstance(message, Stop):
                leaving.set()

        def kill_and_begin(self: StageProcess, body: Any, *arguments: Any) -> None:
            body.popen.kill()
            monkeypatch.undo()
            start(self, body, *arguments)

        monkeypatch.setattr(StageProcess, "send", send_and_tell)
        if who == "new":  # it has proved itself, and is dead when it is to take over
            monkeypatch.setattr(StageProcess, "__init__", kill_and_begin)
        asked = asyncio.create_task(supervisor.replace_stages(placement="fused"))
        await asyncio.wait_for(leaving.wait(), 60)
        if who == "old":
            os.kill(pids(supervisor)["vae"] or 0, signal.SIGKILL)
        elif who == "asker":
            asked.cancel()
        await asyncio.wait([asked])
        await until(lambda: not supervisor.is_reloading and len(set(pids(supervisor).values())) == 1, "one process")
        await supervisor.ready()
        assert Video((await asyncio.wait_for(running, 120)).path).sha256 == golden
        assert processes(supervisor) == 1 and tokens(supervisor) == {"process"}
        assert not supervisor.check_integrity()


async def test_idle_processes_that_do_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has stopped one: it is killed after a while, and what comes takes its place, alone or with all."""
    monkeypatch.setattr("engine.watch.LEAVE_GRACE", 1.0)
    async with Supervisor(SystemParams(device="cpu")) as supervisor:
        golden = Video((await supervisor.generate(ask(tmp_path / "calm.mp4", **SHORT))).path).sha256
        for stages, placement in ((["writer"], None), ([], "fused")):
            old = pids(supervisor)["writer"]
            assert old is not None
            os.kill(old, signal.SIGSTOP)
            asked = supervisor.replace_stages(stages, placement=placement)  # type: ignore[arg-type]
            replaced = await asyncio.wait_for(asked, 60)
            assert replaced.pids["writer"] not in (None, old)
        assert Video((await supervisor.generate(ask(tmp_path / "v.mp4", **SHORT))).path).sha256 == golden


def test_the_command_line_and_the_next_program(short_dir: Path) -> None:
    """`engine reload --placement` changes it, and a change of programs keeps it."""
    with EngineProcess(short_dir, "--threads", "1") as engine:
        engine.wait_ready()
        client = Client(engine.socket)
        ran = run_engine("reload", "--socket", engine.socket, "--placement", "fused")
        assert ran.returncode == 0, ran.stderr
        (pid,) = {stage.pid for stage in client.status().stages}
        assert [line.split(":")[0] for line in ran.stdout.splitlines()] == ["text", "dit", "vae", "writer"]
        assert all(f"process {pid}, " in line for line in ran.stdout.splitlines())
        client.reload_supervisor()
        assert {stage.pid for stage in client.status().stages} == {pid}
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: {stage.pid for stage in client.status().stages} not in ({pid}, {None}), "a new process")
        assert len({stage.pid for stage in client.status().stages}) == 1
        client.replace_stages(placement="split")
        client.reload_supervisor()
        assert len({stage.pid for stage in client.status().stages}) == 4
