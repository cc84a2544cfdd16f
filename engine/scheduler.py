"""What runs next, where: a pure object, events in, actions out.

No I/O, no clock, no randomness: the same events at the same times give the same actions, so that whole histories are
replayed in tests (`tests/engine/simulator.py`). What it keeps to:

- One compute token per device: stages that share a device never have quanta outstanding together. Each seat has at
  most two quanta outstanding, one in flight and the next.
- Of several dits, a task is with one at a time, so that what the device holds for it is made once. It stays there while
  another is idle (docs/reliability.md says why). When that process is lost, the task goes to whichever is free first,
  at its last step. While one dit is not FAILED, no task fails for want of it.
- At each quantum the policy chooses (`engine/estimates.py`) among the tasks whose inputs are there and whose slots are
  free (`engine/readiness.py`). A slot is held from the grant that will fill it, so no queue ever makes a stage wait.
- Every stage that was told of a task is told once to drop it, and only when nothing on its way there is still being
  made; what a dead process cannot free is purged.
- A quantum that fails for want of memory is granted again once the stage's process takes less of its device's memory
  (`RaiseLevel`, `LevelChanged`), once at each level above; what was granted ahead of it counts for nothing. Where there
  is no higher level, it fails its task.
- A quantum may be unfinished: the stage does the work of a phase in parts, one in each quantum, and only it knows how
  many. The quantum is granted again, alone, until no part is left; of what was granted ahead of it only the part that
  it did counts.
- Lost quanta are granted again. A task ends exactly once, with `Finish` or `Fail`.
- A task that is cancelled, or whose deadline passes, leaves no file. It is too late for both while a writer has the
  last chunk, and for good once one has begun to put the file in place.
"""

from __future__ import annotations

import bisect
import collections
from typing import Literal

import msgspec

from engine.estimates import Policy
from engine.events import (
    Action,
    BeginTask,
    CancelAsked,
    Capacity,
    DeclareFailed,
    DropTask,
    Event,
    Fail,
    Finish,
    Grant,
    LevelChanged,
    Placing,
    Purge,
    QuantumEnded,
    RaiseLevel,
    Report,
    Restart,
    StageGone,
    StageLost,
    StageUp,
    Submitted,
    TaskDropped,
    Tick,
    TokensChanged,
)
from engine.line import Line
from engine.params import STAGES
from engine.readiness import ready
from engine.records import (
    FEEDS,
    GRANTED_AHEAD,
    RESTART_DELAYS,
    RESTART_WINDOW,
    Ledger,
    Quantum,
    Shortage,
    StageRecord,
    TaskRecord,
    check_outstanding,
)
from engine.scheduler_state import SchedulerState, put_back, state_of_stage, state_of_task, task_of_state
from ipc.errors import DeadlineExceeded, EngineError, Failure, OutOfMemory, PoisonedRequest, StageFailed, to_failure
from ipc.messages.names import STAGE_OF_PHASE, Phase, Seat, StageName
from ipc.messages.reports import Parts

CRASHES = 2
"""Processes that die of a task before it is set aside."""

KILLS = 5
"""Processes killed from outside one after another in the same quantum of a task before it is set aside: somebody may
have a reason that cannot be seen here, such as the memory limit of a container."""


class Snapshot(msgspec.Struct, frozen=True):
    """Where an unfinished task is: `step` of `steps` of `phase` is done, unfinished quanta included."""

    state: Literal["queued", "running"]
    phase: Phase | Literal["queued"]
    step: int
    steps: int


class Scheduler:
    """Decides for all tasks of one engine. `now` never goes back.

    Memory is bounded by the tasks that have not ended, and those that have but are still being dropped somewhere.
    """

    def __init__(self, capacity: Capacity, policy: Policy = "shortest") -> None:
        self._capacity, self._policy = capacity, policy
        self._ledger = Ledger(capacity)
        self._line = Line(policy, self._ledger.dits)
        self._stages: dict[Seat, StageRecord] = {seat: StageRecord(seat) for seat in capacity.devices}
        self._seats = {name: [s for s in self._stages.values() if s.stage == name] for name in STAGES}
        self._share()
        self._tasks: dict[str, TaskRecord] = {}
        """All of them, also those that have ended and are not yet forgotten."""
        self._deadlines: list[tuple[float, int, TaskRecord]] = []
        """Of tasks that have not ended. Sorted."""
        self._arrivals = 0
        self._actions: list[Action] = []

    def on(self, event: Event, now: float) -> list[Action]:
        """Take note of `event`, which happened at `now`, and say what is to be done, in this order."""
        self._actions = []
        match event:
            case QuantumEnded():
                self.handle_quantum_ended(event)
            case TaskDropped():
                self.handle_task_dropped(event)
            case Placing():
                self.handle_placing(event)
            case Submitted():
                self.handle_submitted(event)
            case CancelAsked():
                self.handle_cancel_asked(event)
            case StageUp():
                self.handle_stage_up(event)
            case StageLost():
                self.handle_stage_lost(event, now)
            case StageGone():
                self.handle_stage_gone(event)
            case LevelChanged():
                self.handle_level_changed(event)
            case TokensChanged():
                self.handle_tokens_changed(event)
            case Tick():
                pass
        self._expire(now)
        self._plan()
        return self._actions

    # Events.

    def handle_submitted(self, event: Submitted) -> None:
        """A new task waits in line, or fails at once if a stage it needs has failed."""
        spec = event.task
        assert spec.id not in self._tasks, f"task {spec.id} was submitted twice"
        assert spec.denoise > 0 and spec.chunks > 0, f"task {spec.id} has nothing to compute"
        task = TaskRecord.of(spec, self._arrivals)
        self._arrivals += 1
        self._tasks[spec.id] = task
        self._line.join(task)
        self._watch_deadline(task)
        self._report(task)

    def handle_cancel_asked(self, event: CancelAsked) -> None:
        """The task fails now; one that has ended, is unknown or may be in its place already stays as it is."""
        task = self._tasks.get(event.id)
        if task is not None and not task.ended and not task.placing:
            self._fail(task, event.error)

    def handle_quantum_ended(self, event: QuantumEnded) -> None:
        """The first outstanding quantum of the stage was answered. What is of a dead process, or was not asked, is
        ignored; a stage that answers nothing else is found by the supervisor's watch."""
        stage = self._stages[event.stage]
        if event.epoch != stage.epoch or not stage.outstanding:
            return
        task, phase, index = stage.outstanding[0]
        if (task.id, phase, index) != (event.id, event.phase, event.index):
            return
        stage.outstanding.popleft()
        in_turn = index == task.done[phase]
        if not task.ended and event.parts is not None and not (in_turn and not event.parts.left):
            self._do_part(task, phase, event.parts, event.seconds)
            return
        if not task.ended and not in_turn:
            self._take_back(task, phase)
            return
        if not task.ended and event.error is not None and event.error.code == OutOfMemory.code:
            self._run_short(task, stage, phase, event.error)
            return
        task.done[phase] += 1
        if task.ended:
            self._let_go(task)
        elif event.error is not None:
            self._fail(task, event.error)
        elif event.dropped:
            self._fail(task, to_failure(EngineError(f"the {stage.stage} stage lost the request; submit it again")))
        elif task.rewinding and phase == "decode":
            self._rewind(task)
        else:
            self._advance(task, phase, event)

    def handle_task_dropped(self, event: TaskDropped) -> None:
        """The stage has freed the task's slots. What is of a dead process is ignored."""
        stage, task = self._stages[event.stage], self._tasks.get(event.id)
        if event.epoch != stage.epoch or task is None or task.told.get(stage.name) != "dropping":
            return
        del task.told[stage.name]
        self._ledger.give_all(task, stage.stage)
        self._forget_if_clean(task)

    def handle_placing(self, event: Placing) -> None:
        """The file may be in its place from now on, whatever becomes of the writer."""
        stage, task = self._stages[event.stage], self._tasks.get(event.id)
        if event.epoch == stage.epoch and task is not None:
            task.in_place = True

    def handle_stage_up(self, event: StageUp) -> None:
        """The stage takes quanta; what was lost is granted again, as all else is, by `_plan`."""
        stage = self._stages[event.stage]
        if event.epoch > stage.epoch:
            assert not stage.up, f"a second {stage.name} process came up before the first was lost"
            stage.epoch, stage.up, stage.failed = event.epoch, True, None

    def handle_stage_lost(self, event: StageLost, now: float) -> None:
        """A process is dead: blame what it was running, take note of what is lost, restart its stages or give up."""
        if self._stages[event.stage].is_stale(event.epoch):
            return
        lost = [s for s in self._stages.values() if s.name == event.stage or (s.up and s.epoch == event.epoch)]
        came_up = self._stages[event.stage].up
        blamed = {stage.outstanding[0].task: stage.outstanding[0] for stage in lost if stage.outstanding}
        self._lose(lost, event.epoch)
        if not event.asked:
            for quantum in blamed.values():
                self._blame(quantum, event.outside)
        for stage in lost:
            delay = stage.restart_delay(now, event.outside or event.asked, came_up)
            if delay is not None:
                self._actions.append(Restart(stage.name, delay))
            else:
                self._declare_failed(stage, _died_too_often(stage))

    def handle_stage_gone(self, event: StageGone) -> None:
        """The process could not become this stage; restarting cannot help."""
        stage = self._stages[event.stage]
        if stage.up:
            self._lose([stage], stage.epoch)
        self._declare_failed(stage, event.error)

    def handle_level_changed(self, event: LevelChanged) -> None:
        """What waits for a higher level may go on, waits for another one, or fails if there is none."""
        stage = self._stages[event.stage]
        stage.level, stage.top = event.level, event.top
        for task in self._line.all():
            for phase, lack in list(task.short.items()):
                if not task.ended and task.seat(stage.stage) == stage.name and STAGE_OF_PHASE[phase] == stage.stage:
                    self._find_memory(task, stage, lack)

    def handle_tokens_changed(self, event: TokensChanged) -> None:
        """Other stages share a process, or none do. Deaths until now say nothing against the processes to come."""
        assert event.devices.keys() == self._stages.keys(), f"the seats are {list(self._stages)}"
        assert not any(stage.up for stage in self._stages.values()), "the tokens change while no process is up"
        self._capacity = msgspec.structs.replace(self._capacity, devices=event.devices)
        self._share()
        for stage in self._stages.values():
            stage.deaths, stage.failed_starts = [], 0

    # A task's way.

    def _advance(self, task: TaskRecord, phase: Phase, event: QuantumEnded) -> None:
        """A quantum is done."""
        task.phase = phase
        task.short.pop(phase, None)
        quanta = 1.0 if event.parts is None else task.note_parts(phase, event.parts)
        self._line.measured(task, phase, event.seconds, quanta)
        if phase == "write":
            self._ledger.give(task, "frames", 1)
        self._report(task)
        if not task.complete(phase):
            return
        if phase == "text":
            self._drop(task, "text")
        elif phase == "denoise":
            self._drop(task, "dit")
        elif phase == "write":
            self._actions.append(Finish(task.id))
            self._end(task)

    def _do_part(self, task: TaskRecord, phase: Phase, parts: Parts, seconds: float) -> None:
        """A quantum is unfinished, or did a part out of its turn, as it was granted ahead of one that is."""
        task.phase = phase
        task.short.pop(phase, None)
        quanta = task.note_parts(phase, parts)
        self._take_back(task, phase)
        self._line.measured(task, phase, seconds, quanta)
        self._report(task)

    def _run_short(self, task: TaskRecord, stage: StageRecord, phase: Phase, error: Failure) -> None:
        """A quantum had not enough memory: it has another try if it has had none at this level."""
        self._take_back(task, phase)
        before = task.short.get(phase)
        if before is not None and before.level >= stage.level:
            self._fail(task, error)
            return
        lack = task.short[phase] = Shortage(stage.level, error)
        self._find_memory(task, stage, lack)

    def _find_memory(self, task: TaskRecord, stage: StageRecord, lack: Shortage) -> None:
        if stage.top <= lack.level:
            self._fail(task, lack.error)
        elif stage.level <= lack.level:
            self._actions.append(RaiseLevel(stage.name, lack.level))

    def _take_back(self, task: TaskRecord, phase: Phase) -> None:
        """A quantum that will be granted again was answered."""
        task.granted[phase] -= 1
        if task.rewinding and phase == "decode":
            self._rewind(task)

    def _fail(self, task: TaskRecord, error: Failure) -> None:
        self._actions.append(Fail(task.id, error))
        self._end(task)

    def _end(self, task: TaskRecord) -> None:
        """The task is over for its client; the stages are told as soon as they can be."""
        task.ended = True
        self._line.leave(task)
        self._watch_no_deadline(task)
        self._let_go(task)

    def _watch_deadline(self, task: TaskRecord) -> None:
        if task.spec.deadline is not None and not task.placing:
            bisect.insort(self._deadlines, (task.spec.deadline, task.arrival, task))

    def _watch_no_deadline(self, task: TaskRecord) -> None:
        if task.spec.deadline is not None and not task.placing:
            del self._deadlines[bisect.bisect_left(self._deadlines, (task.spec.deadline, task.arrival))]

    def _let_go(self, task: TaskRecord) -> None:
        """Drop an ended task wherever nothing more can arrive for it."""
        for stage in STAGES:
            if stage not in task.left and not task.fed(stage):
                self._drop(task, stage)
        self._forget_if_clean(task)

    def _drop(self, task: TaskRecord, stage: StageName) -> None:
        """This stage has nothing more to do for the task: let it free its slots, or free them for it."""
        task.left.add(stage)
        if (seat := task.seat(stage)) is not None:
            task.told[seat] = "dropping"
            self._actions.append(DropTask(seat, task.id))
        else:
            self._purge(task, stage)

    def _purge(self, task: TaskRecord, stage: StageName) -> None:
        if self._ledger.holds_for(task, stage):
            self._actions.append(Purge(stage, task.id))
            self._ledger.give_all(task, stage)

    def _forget_if_clean(self, task: TaskRecord) -> None:
        """The last word of the last stage: nothing is held, nothing is outstanding."""
        if task.ended and len(task.left) == len(STAGES) and not task.told and not task.any_outstanding():
            del self._tasks[task.id]

    def _rewind(self, task: TaskRecord) -> None:
        """The writer's file is lost, and the frames that went into it: decode from the start, once the vae is through
        with what it has in hand. A file that is not in place leaves time for a cancel or a deadline again."""
        if task.outstanding("decode"):
            return
        if task.placing and not task.in_place:
            task.placing = False
            self._watch_deadline(task)
        task.rewinding = False
        task.phase = "decode"
        for phase in ("decode", "write"):
            task.granted[phase] = task.done[phase] = 0
        self._actions.append(Purge("writer", task.id))
        self._ledger.give_all(task, "writer")
        self._line.moved(task)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            message = "the deadline passed before the video was done; allow more time, or ask for fewer steps or frames"
            self._fail(self._deadlines[0][2], to_failure(DeadlineExceeded(message)))

    # Crashes.

    def _lose(self, stages: list[StageRecord], epoch: int) -> None:
        """These processes are gone, with what was outstanding there; every task goes back to what was reported done."""
        tasks = list(self._tasks.values())
        for task in tasks if any(stage.name == "writer" for stage in stages) else ():
            task.rewinding = task.rewinding or (task.granted["write"] > 0 and not task.ended)
        for stage in stages:
            stage.epoch, stage.up = epoch, False
            for task, phase, _ in stage.outstanding:
                task.granted[phase] = task.done[phase]
            stage.outstanding.clear()
        for task in tasks:
            for stage in stages:
                told = task.told.pop(stage.name, None)
                if told == "dropping":
                    self._purge(task, stage.stage)
                elif told is not None:  # a new process has other memory
                    task.short = {p: lack for p, lack in task.short.items() if STAGE_OF_PHASE[p] != stage.stage}
                    task.parts = {p: parts for p, parts in task.parts.items() if STAGE_OF_PHASE[p] != stage.stage}
            if task.ended:
                self._let_go(task)
            elif task.rewinding:
                self._rewind(task)

    def _blame(self, quantum: Quantum, outside: bool) -> None:
        """This quantum was running when a process died: count it, and set the task aside when it is too much."""
        task, stage = quantum.task, STAGE_OF_PHASE[quantum.phase]
        if outside:
            where = (quantum.phase, quantum.number)
            task.kills, task.killed_at = task.kills + 1 if task.killed_at == where else 1, where
        else:
            task.crashes += 1
        if task.ended or (task.crashes < CRASHES and task.kills < KILLS):
            return
        what = f"died {task.crashes} times of" if task.crashes >= CRASHES else f"were killed {task.kills} times in"
        message = (
            f"stage processes {what} this request, the last time {stage}; it was set aside so that others can go on: "
            "change the request, or look at the log of the stage"
        )
        self._fail(task, to_failure(PoisonedRequest(message)))

    def _declare_failed(self, stage: StageRecord, error: Failure) -> None:
        stage.failed = error
        self._actions.append(DeclareFailed(stage.name, error))

    def _fail_hopeless(self) -> None:
        """Tasks that need a stage all of whose seats are FAILED fail, those that are there and those that come."""
        for name, seats in self._seats.items():
            failures = [stage.failed for stage in seats if stage.failed is not None]
            if len(failures) < len(seats):
                continue
            error = to_failure(StageFailed(f"the {name} stage is not available: {failures[0].message}"))
            for task in self._line.all():
                if task.needs(name):
                    self._fail(task, error)

    # Grants.

    def _plan(self) -> None:
        """Grant all that may be granted. What a device leaves to a freer one it may take when that one has its fill."""
        self._fail_hopeless()
        while sum(self._fill(stages) for stages in self._devices):
            pass

    def _fill(self, stages: list[StageRecord]) -> int:
        """Grant this device what it may be granted; how much that was."""
        granted = 0
        while (choice := self._choose(stages)) is not None:
            self._grant(*choice)
            granted += 1
        return granted

    def _choose(self, stages: list[StageRecord]) -> tuple[TaskRecord, StageRecord, Phase] | None:
        """The next quantum for a device, or None: it has enough to do, nothing is ready, or the best is for a stage
        that must wait until the token is free."""
        holder = next((stage for stage in stages if stage.outstanding), None)
        if holder is not None and len(holder.outstanding) == GRANTED_AHEAD:
            return None
        for task in self._line:
            for stage in stages:
                phase = ready(task, stage, self._ledger, self._line)
                if phase is not None and self._may_have(stage, task):
                    return (task, stage, phase) if holder is None or holder is stage else None
            if holder is not None and self._moves_on(task, holder, stages):
                return None
        return None

    def _may_have(self, stage: StageRecord, task: TaskRecord) -> bool:
        """The task is at this seat, or at none of its stage, and no other seat is nearer to having nothing to do."""
        seats = self._seats[stage.stage]
        if len(seats) == 1:
            return True
        if (seat := task.seat(stage.stage)) is not None:
            return seat == stage.name
        return self._load(stage) == min(self._load(other) for other in seats if other.up)

    def _load(self, stage: StageRecord) -> int:
        """Quanta outstanding on the seat's device."""
        return sum(len(other.outstanding) for other in self._sharing[stage.name])

    def _moves_on(self, task: TaskRecord, holder: StageRecord, stages: list[StageRecord]) -> bool:
        """The task is about to need another stage of this device, or this one for its next part: nothing of a later
        task is put before that."""
        for running, phase, _ in holder.outstanding:
            if running is task and task.in_parts(phase):
                return True
            if running is task and task.granted[phase] == task.total[phase]:
                return any(stage.stage == FEEDS[phase] for stage in stages)
        return False

    def _grant(self, task: TaskRecord, stage: StageRecord, phase: Phase) -> None:
        """Take the slots the quantum will fill, and send it."""
        index = task.granted[phase]
        if not task.admitted:
            self._admit(task)
        if phase == "denoise" and not task.holds["states"]:
            self._ledger.take(task, "states")
        if phase == "denoise" and index == task.total["denoise"] - 1 and not task.holds["latents"]:
            self._ledger.take(task, "latents")
        if phase == "decode" and index == task.frames_until:
            self._ledger.take(task, "frames")
        if phase == "write" and index == task.total["write"] - 1:
            self._watch_no_deadline(task)
            task.placing = True
        if stage.name not in task.told:
            task.told[stage.name] = "begun"
            self._actions.append(BeginTask(stage.name, task.id))
        task.granted[phase] += 1
        stage.outstanding.append(Quantum(task, phase, index))
        self._actions.append(Grant(stage.name, task.id, phase, index))

    def _admit(self, task: TaskRecord) -> None:
        self._line.admit(task)
        self._ledger.take(task, "prompts")
        if task.spec.encode:
            self._ledger.take(task, "init_latents")

    def _report(self, task: TaskRecord) -> None:
        where, left = self._where(task), self._line.seconds_left(task)
        self._actions.append(Report(task.id, where.phase, where.step, where.steps, left))

    def _where(self, task: TaskRecord) -> Snapshot:
        phase = task.phase
        if phase == "queued":
            return Snapshot("running" if task.admitted else "queued", phase, 0, 1)
        return Snapshot("running", phase, *task.steps(phase))

    # Views.

    def __len__(self) -> int:
        """Tasks it remembers: those that have not ended, and those that some stage has not dropped yet."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """Tasks of which nothing was granted yet."""
        return len(self._line.waiting)

    @property
    def running(self) -> int:
        """Tasks that have begun and not ended."""
        return len(self._line.active)

    def snapshot(self, id: str) -> Snapshot | None:
        """Where a task is; None if it has ended or was never there."""
        task = self._tasks.get(id)
        return None if task is None or task.ended else self._where(task)

    def __contains__(self, id: str) -> bool:
        """It remembers this task."""
        return id in self._tasks

    def granted(self, id: str, phase: Phase) -> int:
        """Quanta of a task that has not ended that were granted: what becomes of it now holds from the next one on. One
        that is unfinished counts, also while it waits to be granted again."""
        task = self._tasks[id]
        return max(task.granted[phase], int(phase in task.parts))

    def seat_of(self, id: str, stage: StageName) -> Seat | None:
        """Where a task that has not ended is known to this stage."""
        return self._tasks[id].seat(stage)

    def seconds_left(self, id: str) -> float | None:
        """Estimated seconds until the task is done, with the tasks before it; None if it has ended or has no cost."""
        task = self._tasks.get(id)
        return None if task is None or task.ended else self._line.seconds_left(task)

    def retry_after(self) -> float:
        """Seconds, at least 1, until a task is likely to end and make room for another."""
        return max(1.0, min((task.seconds for task in self._line.all()), default=0.0))

    def next_wakeup(self, now: float) -> float | None:
        """When a `Tick` is due though nothing else happens: the next deadline, not before `now`. Ageing needs none, as
        it does not change the order; nor do restarts, whose delay is part of the action."""
        return max(now, self._deadlines[0][0]) if self._deadlines else None

    def check(self) -> list[str]:
        """Problems in the accounts; empty when all is well."""
        tasks, stages = self._tasks.values(), self._stages.values()
        problems = self._ledger.check(tasks) + check_outstanding(stages, tasks) + self._line.check()
        for sharing in self._devices:
            busy = [stage.name for stage in sharing if stage.outstanding]
            if len(busy) > 1:
                problems.append(f"{' and '.join(busy)} share a device and both have quanta outstanding")
        live = sum(not task.ended for task in self._tasks.values())
        if live != len(self._line.active) + len(self._line.waiting):
            problems.append(f"{live} tasks have not ended, but {self.running} are active and {self.waiting} waiting")
        return problems

    # From one program to the next.

    def state(self) -> SchedulerState:
        """All that it knows."""
        return SchedulerState(
            capacity=self._capacity, policy=self._policy,
            tasks=[state_of_task(task) for task in self._tasks.values()],
            stages=[state_of_stage(stage) for stage in self._stages.values()],
            active=[task.id for task in self._line.active], waiting=[task.id for task in self._line.waiting],
            ratio=self._line.estimates.ratio, learnt=self._line.estimates.learnt, arrivals=self._arrivals,
        )  # fmt: skip

    @classmethod
    def restored(cls, state: SchedulerState) -> Scheduler:
        """The scheduler that goes on from there. ValueError if the state contradicts itself."""
        made = cls(state.capacity, state.policy)
        made._tasks = {task.spec.id: task_of_state(task) for task in state.tasks}
        made._arrivals = state.arrivals
        try:
            made._put_back(state)
        except KeyError as error:
            raise ValueError(f"the scheduler's state speaks of {error}, which is not in it") from error
        if problems := made.check():
            raise ValueError(f"the scheduler's state is not in order: {'; '.join(problems)}")
        return made

    def _put_back(self, state: SchedulerState) -> None:
        for stage in state.stages:
            put_back(self._stages[stage.name], stage, self._tasks)
        self._line.active = [self._tasks[identity] for identity in state.active]
        self._line.waiting = [self._tasks[identity] for identity in state.waiting]
        self._line.estimates.ratio, self._line.estimates.learnt = dict(state.ratio), dict(state.learnt)
        for task in self._tasks.values():
            for slots, count in task.holds.items():
                self._ledger.held[slots] += count
            if not task.ended:
                self._watch_deadline(task)

    def _share(self) -> None:
        """Find the stages that share a compute token, in the order in which a task's next quantum is looked for:
        nearest to the finished file first, which frees slots soonest."""
        groups: dict[str, list[StageRecord]] = collections.defaultdict(list)
        for stage in [stage for name in reversed(STAGES) for stage in self._seats[name]]:
            device = self._capacity.devices[stage.name]
            groups[device if device is not None else f"none:{stage.name}"].append(stage)
        self._devices = list(groups.values())
        self._sharing = {stage.name: stages for stages in self._devices for stage in stages}


def _died_too_often(stage: StageRecord) -> Failure:
    times = len(RESTART_DELAYS) + 1
    when = "in a row before it was up" if stage.failed_starts >= times else f"within {RESTART_WINDOW:.0f} s"
    message = (
        f"the {stage.name} process died {times} times {when} and is not started again; look at its log, then restart "
        "the engine"
    )
    return to_failure(StageFailed(message))
