"""The resource monitor: what the machine has left (`Sampler`), and what memory plan follows from it (`Policy`).

The policy is pure: samples in, plans out, no clock and no I/O.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import msgspec
import pynvml

from engine.amounts import size
from engine.footprint import Need, RequestSize
from engine.gpu_samples import Gpu, GpuSample
from engine.host_samples import host_sample
from ipc.messages.memory import MemoryPlan

INTERVAL = 0.5
"""Seconds between samples."""

DWELL = 1.0
"""Seconds that memory must have been free before a lower level takes it."""

REST = 10.0
"""Seconds without movement after which whatever comes next is a new cycle of pressure."""

SLACK = 0.01
"""Of what the device has: so much of what others leave is left alone. Contexts grow, and allocators waste some."""

NOISE = 0.01
"""Of what the device has: less is no movement, and no reason to go lower."""

FORESIGHT = 10.0
"""Seconds for which a plan should do while memory is being taken steadily."""

LEAD = 1.0
"""Seconds before memory that is being taken steadily will be short, at which the level is raised."""

LITTLE = 0.02
"""By so much of a step's time a plan may be slower: while memory is being taken, as it will do longer; and before
another one of the same level is worth a change."""

TREND = 4
"""Intervals that are looked back for whether memory is being taken steadily."""

STEADY = 3
"""Intervals in which memory must have been taken for that to be steady. One who takes all that is free at once, and
what is given up for him, is seen in two."""

HOST_RESERVE = 2 << 30
"""Bytes of host memory that weights leave to all else."""

HOST_PRESSURE = 0.1
"""Share of time that something waited for memory, from which on no weights are brought into host memory."""

REMEMBERED = 64
"""Failed allocations that are remembered."""

FORGOTTEN = 300.0
"""Seconds after which a plan that failed may be tried again though there is no more memory than there was: others may
have had it for a moment that no sample saw."""


class Sample(GpuSample, frozen=True, kw_only=True):
    """One GPU and the host at a moment; None: the source is lacking."""

    at: float
    """Seconds of the monotonic clock."""
    host_total: int | None = None
    """Bytes of the machine, or of the control group if that may have less."""
    host_available: int | None = None
    memlock: int | None = None
    """What a process may lock (RLIMIT_MEMLOCK); None: as much as it likes. NVIDIA's driver does not ask for it when it
    page-locks (`os_lock_user_pages` of its open kernel modules); others may, and a container need not let it. So what
    counts is whether pages were locked (`Policy.locked`), and this only says what to change if not (`why_slow`)."""
    pressure: float | None = None
    """Of /proc/pressure/memory, "some avg10": the share of ten seconds in which some task waited for memory, 0 to 1."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows."""

    budget: int | None = None
    """Bytes of the GPU that this engine may use; None: all that others leave."""
    lowest: int = 0
    highest: int = 3
    """Memory levels; the same two: the plan never changes."""


Needs = Callable[[RequestSize | None, MemoryPlan], Need]
"""What a plan takes while a request of this size runs, or with None while none does (`footprint.Account.need`)."""


def why_no_copies(sample: Sample, amount: int) -> str:
    """Why `amount` bytes of weights cannot be brought into host memory now; empty if they can."""
    if sample.host_available is not None and amount + HOST_RESERVE > sample.host_available:
        return (
            f"{amount:,} bytes of weights and {HOST_RESERVE:,} to spare do not fit into the {sample.host_available:,} "
            "bytes of host memory that are available"
        )
    if sample.pressure is not None and sample.pressure >= HOST_PRESSURE:
        return f"host memory is short: something waited for it in {sample.pressure:.0%} of the last 10 s"
    return ""


def why_slow(amount: int, why: str, memlock: int | None) -> str:
    """For people: that the pages of so many bytes of weights in host memory could not be locked, what it means, and
    what to change. `why`: what the driver says; `memlock` as in `Sample`."""
    return (
        f"the pages of {size(amount)} of weights in host memory cannot be locked ({why}): memory levels 2 and 3 give "
        f"the same results, but wait for every copy; {how_to_lock(memlock)}"
    )


def how_to_lock(memlock: int | None) -> str:
    """What to change where pages cannot be locked."""
    if memlock is None:
        return "what may be locked is not limited (ulimit -l), so see what the kernel's log says"
    return (
        f"a process may lock {size(memlock)} here: set LimitMEMLOCK=infinity in the service's unit, or ulimit -l "
        "unlimited before `engine serve`, and start the engine again"
    )


class Sampler:
    """Takes samples of the host and, if `device` is the number of a GPU, of that.

    `pids` gives this engine's processes, `accounted` the bytes of the GPU that it knows to have, for where the driver
    does not tell whose memory is whose; without, what others use is not known there.

    Resource handling: holds the driver's management library open until `close`. Error handling: `sample` raises
    nothing; what a lacking source would say is None. It takes under a millisecond.
    """

    def __init__(
        self,
        device: int | None,
        pids: Callable[[], Collection[int]],
        accounted: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._pids, self._accounted = pids, accounted
        self._gpu: Gpu | None = None
        if device is not None:
            with contextlib.suppress(pynvml.NVMLError, ValueError):
                self._gpu = Gpu(device)

    def sample(self) -> Sample:
        now, gpu, host = time.monotonic(), GpuSample(), host_sample()
        if self._gpu is not None:
            gpu = self._gpu.sample(self._pids(), self._accounted(), now)
        return Sample(
            at=now, **msgspec.structs.asdict(gpu), host_total=host.total, host_available=host.available,
            memlock=host.memlock, pressure=host.pressure,
        )  # fmt: skip

    def close(self) -> None:
        if self._gpu is not None:
            self._gpu.close()
        self._gpu = None


class Policy:
    """Chooses the memory plan: the lowest level that fits, with hysteresis.

    A cycle of pressure: others take memory and give it back. It ends when a plan that was raised from fits again for
    `DWELL`, or when nothing has moved for `REST`. In a cycle there are at most two changes: the first raise goes to the
    lowest level that fits with room for noise, and with foresight if memory is being taken steadily, or, while it is
    being taken at all, to the one that takes the least of those that are `LITTLE` slower; a second one in the same
    cycle goes to the highest, so that no third is needed; going lower is the last change of a cycle, or the first of
    the next. A request of another size begins a new cycle.
    """

    def __init__(
        self, needs: Needs, plans: Sequence[MemoryPlan], limits: Limits, plan: MemoryPlan, *, copies: bool = False
    ) -> None:
        """`plans`: what there is to choose from, the lowest level and the most blocks first (`footprint.plans`);
        `plan`: what holds now."""
        self._needs = needs
        self._plans = [p for p in plans if limits.lowest <= p.level <= limits.highest]
        self._limits = limits
        self.plan = plan
        """What holds, or will when what was said last has been carried out."""
        self.copies = copies
        """The weights are in host memory, which levels 2 and 3 need."""
        self.locked = True
        """So are their pages, so that copies from there cost what they should."""
        self._running: RequestSize | None = None
        self._seen: collections.deque[tuple[float, int]] = collections.deque()
        """Of the last `REST` seconds and one before: when, and what of the device there was for this engine."""
        self._changes = 0
        self._left: list[MemoryPlan] = []
        """Plans that were raised from and are not back, each higher than the one before."""
        self._noise = 0
        """Bytes; `NOISE` of the device, none if only the budget is known."""
        self._failed: dict[tuple[RequestSize | None, MemoryPlan], tuple[int, float]] = {}
        """Plans whose allocations failed -> how much there was for them, and when."""

    def on(self, sample: Sample, running: RequestSize | None, now: float) -> MemoryPlan | None:
        """The plan that should hold from the next step on, if it is another one. `now`: the sample's clock."""
        if running != self._running:
            self._running, self._changes, self._left = running, 0, []
        there = self._there(sample)
        if there is None or self._limits.lowest == self._limits.highest:
            return None
        self._remember(now, there)
        if self._still(now):
            self._changes = 0
        lead = 0.0 if self._changes else LEAD
        if self._short(self.plan, there - int(self._slope() * lead)):
            return self._raise(there)
        return self._lower(now)

    def held(self, plan: MemoryPlan) -> None:
        """What was asked for was not carried out: this plan holds."""
        self.plan = plan

    def failed(self, sample: Sample | None, running: RequestSize | None, now: float) -> MemoryPlan | None:
        """An allocation failed with the plan that holds: one level higher, or at level 3 the highest plan; what takes
        even less if that does not fit; None if there is none. `sample`: taken since, as who took the memory may have
        come after the one before; None: there is none. The failed plan is not taken again for this size before there
        is more memory than there was, or `FORGOTTEN` has passed."""
        there = None if sample is None else self._there(sample)
        if there is not None:
            self._remember(now, there)
        there = self._seen[-1][1] if self._seen else None
        self._failed[running, self.plan] = there or 0, now
        while len(self._failed) > REMEMBERED:
            del self._failed[next(iter(self._failed))]
        higher = [p for p in self._allowed() if order(p) > order(self.plan)]
        if not higher:
            return None
        if higher[0].level == self.plan.level:
            return self._higher(higher[-1])
        if there is None:
            return self._higher(higher[0])
        wanted = next((p for p in higher if not self._short(p, there)), higher[-1])
        return self._higher(self._frugal(wanted, there) if self._is_taken() else wanted)

    def _there(self, sample: Sample) -> int | None:
        """Bytes of the device that this engine may use; None: not known."""
        there = self._limits.budget
        self._noise = int((sample.total or 0) * NOISE)
        if sample.total is None or sample.others is None:
            return there
        left = sample.total - sample.others - int(sample.total * SLACK)
        return left if there is None else min(there, left)

    def _remember(self, now: float, there: int) -> None:
        self._seen.append((now, there))
        while len(self._seen) > 1 and self._seen[1][0] <= now - REST:
            self._seen.popleft()

    def _still(self, now: float) -> bool:
        """Nothing has moved for `REST`."""
        values = [value for _, value in self._seen]
        return self._seen[0][0] <= now - REST and max(values) - min(values) <= self._noise

    def _slope(self) -> float:
        """Bytes per second at which memory is being taken, at least, if it was in each of the last intervals, `STEADY`
        or more, and more than noise in all; else 0."""
        seen = list(self._seen)[-1 - TREND :]
        steps = [(before - after, end - begin) for (begin, before), (end, after) in pairwise(seen)]
        rates: list[float] = []
        for amount, seconds in reversed(steps):
            if amount <= self._noise // 16:
                break
            rates.append(amount / seconds)
        taken = sum(amount for amount, _ in steps[len(steps) - len(rates) :])
        return min(rates) if len(rates) >= STEADY and taken > self._noise else 0.0

    def _is_taken(self) -> bool:
        """More than noise was taken in the last interval. Who took it may have got no more because there was none."""
        return len(self._seen) > 1 and self._seen[-2][1] - self._seen[-1][1] > self._noise

    def _frugal(self, wanted: MemoryPlan, there: int) -> MemoryPlan:
        """Of those that fit and are `LITTLE` slower than this one, what takes the least, but for the highest of all:
        that is for when the others do not fit."""
        most = self._slowdown(wanted) * (1 + LITTLE)
        fit = [p for p in self._allowed()[:-1] if order(p) >= order(wanted) and not self._short(p, there)]
        return next((p for p in reversed(fit) if self._slowdown(p) <= most), wanted)

    def _is_better(self, wanted: MemoryPlan) -> bool:
        """It is another level, or faster by more than `LITTLE`."""
        return wanted.level < self.plan.level or self._slowdown(self.plan) > self._slowdown(wanted) * (1 + LITTLE)

    def _slowdown(self, plan: MemoryPlan) -> float:
        need = self._needs(self._running, plan)
        return need.slowdown if self.locked else need.slowdown_unlocked

    def _allowed(self) -> list[MemoryPlan]:
        return [p for p in self._plans if p.level < 2 or self.copies]

    def _short(self, plan: MemoryPlan, there: int) -> bool:
        if self._needs(self._running, plan).gpu > there:
            return True
        failed, at = self._failed.get((self._running, plan), (-1, 0.0))
        return there <= failed and self._seen[-1][0] < at + FORGOTTEN

    def _fitting(self, there: int) -> MemoryPlan | None:
        """The lowest level that fits."""
        return next((p for p in self._allowed() if not self._short(p, there)), None)

    def _raise(self, there: int) -> MemoryPlan | None:
        """The plan that holds does not fit, or will not."""
        higher = [p for p in self._allowed() if order(p) > order(self.plan)]
        if not higher:
            return None
        wanted = None
        if not self._changes:
            foreseen = there - int(self._slope() * FORESIGHT)
            wanted = self._fitting(foreseen - self._noise) or self._fitting(foreseen)
            if wanted is not None and self._is_taken():
                wanted = self._frugal(wanted, foreseen)
        if wanted is None or order(wanted) <= order(self.plan):
            wanted = higher[-1]
        return self._higher(wanted)

    def _lower(self, now: float) -> MemoryPlan | None:
        """A lower plan that is better has fitted for `DWELL`, with room for noise, and this cycle has a change left;
        and none that is lower still is about to have fitted for as long, as when others give back bit by bit."""
        if self._slope() or not (free := self._least_since(now - DWELL)):
            return None
        wanted = self._fitting(free - self._noise)
        if wanted is None or order(wanted) >= order(self.plan) or not self._is_better(wanted):
            return None
        soon = self._fitting(self._seen[-1][1] - self._noise)
        if soon is not None and order(soon) < order(wanted):
            return None
        back = bool(self._left) and order(wanted) <= order(self._left[-1])
        if self._changes > (1 if back else 0):
            return None
        self._left = [p for p in self._left if order(p) < order(wanted)]
        self._changes, self.plan = 0 if back else 1, wanted
        return wanted

    def _least_since(self, since: float) -> int:
        """The least there was from the last sample before this moment on; 0 if nothing is known of that time."""
        values = [value for _, value in self._seen]
        known = sum(at <= since for at, _ in self._seen)
        return min(values[known - 1 :]) if known else 0

    def _higher(self, plan: MemoryPlan) -> MemoryPlan:
        if not self._changes:
            self._left = [p for p in self._left if order(p) < order(self.plan)] + [self.plan]
        self._changes += 1
        self.plan = plan
        return plan


def order(plan: MemoryPlan) -> tuple[int, int]:
    """Of two plans the one that leaves more on the device is the lower."""
    return plan.level, -(plan.blocks or 0)
