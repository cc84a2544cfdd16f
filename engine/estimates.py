"""How long things take and who goes first.

The estimate of a quantum is `TaskSpec.cost` times a ratio per phase, measured / estimated, learnt from every quantum.
One ratio for all tasks keeps their order stable: equal tasks stay equal, what has progressed further stays ahead.

**Policy `shortest`.** The smaller score goes first, where

    score = seconds of work left (* BEGINNING while denoising has not begun)
            - AGEING * seconds overtaken - PRIORITY_SECONDS * priority

and a task is overtaken by the seconds computed, while it is there, for tasks that came later. (Seconds waited would
not do: in a long line of films every film would soon be so old that a draft waits for all of them.) As AGEING < 1,
whoever is served falls faster than those it overtakes and stays ahead: equal tasks run one after another.

**Bounded waiting.** A task that arrives has a score of at least -PRIORITY_SECONDS * its priority. So once a task with
S seconds of work left has been overtaken by (BEGINNING * S + PRIORITY_SECONDS * d) / AGEING seconds, no task that
arrives from then on, with at most d more priority, goes before it; it waits only for those that are there, whose work
is finite.

**Policy `fifo`.** Higher priority first, then in order of arrival. Only equal priorities are bounded.
"""

from __future__ import annotations

from typing import Literal

from engine.events import TaskSpec
from engine.records import PHASES, Key, TaskRecord
from ipc.messages.names import Phase

Policy = Literal["shortest", "fifo"]

AGEING = 0.25
"""Seconds of work left that a second of being overtaken is worth; below 1, or tasks would take turns."""

BEGINNING = 1.1
"""A task must be shorter by this factor to overtake one that holds a state slot."""

PRIORITY_SECONDS = 60.0
"""Seconds of work left that one level of priority is worth."""

LEARNING = 0.2
"""Weight of a new measurement in the running ratio."""

NOTICEABLE = 0.1
"""Relative change of a ratio from which all estimates are made anew."""


class Estimates:
    """Seconds per quantum, and the policy's key."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.ratio: dict[Phase, float] = dict.fromkeys(PHASES, 1.0)
        """In use for every task."""
        self.learnt: dict[Phase, float] = {}

    def observe(self, spec: TaskSpec, phase: Phase, seconds: float, quanta: float = 1.0) -> bool:
        """Learn from a measured quantum, which was worth so many of those that `cost` is of. True if the estimates of
        all tasks have changed."""
        expected = quanta * spec.cost.get(phase, 0.0)
        if expected <= 0 or seconds <= 0:
            return False
        ratio = seconds / expected
        learnt = self.learnt.get(phase, ratio)
        learnt += LEARNING * (ratio - learnt)
        self.learnt[phase] = learnt
        if abs(learnt - self.ratio[phase]) <= NOTICEABLE * self.ratio[phase]:
            return False
        self.ratio[phase] = learnt
        return True

    def update(self, task: TaskRecord) -> None:
        """Set the task's `seconds` and `key` from where it is."""
        left: dict[Phase, float] = {
            phase: task.work_left(phase) * task.spec.cost.get(phase, 0.0) * self.ratio[phase] for phase in PHASES
        }
        task.seconds = left["text"] + left["encode"] + left["denoise"] + max(left["decode"], left["write"])
        if self._policy == "fifo":
            task.key = Key(-task.spec.priority, task.arrival)
            return
        work = task.seconds if task.begun else BEGINNING * task.seconds
        rank = work - AGEING * task.overtaken - PRIORITY_SECONDS * task.spec.priority
        task.key = Key(rank, task.arrival)

    def overtake(self, task: TaskRecord, seconds: float) -> None:
        """A task that came later was computed for so long."""
        task.overtaken += seconds
        if self._policy == "shortest":
            task.key = Key(task.key.rank - AGEING * seconds, task.arrival)
