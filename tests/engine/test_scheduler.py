"""The scheduler, event by event and action by action; `test_scheduler_histories.py` tests it by the thousand."""

from __future__ import annotations

import pytest

from engine.events import (
    BeginTask,
    CancelAsked,
    DeclareFailed,
    DropTask,
    Fail,
    Finish,
    Grant,
    Placing,
    Purge,
    QuantumEnded,
    Report,
    Restart,
    StageGone,
    StageLost,
    StageUp,
    Submitted,
    TaskDropped,
    Tick,
)
from engine.params import STAGES
from engine.scheduler import Scheduler, Snapshot
from ipc.errors import Failure
from tests.engine.scheduling import FOUR_DEVICES, TWO_DITS, Stages, capacity, task

CANCELLED = Failure("cancelled", "the request was cancelled")

# The way of one task.


def test_one_task_from_submission_to_file() -> None:
    """A task of two steps and one chunk visits text, dit, vae and writer; each is told of it once and drops it once,
    the dit always has the next step in hand, and after the last drop nothing of the task is remembered."""
    s = Stages()
    assert s.submit(task(denoise=3, chunks=1)) == [BeginTask("text", "a"), Grant("text", "a", "text", 0)]
    assert s.ended("a", "text") == [
        DropTask("text", "a"), BeginTask("dit", "a"), Grant("dit", "a", "denoise", 0), Grant("dit", "a", "denoise", 1),
    ]  # fmt: skip
    assert s.ended("a", "denoise", 0) == [Grant("dit", "a", "denoise", 2)]
    assert s.scheduler.snapshot("a") == Snapshot("running", "denoise", 1, 3)
    assert s.ended("a", "denoise", 1) == []
    assert s.ended("a", "denoise", 2) == [DropTask("dit", "a"), BeginTask("vae", "a"), Grant("vae", "a", "decode", 0)]
    assert s.ended("a", "decode") == [BeginTask("writer", "a"), Grant("writer", "a", "write", 0)]
    assert s.ended("a", "write") == [Finish("a"), DropTask("vae", "a"), DropTask("writer", "a")]
    assert s.scheduler.snapshot("a") is None
    for stage in STAGES:
        assert len(s.scheduler) == 1
        s.dropped("a", stage)
    assert len(s.scheduler) == 0


def test_text_and_encode_run_side_by_side() -> None:
    """With devices of their own, text and encode of a task are granted at once, and the first step waits for both."""
    s = Stages(capacity(FOUR_DEVICES))
    assert s.submit(task(encode=True)) == [
        BeginTask("vae", "a"), Grant("vae", "a", "encode", 0), BeginTask("text", "a"), Grant("text", "a", "text", 0),
    ]  # fmt: skip
    assert s.ended("a", "text") == [DropTask("text", "a")]
    assert Grant("dit", "a", "denoise", 0) in s.ended("a", "encode")


def test_every_quantum_is_reported_with_the_time_left() -> None:
    """Submission is reported as queued and each quantum as a step; the seconds left fall, and include the tasks
    ahead."""
    scheduler = Scheduler(capacity())
    scheduler.on(StageUp("text", 1), 0)
    reports = [a for a in scheduler.on(Submitted(task("a", denoise=10)), 0) if isinstance(a, Report)]
    assert reports == [Report("a", "queued", 0, 1, pytest.approx(0.1 + 10 + 0.4))]  # type: ignore[arg-type]
    scheduler.on(Submitted(task("b", denoise=20)), 0)
    assert scheduler.seconds_left("b") == pytest.approx(10.5 + 20.5)
    event = QuantumEnded("text", 1, "a", "text", 0, seconds=0.1)
    reports = [a for a in scheduler.on(event, 1) if isinstance(a, Report)]
    assert reports == [Report("a", "text", 1, 1, pytest.approx(10.4))]  # type: ignore[arg-type]
    assert scheduler.seconds_left("b") == pytest.approx(10.4 + 20.5)


# Ends.


def test_cancel_is_heard_at_once_and_the_dit_is_freed_when_text_is_through() -> None:
    """A task is cancelled while its prompt is encoded. It fails at once; the embedding that is still on its way to
    the dit is purged when text is through with it, not before, or it would be left behind."""
    s = Stages()
    s.submit(task())
    assert s.tell(CancelAsked("a", CANCELLED)) == [Fail("a", CANCELLED), DropTask("text", "a")]
    assert s.scheduler.snapshot("a") is None
    assert s.ended("a", "text") == [Purge("dit", "a")]
    s.dropped("a", "text")
    assert len(s.scheduler) == 0


def test_cancel_in_the_last_step_frees_the_latents() -> None:
    """Cancelled while the last step runs: the dit drops at once, what it leaves for the vae is purged after its
    answer, and the acknowledgement may come first."""
    s = Stages()
    s.submit(task(denoise=1))
    s.ended("a", "text")
    assert s.tell(CancelAsked("a", CANCELLED)) == [Fail("a", CANCELLED), DropTask("dit", "a")]
    s.dropped("a", "text")
    assert s.dropped("a", "dit") == []
    assert s.ended("a", "denoise") == [Purge("vae", "a")]
    assert len(s.scheduler) == 0


def test_cancel_twice_or_too_late_does_nothing() -> None:
    """A second cancel, and one of a task that is unknown, change nothing."""
    s = Stages()
    s.submit(task())
    s.tell(CancelAsked("a", CANCELLED))
    assert s.tell(CancelAsked("a", CANCELLED)) == []
    assert s.tell(CancelAsked("never", CANCELLED)) == []


def given_to_the_writer(deadline: float | None) -> Stages:
    """A task all of whose frames the writer has; a cancel comes too late."""
    s = Stages()
    s.denoised(task(denoise=1, chunks=1, deadline=deadline))
    assert Grant("writer", "a", "write", 0) in s.ended("a", "decode")
    assert s.tell(CancelAsked("a", CANCELLED)) == []
    return s


def test_too_late_for_a_cancel_or_a_deadline_when_the_file_may_be_in_place() -> None:
    """The writer has the last chunk, and then begins to put the file in place. It dies, and the file is written again:
    the task ends well."""
    s = given_to_the_writer(deadline=5.0)
    assert s.scheduler.next_wakeup(1.0) is None
    s.tell(Placing("writer", s.epochs["writer"], "a"))
    assert s.tell(Tick(), 6.0) == []
    s.lost("writer", 6.0)
    assert s.tell(CancelAsked("a", CANCELLED), 6.0) == []
    s.up("writer", 9)
    s.ended("a", "decode")
    assert Finish("a") in s.ended("a", "write")


def test_a_writer_that_died_before_the_file_was_in_place_leaves_time_for_a_cancel() -> None:
    """The frames are decoded again, and nothing is at the final name: the task is cancelled, also though a cancel that
    came before was too late. What the dead writer is said to have begun is of no account any more."""
    s = given_to_the_writer(deadline=None)
    dead = s.epochs["writer"]
    assert Grant("vae", "a", "decode", 0) in s.lost("writer")
    s.up("writer", 9)
    s.tell(Placing("writer", dead, "a"))
    assert Fail("a", CANCELLED) in s.tell(CancelAsked("a", CANCELLED))


@pytest.mark.parametrize("lost_at", [4.0, 6.0])
def test_a_writer_that_died_before_the_file_was_in_place_leaves_time_for_a_deadline(lost_at: float) -> None:
    """It passes while the frames are decoded again, or had passed when the writer died: the task fails of it."""
    s = given_to_the_writer(deadline=5.0)
    actions = s.lost("writer", lost_at)
    if lost_at < 5.0:
        assert s.scheduler.next_wakeup(lost_at) == 5.0
        actions = s.tell(Tick(), 5.0)
    assert [action.error.code for action in actions if isinstance(action, Fail)] == ["deadline_exceeded"]
    assert s.scheduler.next_wakeup(lost_at) is None


def test_a_deadline_ends_the_task() -> None:
    """The scheduler wants to be woken at the deadline, and then the task fails with a sentence that says what to do."""
    s = Stages(up=())
    s.submit(task(deadline=5.0))
    assert s.scheduler.next_wakeup(1.0) == 5.0
    assert s.tell(Tick(), 4.9) == []
    (fail,) = s.tell(Tick(), 5.0)
    assert isinstance(fail, Fail) and fail.error.code == "deadline_exceeded" and "fewer steps" in fail.error.message
    assert s.scheduler.next_wakeup(5.0) is None


def test_an_error_fails_only_its_task() -> None:
    """A step that is not finite fails its request; the next task is begun, and the quantum granted ahead is ignored."""
    s = Stages(capacity(FOUR_DEVICES))
    s.submit(task("a"))
    s.submit(task("b"))
    s.ended("a", "text")
    s.ended("b", "text")
    error = Failure("numerical_error", "step 0 is not finite")
    actions = s.ended("a", "denoise", 0, error=error)
    assert actions == [
        Fail("a", error), DropTask("dit", "a"), BeginTask("dit", "b"), Grant("dit", "b", "denoise", 0),
    ]  # fmt: skip
    assert s.ended("a", "denoise", 1, dropped=True) == [Grant("dit", "b", "denoise", 1)]
    assert s.scheduler.snapshot("b") == Snapshot("running", "text", 1, 1)


# Crashes.


def test_the_dit_resumes_after_the_last_reported_step() -> None:
    """The dit dies with two steps outstanding: when it is up again, it is told of the task and asked for both."""
    s = Stages()
    s.submit(task(denoise=5))
    s.ended("a", "text")
    s.ended("a", "denoise", 0)
    assert s.lost("dit") == [Restart("dit", 0.0)]
    assert s.up("dit", 9) == [
        BeginTask("dit", "a"), Grant("dit", "a", "denoise", 1), Grant("dit", "a", "denoise", 2),
    ]  # fmt: skip
    assert s.tell(QuantumEnded("dit", 2, "a", "denoise", 1)) == []
    assert s.ended("a", "denoise", 1) == [Grant("dit", "a", "denoise", 3)]


def test_the_vae_resumes_at_the_first_chunk_that_was_not_reported() -> None:
    """The vae dies while it decodes; the slots of its chunks are kept, and decoding goes on where it was."""
    s = Stages(capacity(frames=2))
    s.denoised(task(chunks=3))
    s.ended("a", "decode", 0)
    s.lost("vae")
    s.ended("a", "write", 0)
    assert s.up("vae", 9) == [BeginTask("vae", "a"), Grant("vae", "a", "decode", 1), Grant("vae", "a", "decode", 2)]


def test_a_lost_file_is_decoded_again_from_the_start() -> None:
    """The writer dies over its file while the vae decodes: when the vae is through, the frames are purged, and
    everything is decoded and written again, into one file, in order."""
    s = Stages()
    s.denoised(task(chunks=3))
    s.ended("a", "decode", 0)
    s.ended("a", "write", 0)
    s.ended("a", "decode", 1)
    assert s.lost("writer") == [Restart("writer", 0.0)]
    assert s.up("writer", 9) == []
    assert s.ended("a", "decode", 2) == [
        Purge("writer", "a"), Grant("vae", "a", "decode", 0), Grant("vae", "a", "decode", 1),
    ]  # fmt: skip
    assert s.ended("a", "decode", 0) == [
        BeginTask("writer", "a"), Grant("writer", "a", "write", 0), Grant("vae", "a", "decode", 2),
    ]  # fmt: skip


def test_a_writer_that_dies_before_the_file_is_begun_costs_nothing() -> None:
    """No write was granted yet, so all chunks are still in the queue: nothing is decoded twice."""
    s = Stages()
    s.denoised(task(chunks=2))
    assert s.lost("writer") == [Restart("writer", 0.0)]
    s.ended("a", "decode", 0)
    assert s.up("writer", 9) == [BeginTask("writer", "a"), Grant("writer", "a", "write", 0)]


def test_a_dead_stage_is_purged_of_what_it_was_dropping() -> None:
    """The dit dies before it has answered a drop: nobody else will free the slots, so they are purged, and count as
    free."""
    s = Stages(capacity(prompts=1))
    s.submit(task("a"))
    s.submit(task("b"))
    s.ended("a", "text")
    s.tell(CancelAsked("a", CANCELLED))
    assert s.lost("dit") == [
        Purge("dit", "a"), Restart("dit", 0.0), BeginTask("text", "b"), Grant("text", "b", "text", 0),
    ]  # fmt: skip


def test_a_fused_process_dies_once() -> None:
    """One process carries all stages and dies: the first event speaks for all, nothing is granted to a dead process,
    and the task it was running is blamed once."""
    s = Stages(capacity(dict.fromkeys(STAGES, "process")), up=())
    for epoch in (1, 2):
        for stage in STAGES:
            s.up(stage, epoch)
        if epoch == 1:
            s.submit(task())
            s.ended("a", "text")
            assert s.lost("writer") == [Restart(stage, 0.0) for stage in STAGES]
            assert [s.lost(stage) for stage in STAGES] == [[], [], [], []]
    assert s.scheduler.snapshot("a") == Snapshot("running", "text", 1, 1)


def test_a_poisoned_request_is_set_aside() -> None:
    """The task that was running when its stage died twice fails; the one that was only granted ahead goes on."""
    s = Stages(capacity(FOUR_DEVICES))
    s.submit(task("bad", denoise=1))
    s.submit(task("good", denoise=2))
    s.ended("bad", "text")
    s.ended("good", "text")
    s.lost("dit")
    s.up("dit", 9)
    fail, *rest = s.lost("dit")
    assert isinstance(fail, Fail) and fail.id == "bad" and fail.error.code == "poisoned_request"
    assert rest == [Purge("dit", "bad"), Purge("vae", "bad"), Restart("dit", 0.5)]
    assert Grant("dit", "good", "denoise", 0) in s.up("dit", 10)


def test_kills_from_outside_are_no_fault_of_the_request() -> None:
    """Somebody kills the dit again and again, each time a step further: the task goes on, the stage is started again at
    once. Five times in the same step, and the task is set aside all the same."""
    s = Stages(capacity(FOUR_DEVICES))
    s.submit(task("a", denoise=20))
    s.ended("a", "text")
    for step in range(8):
        assert s.tell(StageLost("dit", s.epochs["dit"], outside=True)) == [Restart("dit", 0.0)]
        assert Grant("dit", "a", "denoise", step) in s.up("dit", 10 + step)
        s.ended("a", "denoise", step)
    for kill in range(4):
        assert s.tell(StageLost("dit", s.epochs["dit"], outside=True)) == [Restart("dit", 0.0)]
        s.up("dit", 20 + kill)
    fail = s.tell(StageLost("dit", s.epochs["dit"], outside=True))[0]
    assert isinstance(fail, Fail) and fail.error.code == "poisoned_request" and "killed 5 times" in fail.error.message


def test_restarts_grow_rarer_and_end() -> None:
    """A stage that dies at every start is restarted five times in a minute, after growing delays; then it is FAILED,
    tasks that need it fail with a sentence that says what to do, and so do those that come later."""
    s = Stages(up=())
    s.submit(task("a"))
    deaths = [s.tell(StageLost("dit", epoch), float(epoch)) for epoch in range(1, 6)]
    assert deaths == [[Restart("dit", delay)] for delay in (0.0, 0.5, 1.0, 2.0, 4.0)]
    declared, fail = s.tell(StageLost("dit", 6), 6.0)
    assert isinstance(declared, DeclareFailed) and "restart the engine" in declared.error.message
    assert isinstance(fail, Fail) and fail.error.code == "stage_failed" and "restart the engine" in fail.error.message
    (later,) = s.submit(task("b"))
    assert isinstance(later, Fail) and later.error == fail.error
    assert len(s.scheduler) == 0


def test_old_deaths_are_forgiven() -> None:
    """Five deaths long ago, of processes that were up, do not count: the sixth, after a minute, is answered by a
    restart without delay."""
    s = Stages(up=("text", "dit", "writer"))
    for epoch in range(11, 16):
        s.up("vae", epoch)
        s.lost("vae", float(epoch))
    s.up("vae", 16)
    assert s.lost("vae", 76.0) == [Restart("vae", 0.0)]


def test_a_stage_that_dies_slowly_at_every_start_is_given_up() -> None:
    """Each start takes half a minute and fails, so that no two minutes see many deaths: the sixth in a row is the last.
    One that comes up in between clears the account."""
    s = Stages(up=())
    delays = (0.0, 0.5, 1.0, 2.0, 4.0)
    for epoch in range(1, 6):
        assert s.tell(StageLost("dit", epoch), 100.0 * epoch) == [Restart("dit", delays[epoch - 1])]
    s.up("dit", 6)
    assert s.lost("dit", 600.0) == [Restart("dit", 0.0)]
    for epoch in range(7, 12):
        assert s.tell(StageLost("dit", epoch, outside=True), 100.0 * epoch) == [Restart("dit", delays[epoch - 7])]
    (declared,) = s.tell(StageLost("dit", 12), 1200.0)
    assert isinstance(declared, DeclareFailed)
    assert "died 6 times in a row before it was up" in declared.error.message


def test_a_stage_that_cannot_be_started_fails_its_tasks() -> None:
    """A bad checkpoint: restarting cannot help. Tasks that still need the stage fail with its reason, others go on."""
    s = Stages()
    s.denoised(task("a"))
    s.dropped("a", "dit")
    s.submit(task("b"))
    error = Failure("bad_checkpoint", "transformer: the file is truncated; fetch it again")
    declared, fail = s.tell(StageGone("dit", error))
    assert declared == DeclareFailed("dit", error)
    assert isinstance(fail, Fail) and fail.id == "b" and "fetch it again" in fail.error.message
    assert s.scheduler.snapshot("a") is not None


def test_a_stage_that_comes_back_is_used_again() -> None:
    """An operator repaired the stage and a new process came up: tasks are accepted again, and words of the old
    process are ignored."""
    s = Stages(up=("text",))
    s.tell(StageGone("dit", Failure("bad_checkpoint", "the file is truncated; fetch it again")))
    s.up("dit", 7)
    assert s.submit(task()) == [BeginTask("text", "a"), Grant("text", "a", "text", 0)]
    assert s.tell(StageLost("dit", 6)) == s.tell(StageUp("dit", 6)) == []
    assert Grant("dit", "a", "denoise", 0) in s.ended("a", "text")


def test_an_acknowledgement_of_a_dead_process_frees_nothing() -> None:
    """The vae died while it decoded; its successor is told of the task again, and to drop it when it is cancelled. A
    late acknowledgement of the dead one does not count."""
    s = Stages()
    s.denoised(task())
    s.lost("vae")
    s.up("vae", 9)
    assert DropTask("vae", "a") in s.tell(CancelAsked("a", CANCELLED))
    s.tell(TaskDropped("vae", 3, "a"))
    for quantum in (0, 1):
        s.ended("a", "decode", quantum, dropped=True)
    s.dropped("a", "text")
    s.dropped("a", "dit")
    assert len(s.scheduler) == 1
    s.dropped("a", "vae")
    assert len(s.scheduler) == 0


# Several dits.


def two_dits(*ids: str, **bounds: int) -> Stages:
    """Tasks of ten steps whose prompts are encoded, the first of them at "dit", the second at "dit:1"."""
    s = Stages(capacity(TWO_DITS, **bounds), up=("text", "dit", "dit:1", "vae", "writer"))
    for id in ids:
        s.submit(task(id, denoise=10))
        s.ended(id, "text")
    return s


def test_each_dit_has_its_task() -> None:
    """The first of two tasks goes to one dit, the second to the other, and each goes on where it began: a step that
    ends is followed by the next one there."""
    s = Stages(capacity(TWO_DITS), up=("text", "dit", "dit:1", "vae", "writer"))
    s.submit(task("a"))
    s.submit(task("b"))
    assert s.ended("a", "text") == [
        DropTask("text", "a"), BeginTask("dit", "a"), Grant("dit", "a", "denoise", 0), Grant("dit", "a", "denoise", 1),
    ]  # fmt: skip
    assert s.ended("b", "text") == [
        DropTask("text", "b"), BeginTask("dit:1", "b"), Grant("dit:1", "b", "denoise", 0),
        Grant("dit:1", "b", "denoise", 1),
    ]  # fmt: skip
    assert s.ended("b", "denoise", 0, "dit:1") == [Grant("dit:1", "b", "denoise", 2)]
    assert s.ended("a", "denoise", 0, "dit") == [Grant("dit", "a", "denoise", 2)]


def test_the_task_of_a_lost_dit_goes_to_the_one_that_is_free() -> None:
    """One dit dies in its task's third step while the other has nothing to do: it is told of the task at once and asked
    for that step and the next. When the first one is back, the task stays where it is."""
    s = two_dits("a")
    s.ended("a", "denoise", 0)
    s.ended("a", "denoise", 1)
    assert s.lost("dit") == [
        Restart("dit", 0.0), BeginTask("dit:1", "a"), Grant("dit:1", "a", "denoise", 2),
        Grant("dit:1", "a", "denoise", 3),
    ]  # fmt: skip
    assert s.up("dit", 9) == []
    assert s.tell(QuantumEnded("dit", 2, "a", "denoise", 2)) == []
    assert s.ended("a", "denoise", 2, "dit:1") == [Grant("dit:1", "a", "denoise", 4)]


def test_a_lost_dit_costs_its_siblings_nothing() -> None:
    """What the other dit is running goes on, and is not granted again. The lost task waits for the first dit that has
    room: here the one that died is back before the other is through."""
    s = two_dits("a", "b", states=4)
    assert s.lost("dit:1") == [Restart("dit:1", 0.0)]
    assert s.ended("a", "denoise", 0) == [Grant("dit", "a", "denoise", 2)]
    assert s.up("dit:1", 9) == [
        BeginTask("dit:1", "b"), Grant("dit:1", "b", "denoise", 0), Grant("dit:1", "b", "denoise", 1),
    ]  # fmt: skip


def test_a_dit_is_failed_and_the_other_goes_on() -> None:
    """One of two dits cannot be started: it is FAILED, its task goes to the other, and new ones are accepted. When the
    other is FAILED as well, what still needs a dit fails with its reason."""
    s = two_dits("a")
    error = Failure("bad_checkpoint", "transformer: the file is truncated; fetch it again")
    assert s.tell(StageGone("dit", error))[:2] == [DeclareFailed("dit", error), BeginTask("dit:1", "a")]
    assert s.submit(task("b")) == [BeginTask("text", "b"), Grant("text", "b", "text", 0)]
    failed = [action for action in s.tell(StageGone("dit:1", error)) if isinstance(action, Fail)]
    assert {fail.id for fail in failed} == {"a", "b"} and "fetch it again" in failed[0].error.message


def test_a_task_is_left_to_the_freer_dit() -> None:
    """The first dit has a step in hand and room for one more, the second has nothing to do: a new task is the second's,
    whoever is asked first."""
    s = two_dits("a")
    for step in range(9):
        s.ended("a", "denoise", step)
    s.submit(task("b", denoise=10))
    assert s.ended("b", "text")[1:] == [
        BeginTask("dit:1", "b"), Grant("dit:1", "b", "denoise", 0), Grant("dit:1", "b", "denoise", 1),
    ]  # fmt: skip


def test_a_task_stays_with_its_dit_while_another_is_idle() -> None:
    """A task has begun at one dit, and a shorter one goes before it there; the other dit loses its task and idles. The
    first task waits until the shorter one is denoised, and for nobody who comes meanwhile: that is the idle dit's. But
    when its dit dies, it goes to the other."""
    s = two_dits("a", "c", states=4)
    s.submit(task("b", denoise=2))
    s.ended("b", "text")
    assert s.ended("a", "denoise", 0)[1:] == [Grant("dit", "b", "denoise", 0)]
    assert s.ended("a", "denoise", 1) == [Grant("dit", "b", "denoise", 1)]
    s.tell(CancelAsked("c", CANCELLED))
    s.ended("c", "denoise", 0, "dit:1", dropped=True)
    s.ended("c", "denoise", 1, "dit:1", dropped=True)
    s.submit(task("d", denoise=2))
    assert s.ended("d", "text")[1:] == [
        BeginTask("dit:1", "d"), Grant("dit:1", "d", "denoise", 0), Grant("dit:1", "d", "denoise", 1),
    ]  # fmt: skip
    assert s.ended("b", "denoise", 0) == [Grant("dit", "a", "denoise", 2)]
    s.tell(CancelAsked("d", CANCELLED))
    s.ended("d", "denoise", 0, "dit:1", dropped=True)
    s.ended("d", "denoise", 1, "dit:1", dropped=True)
    moved = s.lost("dit")
    assert BeginTask("dit:1", "a") in moved and Grant("dit:1", "a", "denoise", 2) in moved


def test_a_dit_that_dies_while_it_drops_is_purged() -> None:
    """The task was cancelled; the dit that had it dies before it has dropped it: its slots are freed in its place."""
    s = two_dits("a")
    assert DropTask("dit", "a") in s.tell(CancelAsked("a", CANCELLED))
    assert s.lost("dit") == [Purge("dit", "a"), Restart("dit", 0.0)]
