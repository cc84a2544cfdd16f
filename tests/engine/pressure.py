"""What other processes take of a GPU over time, made up; and what is wrong with how a policy answered it.

The checks know the trace and the plans alone, nothing of how a policy decides.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from engine.footprint import Need, RequestSize, need, plans
from engine.models import load_model
from engine.monitor import DWELL, INTERVAL, LITTLE, NOISE, REST, SLACK, Policy, Sample, order
from ipc.messages.memory import MemoryPlan

GIB = 2**30
TOTAL = 80 * GIB
MODEL = load_model("wan2.2-t2v-a14b")
PLANS = plans(MODEL)
SIZE = RequestSize(832, 480, 81)
MARGIN = int(TOTAL * SLACK) + int(TOTAL * NOISE)
STILL = REST + DWELL + 2 * INTERVAL
"""Seconds without movement after which a policy must have come to its end."""

Trace = list[int]
"""Bytes that others have, one per `INTERVAL`."""


@functools.cache
def account(running: RequestSize | None, plan: MemoryPlan) -> Need:
    return need(MODEL, running or SIZE, plan)


class Answers(Protocol):
    """A policy."""

    plan: MemoryPlan

    def on(self, sample: Sample, running: RequestSize | None, now: float) -> MemoryPlan | None: ...


class Moment(NamedTuple):
    """A sample, and the plan before and after it."""

    at: float
    there: int
    """What others leave, or the budget."""
    before: MemoryPlan
    after: MemoryPlan
    size: RequestSize = SIZE
    """Of the request that runs."""


def played(policy: Answers, trace: Trace, seed: int = 0, budget: int = TOTAL, size: RequestSize = SIZE) -> list[Moment]:
    """Samples come nearly every `INTERVAL`."""
    uneven, moments, at = random.Random(seed), [], 0.0
    for others in trace:
        at += INTERVAL * uneven.uniform(0.95, 1.05)
        before = policy.plan
        after = policy.on(Sample(at=at, total=TOTAL, others=others), size, at) or before
        moments.append(Moment(at, min(budget, TOTAL - others), before, after, size))
    return moments


def changes(moments: Sequence[Moment]) -> list[Moment]:
    return [moment for moment in moments if moment.after != moment.before]


def above_budget(moments: Sequence[Moment], allowed: Sequence[MemoryPlan] = PLANS) -> list[str]:
    """Moments after which a plan holds that does not fit, though another one would."""
    least = min(account(moments[0].size, plan).gpu for plan in allowed)
    return [
        f"{m.at:.1f} s: {m.after} takes {account(m.size, m.after).gpu / GIB:.1f} of {m.there / GIB:.1f} GiB"
        for m in moments
        if least <= m.there < account(m.size, m.after).gpu
    ]


def flapping(moments: Sequence[Moment]) -> list[str]:
    """Cycles of pressure with more than two changes. One ends when nothing has moved for `REST`, or when a lower level
    is taken that had room for `DWELL` and is no higher than one that was raised from."""
    problems, count = [], 0
    left: list[MemoryPlan] = []
    for number, moment in enumerate(moments):
        if _still(moments[: number + 1]):
            count = 0
        if moment.after == moment.before:
            continue
        count += 1
        if count > 2:
            problems.append(f"{moment.at:.1f} s: change {count} in a cycle, {moment.before} to {moment.after}")
        if order(moment.after) > order(moment.before):
            left += [moment.before] if count == 1 else []
            continue
        kept = [plan for plan in left if order(plan) < order(moment.after)]
        if len(kept) < len(left) and _roomy(moments[: number + 1]):
            count = 0
        left = kept
    return problems


def _still(moments: Sequence[Moment]) -> bool:
    recent = [m.there for m in moments if m.at >= moments[-1].at - REST]
    return moments[0].at <= moments[-1].at - REST and max(recent) - min(recent) <= TOTAL * NOISE


def _roomy(moments: Sequence[Moment]) -> bool:
    now = moments[-1]
    recent = [m.there for m in moments if m.at >= now.at - DWELL]
    return len(recent) > 1 and min(recent) >= account(now.size, now.after).gpu + TOTAL * NOISE / 2


def wrong_end(moments: Sequence[Moment], allowed: Sequence[MemoryPlan] = PLANS, *, locked: bool = True) -> list[str]:
    """After a while without movement the level is not the lowest that fits, allowing for the margin of the policy, or
    steps are slower than with the most blocks that fit. `locked`: the pages of the weights in host memory are."""

    def slowdown(plan: MemoryPlan) -> float:
        return account(size, plan).slowdown if locked else account(size, plan).slowdown_unlocked

    there, plan, size = moments[-1].there, moments[-1].after, moments[-1].size
    roomy = next((p for p in allowed if account(size, p).gpu <= there - MARGIN), allowed[-1])
    if plan.level > roomy.level or slowdown(plan) > slowdown(roomy) * (1 + LITTLE):
        return [f"ends with {plan}, where {roomy} fits into {there / GIB:.1f} GiB"]
    return []


def problems(moments: Sequence[Moment], *, locked: bool = True) -> list[str]:
    return above_budget(moments) + flapping(moments) + wrong_end(moments, locked=locked)


class Cycle(NamedTuple):
    """How a policy answered a neighbour who took memory and gave it back, once."""

    while_taken: list[MemoryPlan]
    """What it changed to until the memory was given back."""
    afterwards: list[MemoryPlan]
    failures: int
    """Allocations that failed."""


TICK = 0.05
"""Seconds between two turns of the neighbour."""


def beside(policy: Policy, size: RequestSize, seed: int, wanted: int = 60 * GIB) -> Cycle:
    """A cycle of a neighbour who takes whatever is free until he has what he wants, as fast as a driver gives it, keeps
    it for some seconds and gives it back within one; while a request of this size runs. The policy is asked as in an
    engine: every `INTERVAL`, but not during a change, which takes up to a second; and when an allocation fails, as the
    engine allocates and frees within what its plan may take. `policy` may have seen other cycles, of lower seeds."""
    draw, answers = random.Random(seed), Cycle([], [], 0)
    rate, keeps, begin = draw.uniform(20, 60) * GIB, draw.uniform(2.5, 6.0), STILL + draw.random()
    context, others, ours = GIB // 2, 0, account_of(size, policy.plan)
    look, free_again, has_all, failures = 0.0, 0.0, None, 0
    for turn in range(int((begin + 40) / TICK)):
        now = turn * TICK
        sample = Sample(at=1000.0 * seed + now, total=TOTAL, others=others + context)
        if now >= free_again:  # no change is being carried out
            changed, most = None, account_of(size, policy.plan)
            wants = int(most * draw.uniform(0.9, 0.99)) if draw.random() < 0.2 else min(ours, most)
            if wants > TOTAL - context - others:
                failures += 1
                changed = policy.failed(sample, size, sample.at)
                assert changed is not None
            else:
                ours = wants
                if now >= look:
                    look = now + INTERVAL * draw.uniform(0.95, 1.05)
                    changed = policy.on(sample, size, sample.at)
            if changed is not None:
                free_again = now + draw.uniform(0.2, 1.0)
                ours = min(ours, account_of(size, changed))
                (answers.while_taken if has_all is None or now < has_all + keeps else answers.afterwards).append(
                    changed
                )
        if has_all is not None and now >= has_all + keeps:
            others = max(0, others - int(wanted * TICK / draw.uniform(0.1, 1.0)))
        elif now >= begin:
            others = min(wanted, others + min(TOTAL - context - others - ours, int(rate * TICK)))
            has_all = now if has_all is None and others == wanted else has_all
    return answers._replace(failures=failures)


@functools.cache
def account_of(size: RequestSize, plan: MemoryPlan) -> int:
    """Bytes that the plan may take of the device, beside a request of this size."""
    return need(MODEL, size, plan).gpu


# Traces.


def times(seconds: float) -> int:
    return int(seconds / INTERVAL)


def still(amount: int, seconds: float = STILL) -> Trace:
    return [amount] * times(seconds)


def co_tenant(cycles: int, amount: int = 60 * GIB, held: float = 5.0, pause: float = 5.0) -> Trace:
    """Another process takes memory at once and gives it back."""
    return still(0) + (still(amount, held) + still(0, pause)) * cycles + still(0)


def sawtooth(teeth: int, height: int = 60 * GIB, seconds: float = 8.0) -> Trace:
    """It takes more and more, as a program that caches does, then ends."""
    return still(0) + [height * i // times(seconds) for i in range(times(seconds))] * teeth + still(0)


def leak(rate: float, until: int = 72 * GIB) -> Trace:
    """`rate` bytes per second, for ever."""
    count = int(until / rate / INTERVAL)
    return still(0) + [int(rate * INTERVAL * i) for i in range(count)] + still(until)


def noise(draw: random.Random, around: int, width: int, seconds: float = 60.0) -> Trace:
    return [max(0, around + draw.randint(-width, width)) for _ in range(times(seconds))]


def threshold(draw: random.Random) -> int:
    """What others have when a plan just fits."""
    return max(0, TOTAL - account(SIZE, draw.choice(PLANS)).gpu - draw.choice([0, int(TOTAL * SLACK)]))


def pieces(draw: random.Random, length: int) -> Iterator[Trace]:
    """Of all kinds, each from where the last one ended."""
    last = draw.randrange(TOTAL)
    for _ in range(length):
        goal, seconds = draw.choice([threshold(draw), draw.randrange(TOTAL), 0]), draw.choice([0.5, 1, 2, 5, 15, 30])
        match draw.randrange(6):
            case 0:
                yield still(goal, seconds)
            case 1:  # steadily there
                count = times(seconds)
                yield [last + (goal - last) * (i + 1) // count for i in range(count)]
            case 2:
                yield noise(draw, goal, draw.choice([16 << 20, 256 << 20, GIB, 4 * GIB]), seconds)
            case 3:  # there and back
                yield (still(goal, draw.choice([0.5, 1, 1.5, 2])) + still(last, draw.choice([0.5, 1, 1.5, 2]))) * 3
                goal = last
            case 4:  # a walk
                walk = [last]
                for _ in range(times(seconds)):
                    walk.append(min(TOTAL, max(0, walk[-1] + draw.randint(-3 * GIB, 3 * GIB))))
                yield walk
                goal = walk[-1]
            case 5:  # in steps
                stairs = draw.randint(2, 6)
                yield [v for i in range(stairs) for v in still(last + (goal - last) * (i + 1) // stairs, seconds / 4)]
        last = goal


def random_trace(seed: int) -> Trace:
    """Up to about two minutes, then as long without movement as a policy may take."""
    draw = random.Random(seed)
    trace = [value for piece in pieces(draw, draw.randint(1, 5)) for value in piece] or [0]
    return trace + still(trace[-1])
