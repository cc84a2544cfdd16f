"""The policy of the resource monitor, against made-up neighbours on the GPU; and where its samples come from."""

from __future__ import annotations

import os
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from engine import host_samples, monitor
from engine.footprint import RequestSize, need
from engine.monitor import HOST_RESERVE, INTERVAL, Limits, Policy, Sample, Sampler, order, why_no_copies, why_slow
from ipc.messages.memory import MemoryPlan
from tests.engine.pressure import (
    GIB,
    MARGIN,
    MODEL,
    PLANS,
    SIZE,
    STILL,
    TOTAL,
    Moment,
    Trace,
    above_budget,
    account,
    beside,
    changes,
    co_tenant,
    flapping,
    leak,
    noise,
    pieces,
    played,
    problems,
    random_trace,
    sawtooth,
    still,
    threshold,
    wrong_end,
)

TRACES = 10_000
SIZES = [RequestSize(832, 480, frames) for frames in (81, 17, 5)]
HIGHEST = PLANS[-1]


def make(limits: Limits | None = None, plan: MemoryPlan = PLANS[0], copies: bool = True) -> Policy:
    return Policy(account, PLANS, limits or Limits(), plan, copies=copies)


class Tracking(Policy):
    """A broken one: always what fits at the moment."""

    def on(self, sample: Sample, running: object, now: float) -> MemoryPlan | None:
        assert sample.others is not None
        wanted = next((p for p in PLANS if account(SIZE, p).gpu <= TOTAL - sample.others), HIGHEST)
        changed, self.plan = wanted != self.plan, wanted
        return wanted if changed else None


class Climbing(Policy):
    """A broken one: raises a step at a time, as often as it takes."""

    def _raise(self, there: int) -> MemoryPlan | None:
        higher = [p for p in PLANS if order(p) > order(self.plan) and account(SIZE, p).gpu <= there]
        return self._higher(higher[0] if higher else HIGHEST)


class Late(Policy):
    """A broken one: looks at what was there two seconds ago."""

    def on(self, sample: Sample, running: object, now: float) -> MemoryPlan | None:
        self.old = [*getattr(self, "old", []), sample][-5:]
        return super().on(self.old[0], SIZE, now)


class Timid(Policy):
    """A broken one: never goes lower."""

    def _lower(self, now: float) -> MemoryPlan | None:
        return None


class Deaf(Policy):
    """A broken one: never raises."""

    def _raise(self, there: int) -> MemoryPlan | None:
        return None


def broken(kind: type[Policy]) -> Policy:
    return kind(account, PLANS, Limits(), PLANS[0], copies=True)


def test_ten_thousand_traces() -> None:
    """No cycle of pressure has more than two changes, a plan that fits always holds where there is one, and in the end
    it is the lowest that fits; of a clip that streams for nothing, and of shorter ones, whose steps take up to 3.4
    times as long without resident blocks; half of them within a budget; and one in five where the pages of the
    weights in host memory could not be locked, so that a step takes up to 35 times as long."""
    assert [round(account(size, HIGHEST).slowdown, 1) for size in SIZES] == [1.0, 1.2, 3.4]
    assert [round(account(size, HIGHEST).slowdown_unlocked, 1) for size in SIZES] == [2.7, 13.0, 35.2]
    wrong = {}
    for seed in range(TRACES):
        draw, size = random.Random(seed), SIZES[seed % len(SIZES)]
        budget = draw.choice([TOTAL, draw.randint(8, 80) * GIB])
        policy = make(Limits(budget=budget), draw.choice(PLANS))
        policy.locked = seed % 5 > 0
        if found := problems(played(policy, random_trace(seed), seed, budget, size), locked=policy.locked):
            wrong[seed] = found
    assert not wrong


@given(seed=st.integers(0, 2**32), start=st.sampled_from(PLANS), budget=st.integers(20, 80), locked=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_trace_within_a_budget(seed: int, start: MemoryPlan, budget: int, locked: bool) -> None:
    """As above; and at no time is more planned than the budget."""
    limit = budget * GIB
    policy = make(Limits(budget=limit), start)
    policy.locked = locked
    moments = played(policy, random_trace(seed), seed, limit)
    assert not problems(moments, locked=locked)
    assert all(account(SIZE, m.after).gpu <= limit for m in moments)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Stretches of any length at any height, many of them at a threshold, which shrink to the shortest that fails."""
    edges = [TOTAL - account(SIZE, p).gpu for p in PLANS]
    height = st.one_of(st.integers(0, TOTAL), st.sampled_from(edges).flatmap(
        lambda edge: st.integers(edge - 2 * GIB, edge + 2 * GIB).map(lambda v: min(TOTAL, max(0, v)))
    ))  # fmt: skip
    stretches = draw(st.lists(st.tuples(height, st.integers(1, 30)), min_size=1, max_size=12))
    trace = [value for value, count in stretches for _ in range(count)]
    return trace + still(trace[-1])


@given(trace=traces(), start=st.sampled_from(PLANS), locked=st.booleans())
@settings(max_examples=400, deadline=None)
def test_stretches(trace: Trace, start: MemoryPlan, locked: bool) -> None:
    policy = make(plan=start)
    policy.locked = locked
    assert not problems(played(policy, trace), locked=locked)


@pytest.mark.parametrize("held", [3.0, 5.0, 15.0, 60.0])
def test_a_co_tenant_that_comes_and_goes_ten_times(held: float) -> None:
    """It takes 60 GiB and gives them back: two changes each time, each within two seconds, and the level is 0 again."""
    moments = played(make(), co_tenant(10, held=held))
    assert not problems(moments)
    assert len(changes(moments)) == 20 and moments[-1].after == PLANS[0]
    jumps = [b.at for a, b in pairwise(moments) if a.there != b.there]
    for jump, change in zip(jumps, changes(moments), strict=True):
        assert 0 <= change.at - jump <= 2.0


class Blind(Policy):
    """A broken one: does not look when an allocation fails."""

    def failed(self, sample: Sample | None, running: RequestSize | None, now: float) -> MemoryPlan | None:
        return super().failed(None, running, now)


class Fearful(Policy):
    """A broken one: takes what it has given up for the beginning of more."""

    def _raise(self, there: int) -> MemoryPlan | None:
        return self._higher(HIGHEST) if self._is_taken() else super()._raise(there)

    def _short(self, plan: MemoryPlan, there: int) -> bool:
        return super()._short(plan, there - (20 * GIB if self._changes and self._is_taken() else 0))


def beside_all(kind: type[Policy], frames: int) -> list[tuple[int, int, MemoryPlan]]:
    """Of ten engines beside ten cycles each of a neighbour who takes what is free: the changes while he took and kept
    it, those afterwards, and the plan in the end."""
    found = []
    for engine in range(10):
        policy = broken(kind)
        for cycle in range(1, 11):
            seen = beside(policy, RequestSize(832, 480, frames), 10 * engine + cycle)
            found.append((len(seen.while_taken), len(seen.afterwards), policy.plan))
    return found


@pytest.mark.parametrize("frames", [17, 81])
def test_a_neighbour_who_takes_what_is_free(frames: int) -> None:
    """He gets more only as the engine gives it up, and allocations fail: one change up and one down, each time, and
    no failure is held against a plan that fits when he has gone."""
    assert set(beside_all(Policy, frames)) == {(1, 1, PLANS[0])}
    failures = [beside(make(), RequestSize(832, 480, frames), seed).failures for seed in range(1, 101)]
    assert 10 <= sum(map(bool, failures)) <= 90, "with failed allocations and without"


@pytest.mark.parametrize("kind", [Blind, Fearful])
def test_a_policy_that_misreads_a_neighbour_is_caught(kind: type[Policy]) -> None:
    assert set(beside_all(kind, 17)) != {(1, 1, PLANS[0])}


def test_what_it_does_while_a_co_tenant_has_60_gib() -> None:
    """Level 3 with few blocks, which costs a step of this size nothing, so that a neighbour who goes on is no trouble;
    not the highest plan. Where few blocks are slower, with as many as fit."""
    moments = played(make(), co_tenant(1))
    raised = changes(moments)[0].after
    assert raised.level == 3 and 0 < (raised.blocks or 0) < 10
    small = RequestSize(832, 480, 5)
    policy = Policy(lambda running, plan: need(MODEL, small, plan), PLANS, Limits(), PLANS[0], copies=True)
    there = TOTAL - 60 * GIB
    raised = changes(played(policy, co_tenant(1)))[0].after
    assert raised == next(plan for plan in PLANS if need(MODEL, small, plan).gpu <= there - MARGIN)
    assert (raised.blocks or 0) >= 10


def test_where_pages_could_not_be_locked_as_many_blocks_stay_as_fit() -> None:
    """Fewer would be slower, also of a size that otherwise streams for nothing: a neighbour's 60 GiB are answered with
    the most blocks that fit; and where that is found out afterwards, they are brought in when all is quiet."""
    fits = next(plan for plan in PLANS if account(SIZE, plan).gpu <= TOTAL - 60 * GIB - MARGIN)
    policy = make()
    policy.locked = False
    moments = played(policy, co_tenant(1, held=STILL))
    assert changes(moments)[0].after == fits and fits.level == 3
    assert not problems(moments, locked=False)

    policy = make()
    few = changes(played(policy, still(0) + still(60 * GIB, 5.0)))[0].after
    assert order(few) > order(fits)
    policy.locked = False
    later = [Sample(at=100 + n * INTERVAL, total=TOTAL, others=60 * GIB) for n in range(int(STILL / INTERVAL) + 2)]
    assert [plan for sample in later if (plan := policy.on(sample, SIZE, sample.at))] == [fits]


@pytest.mark.parametrize(
    ("memlock", "says", "not_"),
    [(8 << 20, "a process may lock 8.4 MB here: set LimitMEMLOCK=infinity", "kernel's log"),
     (None, "not limited (ulimit -l), so see what the kernel's log says", "LimitMEMLOCK")],
)  # fmt: skip
def test_what_is_said_of_pages_that_could_not_be_locked(memlock: int | None, says: str, not_: str) -> None:
    said = why_slow(28 * 10**9, "CUDA error 2", memlock)
    assert said.startswith("the pages of 28.0 GB of weights in host memory cannot be locked (CUDA error 2): ")
    assert says in said and not_ not in said


@pytest.mark.parametrize(
    "trace",
    [
        sawtooth(10), sawtooth(10, seconds=2.0), sawtooth(5, seconds=40.0), leak(0.05 * GIB), leak(0.5 * GIB),
        leak(5 * GIB), [*leak(GIB), *still(0)],
    ],
    ids=["sawtooth", "fast", "slow", "leak", "steady", "rush", "leak that ends"],
)  # fmt: skip
def test_neighbours_that_take_more_and_more(trace: Trace) -> None:
    moments = played(make(), trace)
    assert changes(moments)
    assert not problems(moments)


def test_noise_around_a_threshold() -> None:
    """Below the noise that is allowed for: two changes in two minutes at most, whichever way it began."""
    for seed in range(200):
        draw = random.Random(seed)
        trace = noise(draw, threshold(draw), int(TOTAL * 0.004), 120.0)
        plan = next((p for p in PLANS if account(SIZE, p).gpu <= TOTAL - max(trace)), HIGHEST)
        moments = played(make(plan=plan), trace, seed)
        assert len(changes(moments)) <= 2
        assert not problems(moments)


def test_a_steady_rise_is_foreseen() -> None:
    """Memory that is taken at 2 GiB a second: the raise comes before the plan is short, and goes further than what
    would fit at the moment."""
    moments = played(make(), [*still(0), *(GIB * i for i in range(70)), *still(70 * GIB)])
    first = changes(moments)[0]
    assert first.there >= account(SIZE, first.before).gpu
    fits = next(p for p in PLANS if account(SIZE, p).gpu <= first.there)
    assert order(first.after) > order(fits)


@pytest.mark.parametrize(
    ("kind", "trace", "check"),
    [
        (Tracking, noise(random.Random(1), TOTAL - account(SIZE, PLANS[2]).gpu, GIB), flapping),
        (Tracking, [*leak(GIB), *still(0)], flapping),
        (Climbing, [*leak(GIB), *still(0)], flapping),
        (Late, co_tenant(1), above_budget),
        (Timid, co_tenant(1), wrong_end),
        (Deaf, co_tenant(1), above_budget),
    ],
)
def test_broken_policies_are_caught(kind: type[Policy], trace: Trace, check: object) -> None:
    """Each check finds what it is for, where the policy itself passes it."""
    assert callable(check)
    assert check(played(broken(kind), trace))
    assert not check(played(make(), trace))


def test_a_policy_without_dwell_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour that lets go for half a second at a time."""
    trace = [*still(0), *([60 * GIB] * 3 + [0]) * 20, *still(0)]
    assert not flapping(played(make(), trace))
    monkeypatch.setattr(monitor, "DWELL", 0.0)
    assert flapping(played(make(), trace))


def test_the_random_traces_are_of_all_kinds() -> None:
    """They make the policy raise and lower, wait for rest, and take the highest plan at once: a test of traces in which
    nothing happens could not fail."""
    caught: dict[str, int] = {"raised": 0, "lowered": 0, "highest": 0, "tracking flaps": 0, "late": 0}
    for seed in range(300):
        trace = random_trace(seed)
        for moment in changes(played(make(), trace, seed)):
            caught["raised" if order(moment.after) > order(moment.before) else "lowered"] += 1
            caught["highest"] += moment.after == HIGHEST
        caught["tracking flaps"] += bool(flapping(played(broken(Tracking), trace, seed)))
        caught["late"] += bool(above_budget(played(broken(Late), trace, seed)))
    assert min(caught.values()) >= 30, caught
    assert any(len(piece) > 50 for piece in pieces(random.Random(0), 50))


def test_levels_2_and_3_wait_for_the_copies_in_host_memory() -> None:
    """Under pressure without copies level 1 is the highest; with them, the next sample goes on from there."""
    policy = make(copies=False)
    for number in range(20):
        policy.on(Sample(at=number * INTERVAL, total=TOTAL, others=60 * GIB), SIZE, number * INTERVAL)
    assert policy.plan.level == 1
    policy.copies = True
    changed = policy.on(Sample(at=11.0, total=TOTAL, others=60 * GIB), SIZE, 11.0)
    assert changed is not None and changed.level == 3 == policy.plan.level


def test_levels_stay_in_the_bounds() -> None:
    """A fixed level never changes; one from 1 to 2 is never left."""
    for level in range(4):
        plan = MemoryPlan(level=level, blocks=0 if level == 3 else None)
        assert not changes(played(make(Limits(lowest=level, highest=level), plan), co_tenant(3)))
    moments = played(make(Limits(lowest=1, highest=2), PLANS[1]), co_tenant(3))
    assert {m.after.level for m in moments} == {1, 2}


def test_what_is_not_known_changes_nothing() -> None:
    """Without the driver's figures there is no reason to change, but for a budget, which needs none of them."""
    policy = make()
    assert all(policy.on(Sample(at=t / 2), SIZE, t / 2) is None for t in range(100))
    policy = make(Limits(budget=24 * GIB))
    changed = policy.on(Sample(at=0.0), SIZE, 0.0)
    assert changed is not None and account(SIZE, changed).gpu <= 24 * GIB


def test_a_larger_request_is_made_room_for() -> None:
    """A new size begins a cycle of its own: it is raised for at once, however many changes were made before it."""
    size = type(SIZE)(1280, 720, 161)
    limit = account(SIZE, PLANS[2]).gpu + 3 * GIB
    policy = make(Limits(budget=limit), PLANS[2])
    assert policy.on(Sample(at=0.0), SIZE, 0.0) is None
    changed = policy.on(Sample(at=0.5), size, 0.5)
    assert changed is not None and account(size, changed).gpu <= limit < account(size, PLANS[2]).gpu
    assert changed == next(p for p in PLANS if account(size, p).gpu <= limit)


def test_an_allocation_that_failed_all_the_same() -> None:
    """The next higher plan, and the failed one is not taken again for this size until there is more than there was."""
    policy, at = make(), 0.0

    def on(others: int, seconds: float) -> list[MemoryPlan]:
        nonlocal at
        found = []
        for _ in range(int(seconds / INTERVAL)):
            at += INTERVAL
            found.append(policy.on(Sample(at=at, total=TOTAL, others=others), SIZE, at))
        return [plan for plan in found if plan is not None]

    crowd = TOTAL - account(SIZE, PLANS[2]).gpu - 3 * GIB
    on(crowd, 30.0)
    held = policy.plan
    higher = policy.failed(None, SIZE, at)
    assert higher == PLANS[PLANS.index(held) + 1] == policy.plan
    assert on(crowd, 60.0) == []
    assert on(crowd - 4 * GIB, 30.0) == [held]
    policy = make(plan=HIGHEST)
    assert policy.failed(None, SIZE, 0.0) is None


def test_a_change_that_was_not_carried_out() -> None:
    """The plan that holds is still short: it is asked for again."""
    policy = make()
    first = policy.on(Sample(at=0.0, total=TOTAL, others=60 * GIB), SIZE, 0.0)
    assert first is not None
    policy.held(PLANS[0])
    again = policy.on(Sample(at=0.5, total=TOTAL, others=60 * GIB), SIZE, 0.5)
    assert again is not None and account(SIZE, again).gpu <= 20 * GIB


def test_when_weights_may_be_brought_into_host_memory() -> None:
    roomy = Sample(at=0.0, host_available=64 * GIB, memlock=8 << 20, pressure=0.0)
    assert why_no_copies(roomy, 62 * GIB) == ""
    assert HOST_RESERVE == 2 * GIB
    assert "do not fit into" in why_no_copies(roomy, 62 * GIB + 1)
    assert why_no_copies(Sample(at=0.0), 62 * GIB) == ""
    assert "short" in why_no_copies(Sample(at=0.0, host_available=64 * GIB, pressure=0.2), GIB)


def test_samples_of_this_machine() -> None:
    """Host figures are there; what a machine without a GPU cannot tell is None, and nothing is raised; it is fast."""
    sampler = Sampler(0, lambda: [os.getpid()])
    try:
        begin = time.monotonic()
        sample = sampler.sample()
        assert begin <= sample.at <= time.monotonic()
        assert sample.host_total is not None and sample.host_available is not None
        assert 0 < sample.host_available <= sample.host_total
        gpu = (sample.total, sample.ours, sample.others, sample.free)
        if sample.total is None:
            assert gpu == (None,) * 4
        else:
            assert sample.free is not None and 0 <= sample.free <= sample.total
    finally:
        sampler.close()
    assert Sampler(None, list).sample().total is None


def test_the_hosts_files(tmp_path: Path) -> None:
    """Pressure, limits of a control group and the right to lock memory, from files as Linux writes them; and nothing
    where they are lacking or say "max"."""
    assert host_samples.waiting(tmp_path) is None and host_samples.cgroup_left(tmp_path) is None
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "memory").write_text("some avg10=12.50 avg60=0.00\nfull avg10=1.00 avg60=0.00\n")
    assert host_samples.waiting(tmp_path) == 0.125
    for name, text in {"max": "max\n", "current": "700\n", "stat": "anon 100\ninactive_file 200\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert host_samples.cgroup_left(tmp_path) is None and host_samples.cgroup_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert host_samples.cgroup_left(tmp_path) == 500
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("CapInh:\t0\nCapEff:\t0000000000004000\n")
    assert host_samples.lockable(tmp_path) is None
    sample = host_samples.host_sample(tmp_path, tmp_path)
    assert sample == (1000, 500, None, 0.125)


def test_moments_of_a_trace() -> None:
    """The checks see every sample, and the plans chain."""
    moments: list[Moment] = played(make(), co_tenant(1))
    assert all(a.after == b.before for a, b in pairwise(moments))
