"""All that a scheduler knows, as plain data: what one program hands to the next that takes its place.

A scheduler that is made of it does from then on exactly what the first one would have done
(`tests/engine/test_scheduler_state.py`). Estimates and keys are kept as they are, not computed again: they have grown
by sums whose rounding depends on their order.
"""

from __future__ import annotations

import collections
from typing import Literal

from engine.estimates import Policy
from engine.events import Capacity, TaskSpec
from engine.records import Key, Quantum, Shortage, Slots, StageRecord, TaskRecord
from engine.states import State
from ipc.errors import Failure
from ipc.messages.names import Phase, Seat, StageName
from ipc.messages.reports import Parts


class TaskState(State, frozen=True, kw_only=True):
    """A `TaskRecord`; the fields have its names."""

    spec: TaskSpec
    arrival: int
    total: dict[Phase, int]
    granted: dict[Phase, int]
    done: dict[Phase, int]
    holds: dict[Slots, int]
    told: dict[Seat, Literal["begun", "dropping"]]
    left: list[StageName]
    phase: Phase | Literal["queued"]
    overtaken: float
    crashes: int
    kills: int
    killed_at: tuple[Phase, int] | None
    admitted: bool
    rewinding: bool
    short: dict[Phase, Shortage]
    parts: dict[Phase, Parts]
    placing: bool
    in_place: bool
    ended: bool
    seconds: float
    key: Key


class StageRecordState(State, frozen=True, kw_only=True):
    """A `StageRecord`. `outstanding`: id of the task, phase and number of each quantum."""

    name: Seat
    epoch: int
    up: bool
    failed: Failure | None
    outstanding: list[tuple[str, Phase, int]]
    deaths: list[float]
    level: int
    top: int
    failed_starts: int


class SchedulerState(State, frozen=True, kw_only=True):
    """A `Scheduler` between two events. `active` and `waiting` are ids in the order of the line."""

    capacity: Capacity
    policy: Policy
    tasks: list[TaskState]
    stages: list[StageRecordState]
    active: list[str]
    waiting: list[str]
    ratio: dict[Phase, float]
    learnt: dict[Phase, float]
    arrivals: int


def state_of_task(task: TaskRecord) -> TaskState:
    return TaskState(
        spec=task.spec, arrival=task.arrival, total=dict(task.total), granted=dict(task.granted), done=dict(task.done),
        holds=dict(task.holds), told=dict(task.told), left=sorted(task.left), phase=task.phase,
        overtaken=task.overtaken, crashes=task.crashes, kills=task.kills, killed_at=task.killed_at,
        admitted=task.admitted, rewinding=task.rewinding, short=dict(task.short), parts=dict(task.parts),
        placing=task.placing, in_place=task.in_place, ended=task.ended, seconds=task.seconds, key=task.key,
    )  # fmt: skip


def task_of_state(state: TaskState) -> TaskRecord:
    return TaskRecord(
        spec=state.spec, arrival=state.arrival, total=dict(state.total), granted=dict(state.granted),
        done=dict(state.done), holds=collections.Counter(state.holds), told=dict(state.told), left=set(state.left),
        phase=state.phase, overtaken=state.overtaken, crashes=state.crashes, kills=state.kills,
        killed_at=state.killed_at, admitted=state.admitted, rewinding=state.rewinding, short=dict(state.short),
        parts=dict(state.parts), placing=state.placing, in_place=state.in_place, ended=state.ended,
        seconds=state.seconds, key=state.key,
    )  # fmt: skip


def state_of_stage(stage: StageRecord) -> StageRecordState:
    return StageRecordState(
        name=stage.name, epoch=stage.epoch, up=stage.up, failed=stage.failed,
        outstanding=[(task.id, phase, number) for task, phase, number in stage.outstanding],
        deaths=list(stage.deaths), level=stage.level, top=stage.top, failed_starts=stage.failed_starts,
    )  # fmt: skip


def put_back(stage: StageRecord, state: StageRecordState, tasks: dict[str, TaskRecord]) -> None:
    """Make a fresh record what it was. KeyError if a quantum is of a task that is not there."""
    stage.epoch, stage.up, stage.failed = state.epoch, state.up, state.failed
    stage.outstanding.extend(Quantum(tasks[identity], phase, number) for identity, phase, number in state.outstanding)
    stage.level, stage.top = state.level, state.top
    stage.deaths, stage.failed_starts = list(state.deaths), state.failed_starts
