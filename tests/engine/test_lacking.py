"""A stage that was up and finds no memory, thread or process as it is started again: somebody has taken what it had,
and gives it back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine import EngineError, OutOfMemory, Supervisor, SystemParams, UserParams, process
from engine.crew import Crew
from ipc.errors import OutOfProcesses
from ipc.messages.names import Seat

Wait = Callable[..., Awaitable[None]]

ROOT = Path(__file__).parents[2]


def pid(supervisor: Supervisor, seat: Seat) -> int:
    found = next(stage.pid for stage in supervisor.status().stages if stage.name == seat)
    assert found is not None
    return found


@pytest.fixture
def lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stages are to lack, line by line: see `lacking_worker`."""
    file = tmp_path / "lacking"
    file.touch()
    monkeypatch.setattr(process, "WORKER", "tests.engine.lacking_worker")
    monkeypatch.setenv("LACKING", str(file))
    return file


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seat", ["dit", "writer"])
async def test_a_stage_that_was_up_is_tried_again(
    tmp_path: Path,
    lacking: Path,
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seat: Seat,
) -> None:
    """Killed in the middle of a request, it lacks memory twice, then a thread, then a process: the request is finished,
    and the log says each time what was lacking, and what to do about the latter two. Who waits for the engine to be
    ready waits on, whatever is noticed between what the stage says and its end."""
    report = Crew._on_report
    monkeypatch.setattr(Crew, "_on_report", lambda crew, *what: (report(crew, *what), crew._changes.notify())[0])

    async def wait_for_it(supervisor: Supervisor) -> None:
        while True:
            await supervisor.ready()
            await asyncio.sleep(0.01)

    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.ready()
        params = UserParams(prompt="a red circle", steps=60, output=str(tmp_path / "video.mp4"))
        running = asyncio.create_task(supervisor.generate(params))
        await wait_until(lambda: any(t.phase == "denoise" for t in supervisor.tasks()), "denoising")
        lacking.write_text("\n".join(f"{seat} {what}" for what in ("device", "memory", "thread", "fork")))
        os.kill(pid(supervisor, seat), signal.SIGKILL)
        waiting = asyncio.create_task(wait_for_it(supervisor))
        assert Path((await running).path).exists()
        assert not lacking.read_text(), "it lacked all of them"
        assert not waiting.done(), f"ready: {waiting.exception()}"
        waiting.cancel()
        assert not supervisor.check_integrity()
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"{seat} could not start for lack of")]
    assert [line.split(" lack of ")[1].split(" (")[0] for line in said] == 2 * ["memory"] + 2 * ["threads or processes"]
    assert all("ulimit -u" in line and "pids.max" in line for line in said[2:])


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [("device", OutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"), ("thread", OutOfProcesses, "new thread.*ulimit -u")],
)
async def test_an_engine_that_never_had_enough_says_so_at_once(
    lacking: Path, what: str, error: type[EngineError], says: str
) -> None:
    lacking.write_text(f"dit {what}")
    async with Supervisor(SystemParams()) as supervisor:
        with pytest.raises(error, match=says):
            await supervisor.ready()


async def test_what_stages_are_forked_from_is_tried_again_when_they_are_up(
    lacking: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It finds no thread as it loads: the stages are fresh interpreters, and once they are up there is another one."""
    lacking.write_text("forks thread")
    async with Supervisor(SystemParams(placement="fused")) as supervisor:
        first = supervisor.status().forks_pid
        await supervisor.ready()
        assert supervisor.status().forks_pid not in (None, first)
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"process {first} ended" in said and "can't start new thread" in said and "ulimit -u" in said


async def test_a_fork_that_is_refused(
    tmp_path: Path, lacking: Path, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    """The user may have no more processes when the dit is killed in the middle of a request: what stages are forked
    from says so and lives, with no descriptor more than before. When there may be more, the dit comes back from it."""

    def refusals() -> list[str]:
        said = [record.getMessage() for record in caplog.records]
        return [line for line in said if line.startswith("the process for dit could not be started")]

    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.ready()
        source = supervisor.status().forks_pid
        before = os.listdir(f"/proc/{source}/fd")
        params = UserParams(prompt="a red circle", steps=60, output=str(tmp_path / "video.mp4"))
        running = asyncio.create_task(supervisor.generate(params))
        await wait_until(lambda: any(t.phase == "denoise" for t in supervisor.tasks()), "denoising")
        lacking.write_text("forking 0\nforking 1\nforking 0")
        os.kill(pid(supervisor, "dit"), signal.SIGKILL)
        await wait_until(lambda: len(refusals()) == 3, "three refusals")
        assert os.listdir(f"/proc/{source}/fd") == before, "what came with a fork that was refused is closed"
        assert Path((await running).path).exists()
        assert supervisor.status().forks_pid == source
    assert all("Resource temporarily unavailable" in line and "ulimit -u" in line for line in refusals())


FORK = """
import errno, os, resource
from stages.forks import fork
from tests.engine.lacking_worker import NOBODY

os.setresuid(NOBODY, NOBODY, NOBODY)
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
mine = len(os.listdir('/proc/self/task'))
before = os.listdir('/proc/self/fd')
for more in (0, 1, 2):
    resource.setrlimit(resource.RLIMIT_NPROC, (mine + more, hard))
    try:
        pid = fork()
        if pid == 0:
            os._exit(0)
        print('forked')
    except OSError as error:
        print(errno.errorcode[error.errno])
    assert os.listdir('/proc/self/fd') == before
try:
    print('left', os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print('nobody is left')
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be a user who has no other processes")
def test_either_of_the_two_forks_is_refused() -> None:
    """No process, or one, may be added where two are: the system's reason arrives, and nothing is left of the try."""
    ran = subprocess.run(
        [sys.executable, "-c", FORK], cwd=ROOT, text=True, capture_output=True, timeout=60, check=False
    )
    assert ran.stdout.splitlines() == ["EAGAIN", "EAGAIN", "forked", "nobody is left"], ran.stderr
