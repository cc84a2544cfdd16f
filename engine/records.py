"""What the scheduler remembers: tasks, stages, and which task holds which slots."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from engine.events import Capacity, TaskSpec
from ipc.errors import Failure
from ipc.messages.names import Phase, Seat, StageName, stage_of
from ipc.messages.reports import Parts

Slots = Literal["prompts", "init_latents", "states", "latents", "frames"]
"""What is bounded by the field of `Capacity` of that name."""

PHASES: tuple[Phase, ...] = ("text", "encode", "denoise", "decode", "write")

PHASES_OF: dict[StageName, tuple[Phase, ...]] = {
    "text": ("text",), "dit": ("denoise",), "vae": ("encode", "decode"), "writer": ("write",),
}  # fmt: skip

FEEDS: dict[Phase, StageName | None] = {
    "text": "dit", "encode": "dit", "denoise": "vae", "decode": "writer", "write": None,
}  # fmt: skip
"""Which stage takes up what a quantum of this phase leaves behind."""

FEEDERS: dict[StageName, tuple[Phase, ...]] = {
    stage: tuple(phase for phase, fed in FEEDS.items() if fed == stage) for stage in PHASES_OF
}

FREED_BY: dict[StageName, tuple[Slots, ...]] = {
    "text": (), "dit": ("prompts", "init_latents", "states"), "vae": ("latents",), "writer": ("frames",),
}  # fmt: skip
"""Slots that a stage frees when it drops a task."""

GRANTED_AHEAD = 2
"""Quanta outstanding per seat: one in flight and the next, so that a device never waits for a message."""

RESTART_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each restart within `RESTART_WINDOW`, or of a stage that does not come up; after the last of them the
stage is FAILED."""

RESTART_WINDOW = 60.0
"""Seconds."""


class Key(NamedTuple):
    """The order of the policy: smaller goes first. `arrival` makes it total."""

    rank: float
    arrival: int


class Shortage(NamedTuple):
    """A quantum has failed for want of memory: the level of the stage then, and what it said."""

    level: int
    error: Failure


@dataclass(slots=True, eq=False)
class TaskRecord:
    """One task: what was granted, what is done, what it holds, who knows it."""

    spec: TaskSpec
    arrival: int
    total: dict[Phase, int]
    granted: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    """Quanta granted and, but for the outstanding ones, answered: the index of the next."""
    done: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    holds: collections.Counter[Slots] = field(default_factory=collections.Counter)
    told: dict[Seat, Literal["begun", "dropping"]] = field(default_factory=dict)
    """Seats whose present process knows the task, or is forgetting it; one at most of each stage."""
    left: set[StageName] = field(default_factory=set)
    """Stages that have nothing more to do for the task, and were told to drop it or purged of it."""
    phase: Phase | Literal["queued"] = "queued"
    """Of the last quantum that was reported."""
    overtaken: float = 0.0
    """Seconds computed, since this task is there, for tasks that came later."""
    crashes: int = 0
    """Processes that died of a quantum of this task."""
    kills: int = 0
    """Processes that were killed from outside while they ran `killed_at`, one after another."""
    killed_at: tuple[Phase, int] | None = None
    """The quantum that was running at the last kill from outside."""
    admitted: bool = False
    """Slots for its inputs are held, from the first grant on."""
    rewinding: bool = False
    """The writer's file is lost: when no decode is outstanding, decoding starts over."""
    short: dict[Phase, Shortage] = field(default_factory=dict)
    """Phases whose next quantum has failed so. Until it, or a part of it, is done, it is granted alone, and only at a
    higher level."""
    parts: dict[Phase, Parts] = field(default_factory=dict)
    """Phases whose work the stage does in parts, and how far it is."""
    placing: bool = False
    """The last chunk was granted to the writer, which may put the file in place at any moment from then on: too late
    for a cancel or a deadline, whose task leaves no file. No more so when that writer has died before it did."""
    in_place: bool = False
    """A writer has begun to put the file in place: it may be there, also if that writer has died."""
    ended: bool = False
    """`Finish` or `Fail` is out; what is left is to be forgotten by the stages."""
    seconds: float = 0.0
    """Estimated work left."""
    key: Key = field(default_factory=lambda: Key(0.0, 0))

    @classmethod
    def of(cls, spec: TaskSpec, arrival: int) -> TaskRecord:
        total: dict[Phase, int] = {
            "text": 1, "encode": int(spec.encode), "denoise": spec.denoise, "decode": spec.chunks, "write": spec.chunks,
        }  # fmt: skip
        return cls(spec, arrival, total)

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def begun(self) -> bool:
        """Denoising has begun."""
        return self.granted["denoise"] > 0

    def outstanding(self, phase: Phase) -> int:
        """Quanta granted and not answered."""
        return self.granted[phase] - self.done[phase]

    def complete(self, phase: Phase) -> bool:
        return self.done[phase] == self.total[phase]

    def seat(self, stage: StageName) -> Seat | None:
        """Where this stage knows the task: there it stays until that process is lost or has dropped it."""
        return next((seat for seat in self.told if stage_of(seat) == stage), None)

    def needs(self, stage: StageName) -> bool:
        """The stage has something left to do for the task."""
        return any(not self.complete(phase) for phase in PHASES_OF[stage])

    @property
    def frames_until(self) -> int:
        """Chunks before this one were granted a slot of frames, which they hold until they are written."""
        return self.done["write"] + self.holds["frames"]

    def lacks_memory(self, phase: Phase, level: int) -> bool:
        """The next quantum of this phase is not to be granted at this level, or not before what was granted ahead of it
        is answered."""
        lack = self.short.get(phase)
        return lack is not None and (level <= lack.level or self.outstanding(phase) > 0)

    def in_parts(self, phase: Phase) -> bool:
        """Parts of this phase are left: its next quantum is likely to be unfinished, and is granted alone."""
        return phase in self.parts and self.parts[phase].left > 0

    def note_parts(self, phase: Phase, parts: Parts) -> float:
        """A quantum was answered; how many of the phase's quanta what it did is worth."""
        before = self.parts.get(phase)
        self.parts[phase] = parts
        advance = parts.done - (before.done if before is not None else 0)
        return self.total[phase] * max(0, advance) / parts.total

    def work_left(self, phase: Phase) -> float:
        """In quanta, of those that `TaskSpec.cost` is of."""
        if phase in self.parts:
            return self.total[phase] * self.parts[phase].left / self.parts[phase].total
        return self.total[phase] - self.done[phase]

    def steps(self, phase: Phase) -> tuple[int, int]:
        """Quanta of the phase that have been run, and all that there are, the unfinished ones included."""
        parts = self.parts.get(phase)
        if parts is None:
            return self.done[phase], self.total[phase]
        unfinished = parts.total - 1
        return self.done[phase] + min(parts.done, unfinished), self.total[phase] + unfinished

    def any_outstanding(self) -> bool:
        return self.granted != self.done

    def fed(self, stage: StageName) -> bool:
        """Something that this stage takes up is still being made."""
        return any(self.outstanding(phase) for phase in FEEDERS[stage])


class Quantum(NamedTuple):
    """A grant that was not answered."""

    task: TaskRecord
    phase: Phase
    number: int


@dataclass(slots=True, eq=False)
class StageRecord:
    """One seat: its process, what is outstanding there, how often it died."""

    name: Seat
    epoch: int = -1
    """Of the newest process that was heard of."""
    up: bool = False
    failed: Failure | None = None
    """FAILED, and why."""
    outstanding: collections.deque[Quantum] = field(default_factory=collections.deque)
    """In the order of the grants, which is the order of the answers."""
    deaths: list[float] = field(default_factory=list)
    """Times of the deaths within `RESTART_WINDOW`, which were answered by restarts."""
    level: int = 0
    """Of the memory of its device; the higher, the less it takes."""
    top: int = 0
    """The highest that it could be asked to keep."""
    failed_starts: int = 0
    """Processes that died before they were up, since one was: however long each took, as many as there are delays."""

    @property
    def stage(self) -> StageName:
        return stage_of(self.name)

    def is_stale(self, epoch: int) -> bool:
        """A process of this epoch is already known to be dead."""
        return epoch < self.epoch or (epoch == self.epoch and not self.up)

    def restart_delay(self, now: float, outside: bool, came_up: bool) -> float | None:
        """Record a death; the seconds to wait before the restart, or None when it died too often. A process that was
        up and was killed from outside says nothing against the stage."""
        self.failed_starts = 0 if came_up else self.failed_starts + 1
        if outside and came_up:
            return 0.0
        self.deaths = [time for time in self.deaths if now - time < RESTART_WINDOW]
        restart = max(len(self.deaths), self.failed_starts - 1)
        if restart >= len(RESTART_DELAYS):
            return None
        self.deaths.append(now)
        return RESTART_DELAYS[restart]


class Ledger:
    """How many slots of each kind are held. A slot is held from the grant that will fill it until it is free again."""

    def __init__(self, capacity: Capacity) -> None:
        self.limits: dict[Slots, int] = {
            "prompts": capacity.prompts, "init_latents": capacity.init_latents, "states": capacity.states,
            "latents": capacity.latents, "frames": capacity.frames,
        }  # fmt: skip
        self.held: dict[Slots, int] = dict.fromkeys(self.limits, 0)
        self.dits = sum(stage_of(seat) == "dit" for seat in capacity.devices)

    def free(self, slots: Slots) -> int:
        return self.limits[slots] - self.held[slots]

    def has_or_may(self, task: TaskRecord, slots: Slots) -> bool:
        """The task holds such a slot or could take one."""
        return task.holds[slots] > 0 or self.held[slots] < self.limits[slots]

    def take(self, task: TaskRecord, slots: Slots) -> None:
        self.held[slots] += 1
        task.holds[slots] += 1

    def give(self, task: TaskRecord, slots: Slots, count: int) -> None:
        self.held[slots] -= count
        task.holds[slots] -= count

    def holds_for(self, task: TaskRecord, stage: StageName) -> bool:
        """The task holds slots which this stage frees."""
        return any(task.holds[slots] for slots in FREED_BY[stage])

    def give_all(self, task: TaskRecord, stage: StageName) -> None:
        """This stage freed, or was purged of, all that is held for it."""
        for slots in FREED_BY[stage]:
            self.give(task, slots, task.holds[slots])

    def check(self, tasks: Collection[TaskRecord]) -> list[str]:
        """Problems in the accounts; empty when all is well."""
        problems = []
        for slots, limit in self.limits.items():
            held, counted = self.held[slots], sum(task.holds[slots] for task in tasks)
            if held != counted:
                problems.append(f"{slots}: {held} held, but tasks hold {counted}")
            if not 0 <= held <= limit:
                problems.append(f"{slots}: {held} held of {limit}")
            if any(task.holds[slots] < 0 for task in tasks):
                problems.append(f"{slots}: a task holds fewer than none")
        return problems


def check_outstanding(stages: Iterable[StageRecord], tasks: Iterable[TaskRecord]) -> list[str]:
    """Problems between what the stages are said to run and what the tasks wait for; empty when all is well."""
    problems = []
    counts: collections.Counter[tuple[str, Phase]] = collections.Counter()
    for stage in stages:
        if len(stage.outstanding) > GRANTED_AHEAD:
            problems.append(f"{stage.name}: {len(stage.outstanding)} quanta outstanding of {GRANTED_AHEAD}")
        if stage.outstanding and not stage.up:
            problems.append(f"{stage.name} is down and has quanta outstanding")
        counts.update((quantum.task.id, quantum.phase) for quantum in stage.outstanding)
    for task in tasks:
        for phase in PHASES:
            waits, runs = task.outstanding(phase), counts.pop((task.id, phase), 0)
            if waits != runs:
                problems.append(f"{task.id} waits for {waits} quanta of {phase}, but {runs} are outstanding")
        if len({stage_of(seat) for seat in task.told}) < len(task.told):
            problems.append(f"{task.id} is at {' and '.join(task.told)}")
    return problems + [f"{id}: {phase} is outstanding, but the task is unknown" for id, phase in counts]
