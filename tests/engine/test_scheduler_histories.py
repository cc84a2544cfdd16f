"""Thousands of seeded histories of the scheduler, and broken schedulers that they must catch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.events import (
    CancelAsked,
    Capacity,
    DropTask,
    Finish,
    Placing,
    Purge,
    QuantumEnded,
    StageLost,
    Submitted,
    TaskDropped,
    TokensChanged,
)
from engine.records import PHASES_OF, Key, Quantum, Shortage, StageRecord, TaskRecord
from engine.scheduler import Scheduler
from ipc.errors import Failure
from ipc.messages.names import Phase, Seat, StageName
from ipc.messages.reports import Parts
from tests.engine.observer import Violation
from tests.engine.simulator import simulate

ROOT = Path(__file__).parents[2]

HISTORIES = 10_000

MUST_HAPPEN = (
    "finished", "kills", "moves", "poisonings", "hunts", "start failures", "StageGone", "Tick", "failed: cancelled",
    "failed: deadline_exceeded", "failed: numerical_error", "failed: poisoned_request", "failed: stage_failed",
    "failed: out_of_memory", "shortages", "raises", "refused raises", "late cancels", "parts",
    "cancels after a lost file", "last words", "moves of all", "TokensChanged",
)  # fmt: skip


@pytest.mark.timeout(600)
def test_ten_thousand_histories() -> None:
    """Random tasks, cancels, deadlines, crashes and failures, on random capacities under both policies: every promise
    holds in every history, and every kind of fault was seen to happen."""
    command = [sys.executable, "-m", "tests.engine.simulator", "--seeds"]
    halves = (f"0:{HISTORIES // 2}", f"{HISTORIES // 2}:{HISTORIES}")
    runs = [
        subprocess.Popen([*command, half], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for half in halves
    ]
    ended = [(*run.communicate(timeout=500), run.returncode) for run in runs]
    for output, errors, status in ended:
        assert status == 0, errors
        assert [kind for kind in MUST_HAPPEN if kind not in output] == []


def test_a_history_replays_exactly() -> None:
    """The same seed gives the same history, event by event."""
    command = [sys.executable, "-m", "tests.engine.simulator", "--seed", "4711", "--trace"]
    first, second = (subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60) for _ in range(2))
    histories = [[line for line in run.stdout.splitlines() if "histories" not in line] for run in (first, second)]
    assert histories[0] == histories[1]
    assert "Submitted" in first.stdout and "Grant" in first.stdout


# Broken schedulers.


class ForgetsADrop(Scheduler):
    """The text stage keeps its tasks for ever."""

    def _drop(self, task: TaskRecord, stage: StageName) -> None:
        if stage == "text":
            task.left.add(stage)
        else:
            super()._drop(task, stage)


class DropsTwice(Scheduler):
    def _drop(self, task: TaskRecord, stage: StageName) -> None:
        super()._drop(task, stage)
        if stage == "vae" and task.told.get(stage):
            self._actions.append(DropTask(stage, task.id))


class DropsTooEarly(Scheduler):
    """Tells a stage to drop while something is still on its way there."""

    def _let_go(self, task: TaskRecord) -> None:
        for stage in PHASES_OF:
            if stage not in task.left:
                self._drop(task, stage)
        self._forget_if_clean(task)


class GrantsTwice(Scheduler):
    def _grant(self, task: TaskRecord, stage: StageRecord, phase: Phase) -> None:
        super()._grant(task, stage, phase)
        if phase == "write":
            self._actions.append(self._actions[-1])


class IgnoresBackpressure(Scheduler):
    """Believes that there are more slots of frames than there are."""

    def __init__(self, capacity: Capacity, *rest: Any) -> None:
        super().__init__(msgspec.structs.replace(capacity, frames=100), *rest)


class IgnoresTheToken(Scheduler):
    """Lets stages compute at once on one device."""

    def __init__(self, capacity: Capacity, *rest: Any) -> None:
        alone: dict[Seat, str | None] = dict.fromkeys(capacity.devices)
        super().__init__(msgspec.structs.replace(capacity, devices=alone), *rest)


class KeepsSlots(Scheduler):
    """Does not count the slots that a stage has freed."""

    def handle_task_dropped(self, event: TaskDropped) -> None:
        task = self._tasks.get(event.id)
        if task is not None and event.stage in task.told:
            del task.told[event.stage]
            self._forget_if_clean(task)


class NeverPurges(Scheduler):
    def _purge(self, task: TaskRecord, stage: StageName) -> None:
        self._ledger.give_all(task, stage)


class PurgesNothingAndWaits(Scheduler):
    """Leaves it to a dead process to free its slots."""

    def _purge(self, task: TaskRecord, stage: StageName) -> None:
        pass


class BelievesTheDead(Scheduler):
    """Takes reports of a process that is gone for those of its successor."""

    def handle_quantum_ended(self, event: QuantumEnded) -> None:
        super().handle_quantum_ended(msgspec.structs.replace(event, epoch=self._stages[event.stage].epoch))


class LosesQuanta(Scheduler):
    """What a dead process was running is never granted again."""

    def _lose(self, stages: list[StageRecord], epoch: int) -> None:
        lost = [quantum for stage in stages for quantum in stage.outstanding]
        super()._lose(stages, epoch)
        for task, phase, number in lost:
            task.granted[phase] = task.done[phase] = number + 1


class UsesEveryDit(Scheduler):
    """Has a task denoised wherever there is room, though another dit has it."""

    def _may_have(self, stage: StageRecord, task: TaskRecord) -> bool:
        return True


class LosesTheSiblings(Scheduler):
    """When a dit dies, grants again what the others are running."""

    def _lose(self, stages: list[StageRecord], epoch: int) -> None:
        super()._lose(stages, epoch)
        for task in self._tasks.values() if any(stage.stage == "dit" for stage in stages) else ():
            task.granted["denoise"] = task.done["denoise"]


class WaitsForTheDead(Scheduler):
    """Keeps a task of a dit that died for that dit, though another is free."""

    def __init__(self, capacity: Capacity, *rest: Any) -> None:
        super().__init__(capacity, *rest)
        self.last: dict[str, str] = {}

    def _may_have(self, stage: StageRecord, task: TaskRecord) -> bool:
        return self.last.get(task.id, stage.name) == stage.name and super()._may_have(stage, task)

    def _grant(self, task: TaskRecord, stage: StageRecord, phase: Phase) -> None:
        super()._grant(task, stage, phase)
        if phase == "denoise":
            self.last[task.id] = stage.name


class GivesUpWithOneDit(Scheduler):
    """Fails every task when one dit is FAILED, whatever the others do."""

    def _fail_hopeless(self) -> None:
        failed = [stage.failed for stage in self._stages.values() if stage.failed is not None]
        for task in self._line.all() if failed else ():
            self._fail(task, Failure("stage_failed", failed[0].message))


class DoesNotTellANewProcess(Scheduler):
    def _lose(self, stages: list[StageRecord], epoch: int) -> None:
        told = {id: dict(task.told) for id, task in self._tasks.items()}
        super()._lose(stages, epoch)
        for id, task in self._tasks.items():
            task.told.update({s: state for s, state in told[id].items() if state == "begun"})


class AppendsToALostFile(Scheduler):
    """Goes on writing where the dead writer was."""

    def _rewind(self, task: TaskRecord) -> None:
        task.rewinding = False


class PurgesUnderTheVae(Scheduler):
    """Purges the frames of a lost file while the vae is still decoding more of them."""

    def _lose(self, stages: list[StageRecord], epoch: int) -> None:
        super()._lose(stages, epoch)
        self._actions += [Purge("writer", task.id) for task in self._tasks.values() if task.rewinding]


class RestartsForEver(Scheduler):
    def on(self, event: Any, now: float) -> Any:
        for stage in self._stages.values():
            stage.deaths.clear()
            stage.failed_starts = 0
        return super().on(event, now)


class ForgivesPoison(Scheduler):
    def _blame(self, quantum: Quantum, outside: bool) -> None:
        pass


class BlamesTheHunted(Scheduler):
    """Sets a task aside for two kills from outside, whatever it has done between them."""

    def _blame(self, quantum: Quantum, outside: bool) -> None:
        super()._blame(quantum, False)


class NeverTiresOfKills(Scheduler):
    """Takes every kill from outside for the first one."""

    def _blame(self, quantum: Quantum, outside: bool) -> None:
        quantum.task.kills = 0
        super()._blame(quantum, outside)


class CountsKillsForEver(Scheduler):
    """Gives up a stage that was killed from outside a few times."""

    def handle_stage_lost(self, event: StageLost, now: float) -> None:
        super().handle_stage_lost(msgspec.structs.replace(event, outside=False), now)


class IgnoresCancels(Scheduler):
    def handle_cancel_asked(self, event: CancelAsked) -> None:
        pass


class CancelsWhatIsInPlace(Scheduler):
    """Calls a task cancelled whose file may be there already."""

    def handle_cancel_asked(self, event: CancelAsked) -> None:
        task = self._tasks.get(event.id)
        if task is not None and not task.ended:
            self._fail(task, event.error)


class IsTooLateForGood(Scheduler):
    """Takes a file that was lost before it was in place for one that may be there."""

    def _rewind(self, task: TaskRecord) -> None:
        task.in_place = task.in_place or task.placing
        super()._rewind(task)


class ForgetsWhatIsInPlace(Scheduler):
    """Takes a file that a dead writer has put in place for one that is lost."""

    def handle_placing(self, event: Placing) -> None:
        pass


class IgnoresDeadlines(Scheduler):
    def _expire(self, now: float) -> None:
        pass


class FinishesWhatFailed(Scheduler):
    def _fail(self, task: TaskRecord, error: Failure) -> None:
        super()._fail(task, error)
        self._actions.append(Finish(task.id))


class FinishesEarly(Scheduler):
    """Calls a task done when its last chunk is granted to the writer."""

    def _grant(self, task: TaskRecord, stage: StageRecord, phase: Phase) -> None:
        super()._grant(task, stage, phase)
        if phase == "write" and task.granted["write"] == task.total["write"]:
            self._actions.append(Finish(task.id))


class LastComesFirst(Scheduler):
    """Among equals, serves the newest task first."""

    def handle_submitted(self, event: Submitted) -> None:
        super().handle_submitted(event)
        for task in self._line.waiting:
            task.key = Key(task.key.rank, -task.arrival)
        self._line.waiting.sort(key=lambda task: task.key)


class FailsForMemory(Scheduler):
    """Does not ask for a higher level."""

    def _find_memory(self, task: TaskRecord, stage: StageRecord, lack: Shortage) -> None:
        self._fail(task, lack.error)


class NeverAsksForMemory(Scheduler):
    """Waits for a level that somebody else may ask for."""

    def _find_memory(self, task: TaskRecord, stage: StageRecord, lack: Shortage) -> None:
        if stage.top <= lack.level:
            self._fail(task, lack.error)


class TriesAgainAtOnce(Scheduler):
    """Grants what had not enough memory again at the same level."""

    def _run_short(self, task: TaskRecord, stage: StageRecord, phase: Phase, error: Failure) -> None:
        super()._run_short(task, stage, phase, error)
        task.short.clear()


class CountsWhatWasGrantedAhead(Scheduler):
    """Takes the quantum after one that had not enough memory for done."""

    def _take_back(self, task: TaskRecord, phase: Phase) -> None:
        super()._take_back(task, phase)
        if task.short and task.outstanding(phase) == 0 and not task.complete(phase):
            task.granted[phase] = task.done[phase] = task.done[phase] + 1


class TakesAPartForTheWhole(Scheduler):
    """Believes that an unfinished quantum has put what it is for."""

    def handle_quantum_ended(self, event: QuantumEnded) -> None:
        super().handle_quantum_ended(msgspec.structs.replace(event, parts=None))


class GrantsAheadOfParts(Scheduler):
    """Grants the next quantum beside one that is done in parts."""

    def _do_part(self, task: TaskRecord, phase: Phase, parts: Parts, seconds: float) -> None:
        super()._do_part(task, phase, parts, seconds)
        task.parts.clear()


class IdlesAfterACrash(Scheduler):
    """Grants nothing to a stage that was restarted."""

    def _choose(self, stages: list[StageRecord]) -> Any:
        return super()._choose([stage for stage in stages if not stage.deaths])


class KeepsTheTokens(Scheduler):
    """Has the stages take turns as before, whichever share a process now."""

    def handle_tokens_changed(self, event: TokensChanged) -> None:
        pass


class BlamesWhoWasAsked(Scheduler):
    """Takes a process that was asked to leave for one that died of what it had in hand."""

    def handle_stage_lost(self, event: StageLost, now: float) -> None:
        super().handle_stage_lost(msgspec.structs.replace(event, asked=False), now)


@pytest.mark.parametrize("broken", Scheduler.__subclasses__())
def test_a_broken_scheduler_is_caught(broken: type[Scheduler]) -> None:
    """Every way of breaking the scheduler breaks a promise within the first thousand histories."""
    with pytest.raises(Violation, match="replay"):
        for seed in range(1000):
            simulate(seed, broken)
