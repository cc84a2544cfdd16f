"""Phases whose work the vae does in parts: unfinished quanta, which are granted again."""

from __future__ import annotations

import pytest

from engine.events import Action, BeginTask, CancelAsked, DropTask, Fail, Grant, LevelChanged, RaiseLevel
from ipc.errors import Failure
from ipc.messages.reports import Parts
from tests.engine.scheduling import FOUR_DEVICES, Stages, capacity, task

FULL = Failure("out_of_memory", "the vae stage ran out of memory")


def decoding(chunks: int = 3) -> Stages:
    """One task that begins to be decoded: chunks 0 and 1 are granted."""
    stages = Stages()
    stages.denoised(task("a", chunks=chunks))
    return stages


def part(stages: Stages, done: int, total: int, index: int = 0, seconds: float = 0.0) -> list[Action]:
    return stages.ended("a", "decode", index, parts=Parts(done, total), seconds=seconds)


def test_an_unfinished_quantum_is_granted_again_alone() -> None:
    """Chunk 1, granted ahead of the first part, does the second one; the third is granted alone. After the last, chunks
    are granted as ever, chunk 0 done and chunk 1 in the slot that it has."""
    stages = decoding()
    assert part(stages, 1, 4) == [], "chunk 1 is outstanding"
    assert part(stages, 2, 4, index=1) == [Grant("vae", "a", "decode", 0)]
    assert part(stages, 3, 4) == [Grant("vae", "a", "decode", 0)]
    granted = part(stages, 4, 4)
    assert [action for action in granted if not isinstance(action, BeginTask)] == [
        Grant("writer", "a", "write", 0), Grant("vae", "a", "decode", 1), Grant("vae", "a", "decode", 2)
    ]  # fmt: skip


def test_the_last_part_out_of_its_turn() -> None:
    """Two parts, the second done by chunk 1, whose frames are there then: both chunks are granted again, in order, and
    the writer gets chunk 0 first."""
    stages = decoding()
    part(stages, 1, 2)
    assert part(stages, 2, 2, index=1) == [Grant("vae", "a", "decode", 0), Grant("vae", "a", "decode", 1)]
    assert Grant("writer", "a", "write", 0) in part(stages, 2, 2)


def test_parts_are_steps_and_take_their_share_of_the_time() -> None:
    """Of 4 parts and 3 chunks: 6 steps. A part is worth 3/4 of a chunk's estimate, 0.15 s; with each there is so much
    less left; with the last none of the decoding (a chunk is written in 0.1 s)."""
    stages, told = decoding(), []
    for done, index in ((1, 0), (2, 1), (3, 0), (4, 0)):
        part(stages, done, 4, index, seconds=0.15)
        where = stages.scheduler.snapshot("a")
        assert where is not None and where.phase == "decode"
        told.append((where.step, where.steps, stages.scheduler.seconds_left("a")))
    assert told == [
        (1, 6, pytest.approx(0.45)), (2, 6, pytest.approx(0.3)), (3, 6, pytest.approx(0.3)), (4, 6, pytest.approx(0.3))
    ]  # fmt: skip


def test_parts_that_take_twice_as_long_teach_the_estimate() -> None:
    """0.3 s for each of 4 parts of 3 chunks, which were estimated to take 0.2 s each: twice as long. What is left then
    is handing out chunks, which teaches nothing."""
    stages = decoding()
    for done, index in ((1, 0), (2, 1), (3, 0), (4, 0)):
        part(stages, done, 4, index, seconds=0.3)
    assert stages.scheduler._line.estimates.learnt["decode"] == pytest.approx(2.0)
    part(stages, 4, 4, index=1, seconds=0.001)
    assert stages.scheduler._line.estimates.learnt["decode"] == pytest.approx(2.0)


def test_nothing_of_a_later_task_goes_between_two_parts() -> None:
    """Another one was denoised on another device and waits for the vae: it gets nothing ahead of the first one's next
    part."""
    stages = Stages(capacity(FOUR_DEVICES))
    for id in ("a", "b"):
        stages.submit(task(id, chunks=3))
        stages.ended(id, "text")
    for id in ("a", "b"):
        for step in range(3):
            stages.ended(id, "denoise", step)
    assert part(stages, 1, 4) == []
    assert part(stages, 2, 4, index=1) == [Grant("vae", "a", "decode", 0)]
    assert part(stages, 3, 4) == [Grant("vae", "a", "decode", 0)]
    assert {action.id for action in part(stages, 4, 4) if isinstance(action, Grant)} == {"a"}


def test_an_urgent_task_goes_between_two_parts() -> None:
    """On one device: its text is encoded, and it is denoised, before the next part of the first task."""
    stages = decoding()
    part(stages, 1, 4)
    part(stages, 2, 4, index=1)
    assert stages.submit(task("b", priority=5)) == [], "a part is in hand"
    assert Grant("text", "b", "text", 0) in part(stages, 3, 4)
    assert Grant("dit", "b", "denoise", 0) in stages.ended("b", "text")
    for step in range(2):
        stages.ended("b", "denoise", step)
    assert Grant("vae", "b", "decode", 0) in stages.ended("b", "denoise", 2)


def test_an_unfinished_quantum_counts_while_others_go_first() -> None:
    """Between two parts no quantum of the decoding is granted, and yet it has begun: what becomes of the task, such as
    other weights, must not change the parts to come. A new vae begins again."""
    stages = decoding()
    part(stages, 1, 4)
    part(stages, 2, 4, index=1)
    stages.submit(task("b", priority=5))
    assert Grant("text", "b", "text", 0) in part(stages, 3, 4)
    assert stages.scheduler.granted("a", "decode") == 1
    stages.lost("vae")
    assert stages.scheduler.granted("a", "decode") == 0


def test_a_cancel_between_two_parts() -> None:
    """The vae is told at once; the part in hand is answered, and nothing is granted again."""
    stages = decoding()
    part(stages, 1, 4)
    part(stages, 2, 4, index=1)
    actions = stages.tell(CancelAsked("a", Failure("cancelled", "asked")))
    assert isinstance(actions[0], Fail) and DropTask("vae", "a") in actions
    assert not [action for action in part(stages, 3, 4) if isinstance(action, Grant)]
    for stage in ("text", "dit", "vae"):
        stages.dropped("a", stage)
    assert "a" not in stages.scheduler


def test_a_new_process_has_no_parts() -> None:
    """The vae dies with three of four parts done: two chunks are granted as at first, and the steps are chunks again
    until it says something else."""
    stages = decoding()
    part(stages, 1, 4)
    part(stages, 2, 4, index=1)
    part(stages, 3, 4)
    stages.lost("vae")
    assert [action for action in stages.up("vae", 9) if isinstance(action, Grant)] == [
        Grant("vae", "a", "decode", 0), Grant("vae", "a", "decode", 1)
    ]  # fmt: skip
    where = stages.scheduler.snapshot("a")
    assert where is not None and (where.step, where.steps) == (0, 3)
    assert part(stages, 1, 4) == []


def test_a_part_that_lacks_memory() -> None:
    """It is tried once at each level above, as any quantum; the parts before it count."""
    stages = Stages()
    stages.tell(LevelChanged("vae", 1, 3))
    stages.denoised(task("a", chunks=3))
    part(stages, 1, 4)
    part(stages, 2, 4, index=1)
    assert stages.ended("a", "decode", 0, error=FULL) == [RaiseLevel("vae", 1)]
    assert stages.tell(LevelChanged("vae", 2, 3)) == [Grant("vae", "a", "decode", 0)]
    assert part(stages, 3, 4) == [Grant("vae", "a", "decode", 0)]
    assert stages.tell(LevelChanged("vae", 1, 1)) == [], "what lacked memory is done, and the next part has not yet"
    assert Grant("vae", "a", "decode", 1) in part(stages, 4, 4)
