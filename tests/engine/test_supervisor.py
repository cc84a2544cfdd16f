"""Engines with the model that ships, one per test: how they start, what they survive, how they end. Requests on one
that runs are in `test_one_engine.py`."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from engine.tasks import log_level
from engine.watch import WATCH_INTERVAL
from ipc.errors import _BY_CODE, BadCheckpoint, Busy, Failure, OutputError, StageFailed
from ipc.messages.names import StageName
from ipc.messages.server import Failed

PROMPT = "a red circle moves left on a black background"
Wait = Callable[..., Awaitable[None]]


def ask(path: Path, **fields: Any) -> UserParams:
    return UserParams(**{"prompt": PROMPT, "seed": 3, "steps": 6, "output": str(path), **fields})


def pid_of(supervisor: Supervisor, stage: StageName) -> int | None:
    return next(s.pid for s in supervisor.status().stages if s.name == stage)


def clean(supervisor: Supervisor) -> bool:
    """No slot held, no partial task, accounts in order."""
    return not supervisor.check_integrity() and all(q.depth == 0 for q in supervisor.status().queues)


def test_the_supervisor_never_imports_torch() -> None:
    """A process that ran a request through a supervisor has loaded neither torch nor transformers nor the stages, nor,
    where there is a GPU, CUDA's driver, without which there is no context."""
    code = (
        "import asyncio, sys, tempfile\n"
        "from engine import Supervisor, SystemParams, UserParams\n"
        "async def main():\n"
        "    with tempfile.TemporaryDirectory() as d:\n"
        "        async with Supervisor(SystemParams()) as s:\n"
        "            await s.generate(UserParams(prompt='a circle', steps=1, output=d + '/v.mp4'))\n"
        "asyncio.run(main())\n"
        "print([m for m in ('torch', 'transformers', 'stages', 'diffusers', 'cuda') if m in sys.modules])\n"
        "print('libcuda' in open('/proc/self/maps').read())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == ["[]", "False"]


async def test_killing_everything_in_fused_placement(tmp_path: Path, read_video: Any, wait_until: Wait) -> None:
    """SIGKILL of the one process of a fused engine in the middle of a request: it finishes with the same frames."""
    async with Supervisor(SystemParams(placement="fused")) as supervisor:
        await supervisor.generate(ask(tmp_path / "calm.mp4"))
        task = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4")))
        await wait_until(lambda: any(t.step >= 2 for t in supervisor.tasks() if t.state == "running"), "denoising")
        pid = pid_of(supervisor, "dit")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(task, 120)
    assert read_video(tmp_path / "v.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256


async def test_a_full_queue_is_busy_and_nothing_accepted_is_lost(tmp_path: Path) -> None:
    """With room for two, the third is refused with a time to retry; the two finish."""
    async with Supervisor(SystemParams(max_queue=2)) as supervisor:
        first = await supervisor.submit(ask(tmp_path / "1.mp4"))
        second = await supervisor.submit(ask(tmp_path / "2.mp4"))
        with pytest.raises(Busy) as caught:
            await supervisor.submit(ask(tmp_path / "3.mp4"))
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 0
        await supervisor.result(first.id)
        await supervisor.result(second.id)
        await supervisor.generate(ask(tmp_path / "3.mp4"))


async def test_a_restart_goes_on_with_what_was_accepted(tmp_path: Path, read_video: Any) -> None:
    """Two requests are accepted, the engine stops at once; another on the same state directory finishes both."""
    params = SystemParams(state_dir=str(tmp_path / "state"))
    async with Supervisor(params) as supervisor:
        ids = [(await supervisor.submit(ask(tmp_path / f"{i}.mp4", seed=i))).id for i in range(2)]
    async with Supervisor(params) as supervisor:
        for identity in ids:
            await supervisor.result(identity)
        await supervisor.generate(ask(tmp_path / "calm.mp4", seed=1))
    assert read_video(tmp_path / "1.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256
    async with Supervisor(params) as supervisor:
        assert supervisor.tasks() == []


def test_a_checkpoint_that_lacks_a_file(tmp_path: Path) -> None:
    """A directory without the VAE's weights is refused at construction, naming the file; nothing is started."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    (tmp_path / "demo" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"vae/diffusion_pytorch_model\.safetensors"):
        Supervisor(SystemParams(checkpoint=str(tmp_path / "demo")))


async def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    """The transformer's weights in the place of the VAE's: the vae stage says which tensors do not fit, requests fail
    with a typed error, and the engine can be stopped."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "demo" / "transformer" / name, tmp_path / "demo" / "vae" / name)
    async with Supervisor(SystemParams(checkpoint=str(tmp_path / "demo"))) as supervisor:
        with pytest.raises(BadCheckpoint, match="vae does not fit the model"):
            await supervisor.ready()
        with pytest.raises((StageFailed, BadCheckpoint)):
            await supervisor.generate(ask(tmp_path / "v.mp4"))


async def test_a_stage_that_hangs(tmp_path: Path, read_video: Any, wait_until: Wait) -> None:
    """SIGSTOP of the dit in the middle of a request: its progress counter stands still, so it is killed and reaped at
    its deadline, neither before nor more than two looks (and what a busy machine takes) after it; another one takes
    its place, and the request finishes with the same frames."""
    deadline, busy = 3.0, 3.0
    async with Supervisor(SystemParams(stage_deadline=deadline)) as supervisor:
        await supervisor.generate(ask(tmp_path / "calm.mp4"))
        task = asyncio.create_task(supervisor.generate(ask(tmp_path / "v.mp4")))
        await wait_until(lambda: any(t.step >= 2 for t in supervisor.tasks() if t.state == "running"), "denoising")
        pid = pid_of(supervisor, "dit")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        await wait_until(lambda: pid_of(supervisor, "dit") != pid, "the hang to be found")
        assert not os.path.exists(f"/proc/{pid}"), "it is reaped"
        assert deadline - WATCH_INTERVAL < time.monotonic() - stopped < deadline + 2 * WATCH_INTERVAL + busy
        await asyncio.wait_for(task, 120)
    assert read_video(tmp_path / "v.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256


@pytest.mark.parametrize("sent", [signal.SIGCONT, signal.SIGKILL])
async def test_cancelled_while_the_end_of_the_file_is_written(
    tmp_path: Path, read_video: Any, wait_until: Wait, sent: signal.Signals
) -> None:
    """The writer has all frames, and is as slow as can be: a cancel comes too late, as the file may be in its place
    already. The request ends well, also when that writer dies."""
    async with Supervisor(SystemParams()) as supervisor:
        await supervisor.generate(ask(tmp_path / "calm.mp4", num_frames=5))
        pid = pid_of(supervisor, "writer")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        accepted = await supervisor.submit(ask(tmp_path / "v.mp4", num_frames=5))

        def decoded() -> bool:
            (task,) = [task for task in supervisor.tasks() if task.id == accepted.id]
            return task.phase == "decode" and task.step == task.steps

        await wait_until(decoded, "the last frame to be decoded")
        await supervisor.cancel(accepted.id)
        os.kill(pid, sent)
        await asyncio.wait_for(supervisor.result(accepted.id), 60)
        await wait_until(lambda: clean(supervisor), "every slot to be given back")
    assert read_video(tmp_path / "v.mp4").sha256 == read_video(tmp_path / "calm.mp4").sha256


async def test_the_log_tells_the_operator_what_is_his(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The output directory goes while a request is computed: a warning. Another one is cancelled: that is its user's
    business, as is one that is done."""

    def levels(identity: str) -> list[str]:
        return [record.levelname for record in caplog.records if f"{identity} " in record.getMessage()]

    caplog.set_level("INFO")
    async with Supervisor(SystemParams()) as supervisor:
        (tmp_path / "gone").mkdir()
        lost = await supervisor.submit(ask(tmp_path / "gone" / "v.mp4"))
        (tmp_path / "gone").rmdir()
        with pytest.raises(OutputError):
            await supervisor.result(lost.id)
        done = await supervisor.generate(ask(tmp_path / "v.mp4", steps=1))
        cancelled = await supervisor.submit(ask(tmp_path / "w.mp4"))
        await supervisor.cancel(cancelled.id)
    assert (levels(lost.id), levels(done.id), levels(cancelled.id)) == (["WARNING"], ["INFO"], ["INFO"])


def test_who_hears_of_a_failure() -> None:
    """The level of each error's line, by who must act."""
    levels: dict[str, set[str]] = {}
    for error in _BY_CODE.values():
        end = Failed(id="1", error=Failure(error.code, "it failed"))
        levels.setdefault(logging.getLevelName(log_level(end)), set()).add(error.code)
    assert levels.pop("INFO") == {"bad_request", "cancelled", "deadline_exceeded"}
    assert levels.pop("ERROR") == {"internal"}
    assert levels["WARNING"] >= {
        "output_error", "out_of_memory", "numerical_error", "stage_failed", "poisoned_request", "bad_checkpoint"
    }  # fmt: skip


async def test_a_cancelled_submit_leaves_nothing(tmp_path: Path) -> None:
    """Submissions cancelled after 0 to 3 ms: those that were not accepted are not in the journal afterwards."""
    params = SystemParams(state_dir=str(tmp_path / "state"))
    accepted = []
    async with Supervisor(params) as supervisor:
        for number in range(12):
            submit = asyncio.create_task(supervisor.submit(ask(tmp_path / f"{number}.mp4", steps=300)))
            await asyncio.wait([submit], timeout=number * 0.00025)
            submit.cancel()
            for result in await asyncio.gather(submit, return_exceptions=True):
                if not isinstance(result, BaseException):
                    accepted.append(result.id)
    async with Supervisor(params) as supervisor:
        assert sorted(t.id for t in supervisor.tasks()) == sorted(accepted)


def test_too_few_descriptors_is_an_error_that_leaves_nothing() -> None:
    """An engine that cannot make its shared memory says so, and holds no descriptor and no process afterwards."""
    code = (
        "import asyncio, os, resource\n"
        "from engine import BadConfig, Supervisor\n"
        "async def main():\n"
        "    before = len(os.listdir('/proc/self/fd'))\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 8, before + 8))\n"
        "    try:\n"
        "        async with Supervisor():\n"
        "            print('started')\n"
        "    except BadConfig as error:\n"
        "        print(len(os.listdir('/proc/self/fd')) - before, error)\n"
        "asyncio.run(main())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.startswith("0 the shared memory of the engine cannot be made")


def test_a_host_that_ignores_its_children(tmp_path: Path) -> None:
    """In a process that ignores SIGCHLD the kernel reaps the stages: a killed one is noticed all the same, and the
    request finishes."""
    code = (
        "import asyncio, os, signal, sys\n"
        "from engine import Supervisor, UserParams\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "async def main():\n"
        "    async with Supervisor() as s:\n"
        "        await s.ready()\n"
        "        os.kill(s.status().stages[0].pid, signal.SIGKILL)\n"
        "        await s.generate(UserParams(prompt='a circle', steps=2, output=sys.argv[1]))\n"
        "        print(s.status().stages[0].restarts)\n"
        "asyncio.run(main())\n"
    )
    path = str(tmp_path / "v.mp4")
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "1"
    assert os.path.isfile(path)


async def test_a_stage_that_cannot_start_keeps_the_journal(tmp_path: Path) -> None:
    """A request is accepted; at the next start the weights do not fit: it fails there, and is done at the start after
    that, with good weights."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "bad")
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "bad" / "transformer" / name, tmp_path / "bad" / "vae" / name)
    state = str(tmp_path / "state")
    async with Supervisor(SystemParams(state_dir=state)) as supervisor:
        identity = (await supervisor.submit(ask(tmp_path / "v.mp4"))).id
    async with Supervisor(SystemParams(state_dir=state, checkpoint=str(tmp_path / "bad"))) as supervisor:
        with pytest.raises(StageFailed):
            await supervisor.result(identity)
    async with Supervisor(SystemParams(state_dir=state)) as supervisor:
        await supervisor.result(identity)
    assert (tmp_path / "v.mp4").is_file()


async def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """The stages cannot be told of all their files: the error is raised, no descriptor or process is left, and another
    engine starts over the same journal."""
    params = SystemParams(state_dir=str(tmp_path))

    def left() -> tuple[set[str], set[psutil.Process]]:
        return set(os.listdir("/proc/self/fd")), set(psutil.Process().children())

    supervisor = Supervisor(params)
    before = left()
    shipped = supervisor.checkpoint
    vae = msgspec.structs.replace(shipped.components["vae"], files=shipped.components["vae"].files * 4000)
    supervisor.checkpoint = shipped._replace(components={**shipped.components, "vae": vae})
    with pytest.raises(ValueError, match=r"Start: got .* bytes"):
        await supervisor.start()
    assert left() == before
    await supervisor.stop()
    async with Supervisor(params) as other:
        await other.generate(ask(tmp_path / "v.mp4", steps=1))
