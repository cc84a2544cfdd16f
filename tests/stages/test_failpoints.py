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
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import ipc.result
import stages.dit
import stages.text
import stages.vae
import stages.writer
from ipc.files import Directory
from ipc.messages.job import Job
from ipc.messages.names import STAGE_OF_PHASE, Phase, StageName
from ipc.messages.stage import Run, Start
from ipc.slot_table import SlotTable
from ipc.state import _FIRST_HALF, _HALF_WORDS, StateSlot, StateSlots, StateTensor, _byte, _Half
from ipc.tensor_queue import TensorQueue
from ipc.tensors import put_tensor, slot_tensor
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
        stages.writer.copy_stream, ipc.result.seal, ipc.result.write_json, ipc.result.clean, Directory.create,
        Directory.remove, Directory.place, Directory.sync,
    )
)  # fmt: skip
"""Where the shared memory, the state or the file changes hands; a point is before and after each."""

ORDER: tuple[Phase, ...] = ("text", "encode", "denoise", "decode", "write")
LEAVES: dict[Phase, str] = {"text": "prompts", "encode": "init_latents", "denoise": "latents", "decode": "frames"}
MAKES: dict[str, Phase] = {name: phase for phase, name in LEAVES.items()}
PARTS = {"prompts": 2, "init_latents": 1, "latents": 1, "frames": -(-3 // CHUNK)}
"""Tensors that a request has in each queue."""
NEEDS: dict[Phase, tuple[str, ...]] = {
    "text": (), "encode": (), "denoise": ("prompts", "init_latents"), "decode": ("latents",),
    "write": ("latents", "frames"),  # frames are decoded again when a writer dies
}  # fmt: skip
Given = dict[str, list[Tensor]]
"""What the phases before have left, by queue."""
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
    for tensor in taken(rig, LEAVES[phase], job):
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def taken(rig: Rig, name: str, job: Job) -> list[Tensor]:
    """Copies of what a request has in a queue, where it stays."""
    consumer = CONSUMERS[name]
    queue = rig.links(rig.start((consumer,))).inputs[name]
    copies = [slot_tensor(queue.take(job.id, sequence, 0.0)).clone() for sequence in range(PARTS[name])]
    rig.reclaim(consumer)
    return copies


def runs_of(job: Job) -> dict[Phase, list[Run]]:
    return {phase: [run for run in quanta(job) if run.phase == phase] for phase in ORDER}


def purge(rig: Rig, job: Job) -> None:
    """Nothing is left of a request, not even in memory that is free: the next one is the same, and would find there
    what it has not written itself."""
    for name in STAGES:
        rig.memory.purge(job.id, name)
    assert is_empty(rig)
    queues, states = rig.memory.queues.values(), rig.memory.state
    rooms = [queue._payload.view(slot) for queue in queues for slot in range(queue.spec.slots)]
    rooms += [states._payload.view(half) for half in range(2 * states.spec.slots)]
    for room in rooms:
        room[:] = memoryview(b"\xa5" * room.nbytes)
    for slot in range(states.spec.slots):
        halves = states._bytes[_byte(slot, _FIRST_HALF) : _byte(slot, _FIRST_HALF + 2 * _HALF_WORDS)]
        halves[:] = bytes(len(halves))


def before(rig: Rig, phase: Phase, job: Job) -> Given:
    """Run the phases before, undisturbed, each in a process of its own; what this one needs of what they leave."""
    runs = runs_of(job)
    for earlier in ORDER[: ORDER.index(phase)]:
        assert in_child(rig, STAGE_OF_PHASE[earlier], job, runs[earlier]) is None
    given = {name: taken(rig, name, job) for name in NEEDS[phase]}
    purge(rig, job)
    return given


def hand_in(rig: Rig, job: Job, given: Given) -> None:
    """What the phases before leave, as their stages leave it."""
    for name, tensors in given.items():
        producer = STAGE_OF_PHASE[MAKES[name]]
        queue = rig.links(rig.start((producer,))).outputs[name]
        for sequence, tensor in enumerate(tensors):
            put_tensor(queue, job.id, sequence, tensor, 0.0)


def attempt(rig: Rig, phase: Phase, job: Job, given: Given, point: int) -> tuple[str, bool]:
    """One request from where the phases before have left it to the end of `phase`, whose process dies at `point` and is
    replaced as the supervisor does it.

    Returns the digest of what the phase left, and whether there was such a point.
    """
    runs = runs_of(job)
    hand_in(rig, job, given)
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
    purge(rig, job)
    return digest, done is not None


def sweep(rig: Rig, directory: Path, phase: Phase) -> int:
    """Kill the process of this phase at every point in turn; how many there are. AssertionError if a successor leaves
    other bytes than an undisturbed process, or a slot or a file too many."""
    source = directory / "source"
    source.mkdir()
    init = source / "init.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(init)
    folder = directory / "out"
    folder.mkdir()

    def job() -> Job:
        return make_job(folder / "v.mp4", init=str(init), start_step=2)

    given = before(rig, phase, job())
    golden, killed = attempt(rig, phase, job(), given, 0)
    assert not killed
    for point in itertools.count(1):
        Path(folder / "v.mp4").unlink(missing_ok=True)
        digest, killed = attempt(rig, phase, job(), given, point)
        assert digest == golden, f"killed at point {point} of {phase}"
        if not killed:
            break
    return point - 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", ORDER)
def test_whatever_it_was_doing(rig: Rig, tmp_path: Path, phase: Phase) -> None:
    """The process of this phase is killed at every point in turn; its successor leaves the same bytes, and no slot is
    lost."""
    points = sweep(rig, tmp_path, phase)
    print(f"{phase}: {points} points")
    assert points >= LEAST[phase]


# Controls.


def commit_too_early(slot: StateSlot, step: int, tensors: Mapping[str, StateTensor]) -> None:
    """Switches to the other half before it is written."""
    number = slot._states._committed(slot.index) + 1
    slot._states._publish(slot.index, number)
    slot._states._half(slot.index, number).write(step, tensors)


@pytest.mark.timeout(600)
def test_a_state_that_is_half_committed_is_found(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the switch and the write: what the successor goes on with is older, or nothing."""
    monkeypatch.setattr(StateSlot, "commit", commit_too_early)
    with pytest.raises(AssertionError, match=r"killed at point \d+ of denoise|the dit process ended with"):
        sweep(rig, tmp_path, "denoise")


@pytest.mark.timeout(600)
def test_what_a_dead_writer_leaves_is_found(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that does not clear up after the one before it."""
    monkeypatch.setattr(stages.writer, "clean", lambda *_: None)
    with pytest.raises(AssertionError):
        sweep(rig, tmp_path, "write")
