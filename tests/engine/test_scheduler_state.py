"""A scheduler that goes on from another one's state does exactly what that one would have done."""

from __future__ import annotations

import collections
from collections.abc import Callable
from random import Random
from typing import Any, ClassVar

import msgspec
import pytest

from engine.estimates import Policy
from engine.events import Action, Capacity, Event
from engine.scheduler import Scheduler
from engine.scheduler_state import SchedulerState
from tests.engine.observer import Violation, demand
from tests.engine.simulator import simulate

Mutation = Callable[[SchedulerState], SchedulerState]


def unchanged(state: SchedulerState) -> SchedulerState:
    return state


class Twins:
    """A scheduler and another that hears the same, and is replaced by what its encoded state gives at random moments.

    `mutation` is what happens to the state on the way.
    """

    mutation: ClassVar[Mutation] = staticmethod(unchanged)
    replaced: ClassVar[collections.Counter[str]] = collections.Counter()

    def __init__(self, capacity: Capacity, policy: Policy) -> None:
        self.first = Scheduler(capacity, policy)
        self.second = Scheduler(capacity, policy)
        self.random = Random(repr((capacity, policy)))

    def on(self, event: Event, now: float) -> list[Action]:
        if self.random.random() < 0.15:
            self._replace()
        actions, others = self.first.on(event, now), self.second.on(event, now)
        demand(actions == others, f"{event}: {actions} without, {others} after a hand-over")
        demand(self.first.next_wakeup(now) == self.second.next_wakeup(now), f"{event}: another wake-up")
        demand(self.first.retry_after() == self.second.retry_after(), f"{event}: another time to retry")
        demand(not self.second.check(), f"{self.second.check()}")
        return actions

    def _replace(self) -> None:
        state = self.second.state()
        self.replaced["busy" if state.tasks else "idle"] += 1
        self.replaced["outstanding"] += sum(len(stage.outstanding) for stage in state.stages)
        encoded = msgspec.msgpack.encode(type(self).mutation(state))
        self.second = Scheduler.restored(msgspec.msgpack.decode(encoded, type=SchedulerState))
        demand(self.second.state() == msgspec.msgpack.decode(encoded, type=SchedulerState), "it is another state")
        for task in state.tasks:
            where = [scheduler.snapshot(task.spec.id) for scheduler in (self.first, self.second)]
            demand(where[0] == where[1], f"{task.spec.id} is at {where}")

    def __len__(self) -> int:
        return len(self.second)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.second, name)


def test_a_thousand_histories_with_hand_overs() -> None:
    """At every seventh event one of two schedulers is replaced by what its encoded state gives: both say the same to
    the end of every history, under both policies, through crashes, rewinds, cancels and deadlines."""
    Twins.replaced.clear()
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(1000):
        counts.update(simulate(seed, Twins))  # type: ignore[arg-type]
    assert Twins.replaced["busy"] > 2_500
    assert Twins.replaced["outstanding"] > 2_500
    seen = ("finished", "kills", "moves", "StageGone", "Tick", "failed: cancelled", "failed: poisoned_request")
    assert [what for what in seen if not counts[what]] == []


def of_tasks(**fields: Any) -> Mutation:
    """Every task forgets these fields."""

    def mutate(state: SchedulerState) -> SchedulerState:
        return msgspec.structs.replace(state, tasks=[msgspec.structs.replace(t, **fields) for t in state.tasks])

    return mutate


def of_stages(**fields: Any) -> Mutation:
    def mutate(state: SchedulerState) -> SchedulerState:
        return msgspec.structs.replace(state, stages=[msgspec.structs.replace(s, **fields) for s in state.stages])

    return mutate


def of_all(**fields: Any) -> Mutation:
    return lambda state: msgspec.structs.replace(state, **fields)


FORGETFUL: dict[str, Mutation] = {
    "told": of_tasks(told={}), "left": of_tasks(left=[]), "overtaken": of_tasks(overtaken=0.0),
    "crashes": of_tasks(crashes=0), "kills": of_tasks(kills=0, killed_at=None), "rewinding": of_tasks(rewinding=False),
    "phase": of_tasks(phase="queued"), "done": of_tasks(done={}), "granted": of_tasks(granted={}),
    "seconds": of_tasks(seconds=0.0), "holds": of_tasks(holds={}),
    "up": of_stages(up=False), "failed": of_stages(failed=None), "outstanding": of_stages(outstanding=[]),
    "deaths": of_stages(deaths=[]), "failed starts": of_stages(failed_starts=0), "epoch": of_stages(epoch=-1),
    "learnt": of_all(learnt={}), "ratio": of_all(ratio={}), "arrivals": of_all(arrivals=0),
    "tasks": of_all(tasks=[]), "waiting": of_all(waiting=[]), "active": of_all(active=[]),
}  # fmt: skip


@pytest.mark.parametrize("forgotten", FORGETFUL)
def test_whatever_is_forgotten_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a state that lost any one of its fields is refused, or gives other actions."""
    monkeypatch.setattr(Twins, "mutation", staticmethod(FORGETFUL[forgotten]))
    with pytest.raises((Violation, ValueError)):
        for seed in range(2000):
            simulate(seed, Twins)  # type: ignore[arg-type]
