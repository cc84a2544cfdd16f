"""Kill a stage at the Nth point, N = 1, 2, 3, ... until there is none left; whatever it was doing, its successor
comes to the same result.

The stage runs in a forked child that SIGKILLs itself there: no `finally`, no flush.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stages.dit
import stages.text
import stages.vae
import stages.writer
from ipc.messages import STAGE_OF_PHASE, Job, Phase, Run, StageName, Start
from ipc.slot_table import SlotTable
from ipc.state import StateSlot, StateSlots, _Half
from ipc.tensor_queue import TensorQueue
from ipc.tensors import slot_tensor
from stages.files import Directory
from stages.stage import CONSUMERS
from stages.worker import load_stage
from tests.stages.rig import CHUNK, STAGES, Rig, is_empty, make_job, quanta

POINTS: frozenset[CodeType] = frozenset(
    function.__code__
    for function in (
        SlotTable.describe, SlotTable.stamp_reader, SlotTable.transition, TensorQueue.release, StateSlots.claim,
        StateSlots.release, StateSlots._publish, StateSlot.commit, _Half.write, stages.text.TextStage.step,
        stages.text.TextStage.drop, stages.dit.DitStage.step, stages.dit.DitStage._take_up,
        stages.dit.DitStage._advance, stages.dit.DitStage.drop, stages.vae.VaeStage.step, stages.vae.VaeStage.drop,
        stages.writer.WriterStage.step,
        stages.writer.WriterStage.drop, stages.writer.Video.add, stages.writer.Video.complete,
        stages.writer.copy_stream, stages.writer.write_text, stages.writer.clean, Directory.create, Directory.remove,
        Directory.place,
    )
)  # fmt: skip
"""Where the shared memory, the state or the file changes hands; a point is before and after each."""

ORDER: tuple[Phase, ...] = ("text", "encode", "denoise", "decode", "write")
LEAVES: dict[Phase, str] = {"text": "prompts", "encode": "init_latents", "denoise": "latents", "decode": "frames"}
LEAST: dict[Phase, int] = {"text": 15, "encode": 10, "denoise": 40, "decode": 20, "write": 30}
"""Points that a sweep must have found at least: one that kills nothing proves nothing."""


def die_at(number: int) -> None:
    """SIGKILL this process at its `number`th point from now."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "return") and frame.f_code in POINTS:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def in_child(
    rig: Rig, stage: StageName, job: Job, runs: list[Run], point: int = 0, *, drop: bool = False
) -> int | None:
    """A process of this stage runs these quanta, and drops the task if asked, unless it dies at a point (0: at none).

    Returns how many quanta it reported done before it died; None if it lived to the end.
    """
    reported, report = os.pipe()
    start = rig.start((stage,))
    if (pid := os.fork()) == 0:
        os._exit(live(rig, start, job, runs, point, drop, report))
    os.close(report)
    _, status = os.waitpid(pid, 0)
    rig.reclaim(stage)
    with os.fdopen(reported, "rb") as pipe:
        done = len(pipe.read())
    assert status in (0, signal.SIGKILL), f"the {stage} process ended with {status}"
    return None if status == 0 else done


def live(rig: Rig, start: Start, job: Job, runs: list[Run], point: int, drop: bool, report: int) -> int:
    """The child's life; returns its exit code."""
    try:
        loaded = load_stage(start.stages[0], start, rig.links(start))
        if point:
            die_at(point)
        loaded.begin(job)
        for run in runs:
            loaded.step(run)
            os.write(report, b".")
        if drop:
            loaded.drop(job.id)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def left(rig: Rig, phase: Phase, job: Job) -> str:
    """Digest of what this phase left for the next one: the tensors in its queue, or the file."""
    total = hashlib.sha256()
    if phase == "write":
        total.update(Path(job.output).read_bytes())
        assert [p.name for p in Path(job.output).parent.iterdir()] == [Path(job.output).name]
        return total.hexdigest()
    name = LEAVES[phase]
    consumer = CONSUMERS[name]
    queue = rig.links(rig.start((consumer,))).inputs[name]
    for sequence in range(2 if phase == "text" else -(-3 // CHUNK) if phase == "decode" else 1):
        total.update(slot_tensor(queue.take(job.id, sequence, 0.0)).numpy().tobytes())
    rig.reclaim(consumer)
    return total.hexdigest()


def attempt(rig: Rig, phase: Phase, job: Job, point: int) -> tuple[str, bool]:
    """One request up to the end of `phase`, whose process dies at `point` and is replaced as the supervisor does it.

    Returns the digest of what the phase left, and whether there was such a point.
    """
    runs = {p: [run for run in quanta(job) if run.phase == p] for p in ORDER}
    for before in ORDER[: ORDER.index(phase)]:
        assert in_child(rig, STAGE_OF_PHASE[before], job, runs[before]) is None
    stage = STAGE_OF_PHASE[phase]
    done = in_child(rig, stage, job, runs[phase], point, drop=True)
    if done is not None and done == len(runs[phase]):
        rig.memory.purge(job.id, stage)
    elif done is not None:
        if phase == "write":  # what was compressed so far died with it
            rig.memory.purge(job.id, "writer")
            done = 0
            assert in_child(rig, "vae", job, runs["decode"]) is None
        assert in_child(rig, stage, job, runs[phase][done:], drop=True) is None
    digest = left(rig, phase, job)
    for name in STAGES:
        rig.memory.purge(job.id, name)
    assert is_empty(rig)
    return digest, done is not None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", ORDER)
def test_whatever_it_was_doing(rig: Rig, tmp_path: Path, phase: Phase) -> None:
    """The process of this phase is killed at every point in turn; its successor leaves the same bytes, and no slot is
    lost."""
    source = tmp_path / "source"
    source.mkdir()
    init = source / "init.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(init)
    folder = tmp_path / "out"
    folder.mkdir()

    def job() -> Job:
        return make_job(folder / "v.mp4", init=str(init), start_step=2)

    golden, killed = attempt(rig, phase, job(), 0)
    assert not killed
    for point in itertools.count(1):
        Path(folder / "v.mp4").unlink(missing_ok=True)
        digest, killed = attempt(rig, phase, job(), point)
        assert digest == golden, f"killed at point {point} of {phase}"
        if not killed:
            break
    print(f"{phase}: {point - 1} points")
    assert point > LEAST[phase]
