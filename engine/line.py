"""The tasks that have not ended, in the order of the policy."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from operator import attrgetter

from engine.estimates import Estimates, Policy
from engine.records import TaskRecord
from ipc.messages.names import Phase

_by_key = attrgetter("key")


class Line:
    """Who goes first. Two lists: `active` tasks hold slots, `waiting` ones hold nothing. A task is admitted from one to
    the other by its first grant, and only the first of the waiting is. Both are kept sorted by key."""

    def __init__(self, policy: Policy, dits: int = 1) -> None:
        self._dits = dits
        self.active: list[TaskRecord] = []
        """As many as there are slots for inputs and latents."""
        self.waiting: list[TaskRecord] = []
        self.estimates = Estimates(policy)

    def __iter__(self) -> Iterator[TaskRecord]:
        """The active tasks and the first of the waiting, best first."""
        head = self.waiting[0] if self.waiting else None
        for task in self.active:
            if head is not None and head.key < task.key:
                yield head
                head = None
            yield task
        if head is not None:
            yield head

    def all(self) -> list[TaskRecord]:
        """A copy, in no useful order."""
        return self.active + self.waiting

    def join(self, task: TaskRecord) -> None:
        self.estimates.update(task)
        bisect.insort(self.waiting, task, key=_by_key)

    def admit(self, task: TaskRecord) -> None:
        assert task is self.waiting[0], "the first of the waiting is admitted"
        del self.waiting[0]
        bisect.insort(self.active, task, key=_by_key)
        task.admitted = True

    def leave(self, task: TaskRecord) -> None:
        (self.active if task.admitted else self.waiting).remove(task)

    def prepared_before(self, task: TaskRecord) -> int:
        """Tasks that go before this one and have not begun denoising."""
        return sum(not other.begun and other.key < task.key for other in self.active)

    def measured(self, task: TaskRecord, phase: Phase, seconds: float, quanta: float = 1.0) -> None:
        """An active task has had a quantum done in `seconds`, worth so many of those of the estimate: its place
        changes, and that of those it overtakes."""
        anew = self.estimates.observe(task.spec, phase, seconds, quanta)
        for tasks in (self.active, self.waiting):
            for other in tasks:
                if other.arrival < task.arrival:
                    self.estimates.overtake(other, seconds)
                if anew:
                    self.estimates.update(other)
            tasks.sort(key=_by_key)
        self.moved(task)

    def moved(self, task: TaskRecord) -> None:
        """An active task has more or less to do than before."""
        self.estimates.update(task)
        self.active.sort(key=_by_key)

    def seconds_left(self, task: TaskRecord) -> float | None:
        """Its own work and that of all tasks that go before it, shared by the dits; None if nobody said what its work
        costs."""
        if not task.spec.cost:
            return None
        ahead = 0.0
        for tasks in (self.active, self.waiting):
            for other in tasks:
                if other.key >= task.key:
                    break
                ahead += other.seconds
        return ahead / self._dits + task.seconds

    def check(self) -> list[str]:
        """Problems; empty when all is well."""
        problems = []
        for name, tasks in (("active", self.active), ("waiting", self.waiting)):
            if tasks != sorted(tasks, key=_by_key):
                problems.append(f"{name} tasks are not in the order of the policy")
            if any(task.ended or task.admitted != (name == "active") for task in tasks):
                problems.append(f"a task is {name} that should not be")
        if any(task.holds.total() for task in self.waiting):
            problems.append("a waiting task holds slots")
        return problems
