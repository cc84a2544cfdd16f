"""Stage processes from `Start` to a finished file, and what they do when something goes wrong."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ipc.channel import Channel
from ipc.counters import ProgressCounter
from ipc.errors import BadRequest
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import STAGE_OF_PHASE, StageName
from ipc.messages.reports import (
    AnyStageReport,
    Chosen,
    Dropped,
    Loading,
    MemorySet,
    QuantumDone,
    QuantumDropped,
    QuantumFailed,
    Ready,
    StartFailed,
    VaeChosen,
)
from ipc.messages.stage import Begin, Drop, Run, SetMemory
from stages.failures import EXIT_DEVICE_LOST, describe, is_device_lost, summary
from stages.worker import (
    EXIT_ORPHANED,
    EXIT_START_FAILED,
    LOADING_INTERVAL,
    LoadingReporter,
)
from tests.stages.process import ROOT, WAIT, WorkerProcess
from tests.stages.rig import STAGES, Rig, is_empty, make_job, quanta

Processes = Mapping[StageName, WorkerProcess]

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 1.65 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.43 GiB is "
    "free. Including non-PyTorch memory, this process has 18.66 GiB memory in use."
)


def begin(processes: Processes, job: Job) -> None:
    for stage in STAGES:
        processes[stage].tell(Begin(stage=stage, job=job))


def run_all(processes: Processes, runs: list[Run]) -> dict[str, Any] | None:
    """Run quanta one after another; the metadata that came with the last one."""
    report: AnyStageReport | None = None
    for run in runs:
        report = processes[STAGE_OF_PHASE[run.phase]].ask(run)
        assert isinstance(report, QuantumDone), report
        assert (report.id, report.phase, report.index) == (run.id, run.phase, run.index)
    return report.metadata if isinstance(report, QuantumDone) else None


def drop(processes: Processes, job: Job) -> None:
    for stage in STAGES:
        assert processes[stage].ask(Drop(id=job.id, stage=stage)) == Dropped(id=job.id, stage=stage)


def committed(rig: Rig, job: Job) -> tuple[int, bytes]:
    """The steps done and the latents that the dit stage committed last; (0, b"") before the first."""
    slot = rig.memory.state.find(job.id)
    state = slot.load() if slot is not None else None
    return (0, b"") if state is None else (state[0], bytes(state[1]["latents"][2]))


def kill_after_commit(rig: Rig, process: WorkerProcess, run: Run, job: Job) -> None:
    """Kill the dit process when the step is in the state slots, whether or not it could tell."""
    process.tell(run)
    limit = time.monotonic() + WAIT
    while committed(rig, job)[0] <= run.index:
        assert time.monotonic() < limit, "the step was not committed"
    process.kill()


def latents_undisturbed(rig: Rig, job: Job) -> bytes:
    """The latents of a run in this process."""
    stages = {name: rig.load(name) for name in ("text", "dit")}
    for stage in stages.values():
        stage.begin(job)
    for run in quanta(job):
        if STAGE_OF_PHASE[run.phase] in stages:
            stages[STAGE_OF_PHASE[run.phase]].step(run)
    return committed(rig, job)[1]


def test_split_and_fused_make_the_same_video_and_a_killed_dit_resumes(
    rig: Rig, tmp_path: Path, read_video: Callable[[Path], Any]
) -> None:
    """Four processes make a video; the dit process is killed after it committed its third step, and that step is
    granted to its successor again. One fused process makes the video undisturbed. The latents and the frames are the
    same bytes, every slot is free at the end, and each process leaves with status 0."""
    split_job, fused_job = make_job(str(tmp_path / "split.mp4")), make_job(str(tmp_path / "fused.mp4"))
    with contextlib.ExitStack() as stack:
        split = {name: stack.enter_context(WorkerProcess(rig, (name,))) for name in STAGES}
        runs = quanta(split_job)
        third = next(i for i, run in enumerate(runs) if (run.phase, run.index) == ("denoise", 2))
        for process in split.values():
            process.ready()
        begin(split, split_job)
        run_all(split, runs[:third])
        kill_after_commit(rig, split["dit"], runs[third], split_job)
        split["dit"] = stack.enter_context(WorkerProcess(rig, ("dit",)))
        fused = dict.fromkeys(STAGES, stack.enter_context(WorkerProcess(rig)))
        split["dit"].ready()
        split["dit"].tell(Begin(stage="dit", job=split_job))
        assert run_all(split, runs[third:]) == {"seed": 7, "seconds": {"text": 0.5, "denoise": 2.0}}
        resumed = committed(rig, split_job)
        drop(split, split_job)
        assert set(fused["dit"].ready().weights) == {"text_encoder", "transformer", "vae"}
        begin(fused, fused_job)
        run_all(fused, quanta(fused_job))
        drop(fused, fused_job)
        assert is_empty(rig)
        assert rig.placing == [split_job.id, fused_job.id]
        assert [process.stop() for process in (*split.values(), fused["dit"])] == [0] * 5
    assert resumed == (4, latents_undisturbed(rig, make_job()))
    assert read_video(tmp_path / "split.mp4").sha256 == read_video(tmp_path / "fused.mp4").sha256


@contextlib.contextmanager
def granted(process: WorkerProcess, *jobs: Job) -> Iterator[None]:
    """A text process that reads nothing meanwhile has a quantum of each of these jobs granted before."""
    process.popen.send_signal(signal.SIGSTOP)
    for job in {job.id: job for job in jobs}.values():
        process.tell(Begin(stage="text", job=job))
    for job in jobs:
        process.tell(Run(id=job.id, phase="text", index=0))
    yield
    process.popen.send_signal(signal.SIGCONT)


def test_a_dropped_task_is_skipped_in_its_turn(rig: Rig) -> None:
    """Two tasks have quanta queued when one is dropped: its quanta are answered `dropped` in their turn, the other
    task's is run, and then the drop is confirmed."""
    first, second = make_job(), make_job()
    with WorkerProcess(rig, ("text",)) as process:
        process.ready()
        with granted(process, first, second, first):
            process.tell(Drop(id=first.id, stage="text"))
        dropped = QuantumDropped(id=first.id, phase="text", index=0)
        assert process.hear() == dropped
        done = process.hear()
        assert isinstance(done, QuantumDone) and done.id == second.id
        assert process.hear() == dropped
        assert process.hear() == Dropped(id=first.id, stage="text")
        assert process.ask(Run(id=first.id, phase="text", index=0)) == dropped
        assert process.stop() == 0


def test_a_memory_plan_holds_from_the_next_quantum_on(rig: Rig) -> None:
    """Two quanta were granted when it comes: it goes before them, and of two plans the later one holds."""
    first, second = make_job(), make_job()
    with WorkerProcess(rig, ("text",)) as process:
        process.ready()
        with granted(process, first, second):
            for level in (1, 0):
                process.tell(SetMemory(plan=MemoryPlan(level=level), limits={}))
        plans = [process.hear(), process.hear()]
        assert [r.plan.level for r in plans if isinstance(r, MemorySet)] == [1, 0]
        quanta = [process.hear(), process.hear()]
        assert [r.id for r in quanta if isinstance(r, QuantumDone)] == [first.id, second.id]
        assert process.stop() == 0


def test_errors_fail_one_request_and_the_writer_goes_on_without_torch(
    rig: Rig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file system that refuses and a defect each fail one request, the first as `output_error`, the second as
    `internal` with a traceback on stderr; the process is alive, counts its progress, ignores Ctrl-C, has not loaded
    torch, and leaves on SIGTERM."""
    nowhere, early = make_job(str(tmp_path / "gone" / "v.mp4")), make_job(str(tmp_path / "v.mp4"))
    with WorkerProcess(rig, ("writer",)) as process:
        assert set(process.ready().versions) == {"av", "libavcodec"}
        for job in (nowhere, early):
            process.tell(Begin(stage="writer", job=job))
        process.popen.send_signal(signal.SIGINT)
        before = process.counter.value
        refused = process.ask(Run(id=nowhere.id, phase="write", index=0))
        assert isinstance(refused, QuantumFailed) and refused.error.code == "output_error"
        assert str(tmp_path) not in refused.error.message
        defect = process.ask(Run(id=early.id, phase="write", index=1))
        assert isinstance(defect, QuantumFailed) and defect.error.code == "internal"
        assert "KeyError" in defect.error.message
        assert process.counter.value >= before + 4
        assert process.ask(Drop(id=early.id, stage="writer")) == Dropped(id=early.id, stage="writer")
        assert "libtorch" not in Path(f"/proc/{process.popen.pid}/maps").read_text()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(WAIT) == 0
    assert "Traceback" in capfd.readouterr().err


def test_a_process_that_cannot_load_says_why_and_leaves(rig: Rig, tmp_path: Path) -> None:
    """The text encoder's file in the checkpoint is broken: `StartFailed` names it, and the process leaves with its
    status."""
    broken = tmp_path / "checkpoint"
    shutil.copytree(rig.checkpoint, broken)
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"{}")
    rig.checkpoint = broken
    with WorkerProcess(rig, ("text",)) as process:
        report = process.hear()
        assert isinstance(report, StartFailed)
        assert report.error.code == "bad_checkpoint"
        assert "text_encoder: model.safetensors" in report.error.message
        assert process.popen.wait(WAIT) == EXIT_START_FAILED


def test_what_is_loaded_is_reported(rig: Rig) -> None:
    """A fused process tells of every component that it loads, at least when it begins and when it has all of it, and
    counts its progress as it goes."""
    with WorkerProcess(rig) as process:
        process.ready()
        last = {report.component: report for report in process.loading}
        assert list(last) == ["text_encoder", "transformer", "vae"]
        assert all(0 < report.done == report.total for report in last.values())
        assert process.counter.value >= len(process.loading)
        assert rig.chosen == [Chosen(attention="sdpa", kernels="torch"), VaeChosen(kernels="torch")]


def test_reports_of_loading_are_few_and_never_wait() -> None:
    """Ten thousand signs of progress of a component become its first report, its last, and five a second; each is
    a beat of the counter. When the supervisor does not read, reports are left out instead of waiting."""
    ours, theirs = Channel.pair()
    supervisor: Channel[AnyStageReport] = Channel(ours, AnyStageReport)
    with ProgressCounter.create() as counter, supervisor, Channel(theirs, AnyStageReport) as stage:
        loading = LoadingReporter(stage, counter.increment)
        began = time.monotonic()
        for done in range(1, 10_001):
            loading("vae", done, 10_000)
        reports = []
        while (received := supervisor.try_receive()) is not None:
            reports.append(received.message)
        assert reports[0] == Loading(component="vae", done=1, total=10_000)
        assert reports[-1] == Loading(component="vae", done=10_000, total=10_000)
        assert len(reports) <= 2 + (time.monotonic() - began) / LOADING_INTERVAL
        for number in range(10_000):
            loading(f"component {number}", 0, 1)
        assert counter.value == 20_000


def test_a_process_leaves_when_its_channel_ends(rig: Rig) -> None:
    """The supervisor's end of the channel is closed while the process waits: it leaves."""
    with WorkerProcess(rig, ("writer",)) as process:
        process.ready()
        process.channel.close()
        assert process.popen.wait(WAIT) == 0


PARENT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-P", "-m", "stages.worker", sys.argv[1]], pass_fds=[int(sys.argv[1])])
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_process_ends_with_its_supervisor(rig: Rig) -> None:
    """The supervisor is killed while someone else still holds the channel open, so that only its death can be noticed:
    the stage process ends."""
    ours, theirs = Channel.pair()
    with theirs, ProgressCounter.create() as counter, contextlib.closing(Channel(ours, Ready)) as channel:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(theirs.fileno())],
            stdout=subprocess.PIPE, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        with parent:
            assert parent.stdout is not None
            worker = os.pidfd_open(int(parent.stdout.readline()))
            start = rig.start(("writer",), supervisor_pid=parent.pid)
            channel.send(start, [counter.fd, *rig.memory.fds(("writer",))], timeout=WAIT)
            assert isinstance(channel.receive(WAIT).message, Ready)
            parent.kill()
        poller = select.poll()
        poller.register(worker, select.POLLIN)
        assert poller.poll(1000 * WAIT), "the stage process outlived its supervisor"
        os.close(worker)


def test_only_a_dead_device_ends_the_process() -> None:
    """Errors of CUDA after which every call fails end the process with their own status; running out of memory, a bad
    request and a path in an error's text do not, and the path does not travel."""
    assert is_device_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_device_lost(torch.AcceleratorError("device-side assert triggered"))
    assert not is_device_lost(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    memory = describe(torch.OutOfMemoryError(OUT_OF_MEMORY), "vae")
    assert memory.code == "out_of_memory"
    assert memory.message.startswith(
        "the vae stage ran out of memory (1.65 GiB were asked for, 1.43 GiB were free); ask"
    )
    assert describe(MemoryError(), "vae").message.startswith("the vae stage ran out of memory; ask")
    with pytest.raises(RuntimeError) as huge:
        torch.empty(1 << 50)
    assert describe(huge.value, "dit").code == "out_of_memory"
    for text in ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert describe(RuntimeError(text), "vae").code == "out_of_memory"
    assert describe(BadRequest("too long"), "text").code == "bad_request"
    with pytest.raises(SystemExit) as left:
        describe(RuntimeError("CUDA error: unspecified launch failure"), "dit")
    assert left.value.code == EXIT_DEVICE_LOST
    assert summary(FileNotFoundError(2, "No such file or directory", "/secret/x")) == (
        "FileNotFoundError: No such file or directory"
    )


def test_a_supervisor_that_is_gone_before_it_can_be_watched() -> None:
    """The supervisor's pid names no process any more: the stage leaves at once, with the code of an orphan and no
    traceback."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = f"from stages.worker import watch_supervisor; watch_supervisor({gone.pid})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (EXIT_ORPHANED, "")
