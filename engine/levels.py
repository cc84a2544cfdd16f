"""How much of the weights each device keeps, and when that changes: by hand, because memory is short or free again, or
because an allocation failed.

What to do is for `engine/monitor.py` to say, how it is carried out is in `engine/crew.py`; this has one follow from the
other, one change of a device at a time, and keeps account of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol

import msgspec

from engine.admission import Room
from engine.crew import Crew
from engine.device_level import DeviceLevel, named, reason, rung
from engine.footprint import Account, Bounds, RequestSize, Setting, plans
from engine.host_copies import HostCopies
from engine.monitor import INTERVAL, SLACK, Limits, Policy, Sample, Sampler, why_slow
from engine.params import ModelParams, SystemParams, bytes_of
from engine.plans import HOST
from engine.starting import LEAST, asked_plan
from engine.states import State
from ipc.errors import Busy, EngineError, Failure, to_failure
from ipc.messages.memory import OFFLOADED, MemoryPlan
from ipc.messages.names import MemoryLevel, Seat
from ipc.messages.status import DeviceMemory, MemoryChange

MAPPING_PATIENCE = 60.0
"""Seconds that a change which was asked for waits for processes to map new weights: a quantum or two."""

RETRY = 5.0
"""Seconds."""

MAX_REASON = 500
"""Characters of what is kept of a failure."""

log = logging.getLogger(__name__)


class Host(Protocol):
    """What the levels need of the supervisor."""

    def handle_level(self, seat: Seat, level: int, top: int) -> None:
        """A seat keeps this level, as the scheduler counts them, and could be asked for up to `top`."""

    def handle_memory_change(self, change: MemoryChange) -> None:
        """A device keeps to another plan, or could not."""

    def running_size(self) -> RequestSize | None:
        """The largest of the requests that are being computed."""

    @property
    def is_exchanging_weights(self) -> bool:
        """New weights are on their way to where they are needed at the level that holds."""


class LevelsState(State, frozen=True, kw_only=True):
    """A `Levels` with no change under way: of each device, the fields of `DeviceLevel` that have these names."""

    mode: dict[str, Literal["auto", "fixed"]]
    last: dict[str, MemoryChange]
    freed: dict[str, int]


class Levels:
    """The levels of all devices of one engine.

    Resource handling: between `start` and `end` owns a task that looks at the machine every `INTERVAL`, the changes
    that follow, and `copies`. Error handling: `change` raises why it cannot be; what was decided here and fails is
    logged, and is the `last` of the status.
    """

    def __init__(
        self, host: Host, crew: Crew, params: SystemParams, model: ModelParams, settings: Mapping[str, Setting]
    ) -> None:
        """`settings`: of each device that has a plan."""
        self._host, self._crew, self._model = host, crew, model
        mode: Literal["auto", "fixed"] = "auto" if params.memory_level == "auto" else "fixed"
        self._devices = {
            device: DeviceLevel(device, mode, setting, Account(model, setting)) for device, setting in settings.items()
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._by_hand = asyncio.Lock()
        """What is asked for, one at a time: each that fails leaves the mode that it found."""
        self._mapping = asyncio.Lock()
        """Of processes that map new weights where the levels need them, and of a change that is asked for."""
        self._rungs = rung(LEAST, model) + 2
        """That the scheduler counts: of the plans, and one for memory that others have given back."""
        self._budget = None if params.gpu_budget is None else bytes_of(params.gpu_budget)
        self._host_sampler = Sampler(None, lambda: ())
        self.copies = HostCopies(model, crew, self._host_sampler.sample, self._copies_changed)

    # Life.

    def start(self) -> None:
        """Begin to look at the machine, and to make copies where the level may change. Also after `end`."""
        for level in self._devices.values():
            if level.device != HOST and level.mode == "auto":
                self._let_choose(level)
            self._announce(level)
        if any(level.policy is not None for level in self._devices.values()):
            self.copies.start()
        if any(level.device != HOST for level in self._devices.values()):
            self._spawn(self._watch(), "memory-monitor")

    async def end(self) -> None:
        """Decide nothing any more; what is being carried out is left as it is."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(set(self._tasks))
        await self.copies.end()
        for level in self._devices.values():
            if level.sampler is not None:
                level.sampler.close()
            level.sampler = level.policy = None

    @property
    def is_changing(self) -> bool:
        return self._by_hand.locked() or any(level.turn.locked() for level in self._devices.values())

    def state(self) -> LevelsState:
        return LevelsState(
            mode={device: level.mode for device, level in self._devices.items()},
            last={device: level.last for device, level in self._devices.items() if level.last is not None},
            freed={device: level.freed for device, level in self._devices.items()},
        )

    def settle(self, settings: Mapping[str, Setting]) -> None:
        """What memory depends on is otherwise from now on: the processes are others. ValueError for other devices."""
        if settings.keys() != self._devices.keys():
            raise ValueError(f"there are settings of {list(settings)}; expected {list(self._devices)}")
        for level in self._devices.values():
            level.setting = settings[level.device]
            level.account = Account(self._model, level.setting)
            if level.policy is not None:
                self._let_choose(level)

    def put_back(self, state: LevelsState) -> None:
        """ValueError if it is of other devices."""
        if not state.mode.keys() == state.freed.keys() == self._devices.keys():
            raise ValueError(f"there are memory levels of {list(state.mode)}; expected {list(self._devices)}")
        for device, level in self._devices.items():
            level.mode, level.last, level.freed = state.mode[device], state.last.get(device), state.freed[device]

    def status(self) -> list[DeviceMemory]:
        copies = self.copies.status()
        return [
            DeviceMemory(
                device=level.device, plan=self._crew.plans.held[level.device], mode=level.mode,
                levels=[0, 1, 2, 3] if self.copies.complete else [0, 1], budget=self._budget, copies=copies,
                slow=self._why_slow(level), last=level.last,
                sample=None if level.sample is None else msgspec.to_builtins(level.sample),
            )
            for level in self._devices.values()
        ]  # fmt: skip

    def room(self) -> Room | None:
        """What there can ever be for a request on the device of the first dit; None: nobody knows."""
        level = self._devices[self._crew.device_of("dit") or HOST]
        if level.sample is None or (total := level.sample.total) is None:
            return None
        there, plan = min(total, self._budget or total), self._crew.plans.held[level.device]
        if level.mode == "fixed":
            bounds = Bounds(lowest=plan.level, highest=plan.level, host=level.sample.host_total)
        else:
            highest = max(plan.level, 1) if self.copies.problem else 3
            bounds = Bounds(highest=highest, host=level.sample.host_total)
        return Room(bytes=there, setting=level.setting, bounds=bounds)

    # By hand.

    async def change(self, wanted: MemoryLevel, blocks: int | None) -> None:
        """Keep so much on every device from now on; with auto, as much as fits. Raises `BadRequest` for blocks that the
        model does not have, `OutOfMemory`, `BadCheckpoint` or `StageFailed`, `Busy` if processes map new weights for
        longer than `MAPPING_PATIENCE`: what was before holds."""
        plan = asked_plan(wanted, blocks, self._model)
        async with self._by_hand, self._nothing_mapped():
            for level in self._devices.values():
                if wanted == "auto" and level.device != HOST:
                    level.mode = "auto"
                    self._let_choose(level)
                    self.copies.start()
                    self._announce(level)
                    continue
                mode, policy = level.mode, level.policy
                level.mode, level.policy = ("auto" if wanted == "auto" else "fixed"), None
                try:
                    await self._change(level, plan, "it was asked for")
                except EngineError:
                    level.mode, level.policy = mode, policy
                    raise
                finally:
                    self._announce(level)

    @asynccontextmanager
    async def _nothing_mapped(self) -> AsyncIterator[None]:
        """Processes do not begin to map new weights, and have ended to."""
        if self._mapping.locked():
            log.info("a memory level was asked for: it waits until new weights are mapped")
        try:
            async with asyncio.timeout(MAPPING_PATIENCE):
                await self._mapping.acquire()
        except TimeoutError as error:
            raise Busy(
                f"new weights have been mapped for {MAPPING_PATIENCE:g} s, and a process is not done with it: it is "
                "busy with a long quantum or does not come up; try again",
                RETRY,
            ) from error
        try:
            yield
        finally:
            self._mapping.release()

    # Because of a reload.

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """No level is changed by hand within: processes map new weights where the levels that hold need them. Copies
        that became wanted while those were read are made afterwards."""
        async with self._mapping:
            yield
        if self._crew.plans.copies and not self.copies.complete:
            self.copies.start()

    async def make_room(self) -> bool:
        """Have the weights leave the GPUs whose level may change, so that there is room for another version, which is
        then placed in host memory, too. False if there is no such GPU. The level comes down again as memory allows."""
        moved = False
        for level in self._devices.values():
            if level.policy is None or self._crew.plans.held[level.device].level >= OFFLOADED:
                continue
            try:
                await self._change(level, MemoryPlan(level=OFFLOADED), "a reload has no room for another version")
                moved = True
            except EngineError as error:
                log.warning("the weights cannot leave %s for a reload: %s", level.device, error)
            finally:
                self._announce(level)
        return moved

    # Because an allocation failed.

    def raise_above(self, seat: Seat, above: int) -> None:
        """The scheduler wants a level above this one. Its answer comes in a turn of the loop of its own."""
        device = self._crew.device_of(seat)
        assert device is not None, f"{seat} computes"
        level = self._devices[device]
        if not level.raising:
            level.raising = True
            self._spawn(self._raise(level, seat, above), f"raise-{seat}")

    async def _raise(self, level: DeviceLevel, seat: Seat, above: int) -> None:
        """One level up, unless that has happened meanwhile; the scheduler hears of it, or that it cannot be."""
        capped = False
        try:
            async with level.turn:
                pass  # a change is under way: see what it brings
            if self._rung(level) <= above:
                capped = not await self._raised(level, seat) and not await self._freed(level)
        finally:
            level.raising = False
            self._announce(level, capped=capped)
        if capped:
            self._announce(level)

    async def _raised(self, level: DeviceLevel, seat: Seat) -> bool:
        policy = level.policy
        if policy is None:
            return False
        plan = self._above_failed(level, policy)
        try:
            if plan is None and not policy.copies:
                await self.copies.ensure()  # a higher level needs them, and they are about to be there
                plan = self._above_failed(level, policy)
            if plan is None:
                return False
            await self._change(level, plan, f"the {seat} stage ran out of memory")
        except EngineError as error:
            log.warning("the memory level of %s cannot be raised: %s", level.device, error)
            return False
        return True

    def _above_failed(self, level: DeviceLevel, policy: Policy) -> MemoryPlan | None:
        """What to keep to after an allocation failed, by what the device has left just now."""
        if level.sampler is not None and (sample := level.sampler.sample()).total is not None:
            level.sample = sample
        now = time.monotonic() if level.sample is None else level.sample.at
        return policy.failed(level.sample, self._host.running_size(), now)

    async def _freed(self, level: DeviceLevel) -> bool:
        """No higher level is left: wait while others have what the request needs; False if it is not that."""
        if level.policy is None or not self._fits(level, beside_others=False) or self._fits(level):
            return False
        log.warning("a request waits for GPU memory that others have: %s", reason(level.sample, self._budget))
        while not self._fits(level):
            await level.looked.next.wait()
        level.freed += 1
        return True

    def _fits(self, level: DeviceLevel, *, beside_others: bool = True) -> bool:
        """What runs should fit, as far as is known, with the plan that holds."""
        sample = level.sample
        if sample is None or sample.total is None or sample.others is None:
            return True
        there = sample.total - int(sample.total * SLACK) - (sample.others if beside_others else 0)
        there = there if self._budget is None else min(there, self._budget)
        return level.account.need(self._host.running_size(), self._crew.plans.held[level.device]).gpu <= there

    # Because of what is seen.

    async def _watch(self) -> None:
        for level in self._devices.values():
            if level.device != HOST:
                # In a thread: the first in a program finds the GPUs, for which the driver has to start.
                level.sampler = await asyncio.to_thread(self._sampler, level)
        while True:
            for level in self._devices.values():
                if level.sampler is not None:
                    self._look(level, level.sampler.sample())
            await asyncio.sleep(INTERVAL)

    def _sampler(self, level: DeviceLevel) -> Sampler:
        number = int(level.device.partition(":")[2])
        return Sampler(number, self._crew.pids, functools.partial(self._ours, level))

    def _look(self, level: DeviceLevel, sample: Sample) -> None:
        level.sample = sample
        level.looked.notify()
        slow = self._why_slow(level)
        if slow and not level.said_slow:
            log.warning("%s: %s", level.device, slow)
        level.said_slow = level.said_slow or bool(slow)
        if level.policy is not None:
            level.policy.locked = not slow
        if level.policy is None or level.turn.locked():
            return
        plan, held = level.policy.on(sample, self._host.running_size(), sample.at), self._crew.plans.held[level.device]
        if plan is not None and plan.level < OFFLOADED <= held.level and self._host.is_exchanging_weights:
            level.policy.held(held)  # they go to host memory only: later
        elif plan is not None:
            self._spawn(self._follow(level, plan, reason(sample, self._budget)), f"memory-{level.device}")

    def _why_slow(self, level: DeviceLevel) -> str:
        """That pages could not be locked, and what to change; empty if they could."""
        if (unlocked := self._crew.upkeep.unlocked(level.device)) is None:
            return ""
        memlock = None if level.sample is None else level.sample.memlock
        return why_slow(unlocked.bytes, unlocked.why, memlock)

    async def _follow(self, level: DeviceLevel, plan: MemoryPlan, why: str) -> None:
        try:
            await self._change(level, plan, why)
        except EngineError as error:
            log.warning("the memory level of %s cannot be changed: %s", level.device, error)
        finally:
            self._announce(level)

    # How.

    async def _change(self, level: DeviceLevel, plan: MemoryPlan, why: str) -> None:
        """Have the device keep to a plan, and write down what became of it."""
        async with level.turn:
            before, began = self._crew.plans.held[level.device], time.monotonic()
            if plan == before:
                return
            failure: Failure | None = None
            try:
                if plan.level >= OFFLOADED:
                    await self.copies.ensure()
                await self._crew.upkeep.set_memory(level.device, plan)
            except EngineError as error:
                failure = to_failure(error)
                failure = Failure(failure.code, failure.message[:MAX_REASON])
                raise
            except BaseException:
                failure = Failure(EngineError.code, "it was interrupted")
                raise
            finally:
                self._note(level, before, plan, why, began, failure)

    def _note(
        self, level: DeviceLevel, before: MemoryPlan, plan: MemoryPlan, why: str, began: float, error: Failure | None
    ) -> None:
        seconds = time.monotonic() - began
        if level.policy is not None:
            level.policy.held(before if error is not None else plan)
        level.last = MemoryChange(
            at=began, device=level.device, before=before, after=plan, why=why, seconds=seconds, error=error
        )
        if error is None:
            log.info(
                "%s is at memory level %s, was at %s: %s (%.2f s)",
                level.device,
                named(plan),
                named(before),
                why,
                seconds,
            )
        self._host.handle_memory_change(level.last)

    def _let_choose(self, level: DeviceLevel) -> None:
        """Have the level follow what is seen."""
        level.policy = Policy(
            level.account.need, plans(self._model), Limits(budget=self._budget), self._crew.plans.held[level.device],
            copies=self.copies.complete,
        )  # fmt: skip

    def _copies_changed(self) -> None:
        for level in self._devices.values():
            if level.policy is not None:
                level.policy.copies = self.copies.complete
            self._announce(level)

    def _announce(self, level: DeviceLevel, *, capped: bool = False) -> None:
        """Tell the scheduler which level holds, and how high it could be; `capped`: no higher."""
        held = self._rung(level)
        top = held if capped or level.policy is None else max(held + 1, self._highest(level))
        for seat in self._crew.seats_on(level.device):
            self._host.handle_level(seat, held, top)

    def _rung(self, level: DeviceLevel) -> int:
        """The plan that holds, as the scheduler counts. Memory that others have given back counts as a level above all
        before."""
        return level.freed * self._rungs + rung(self._crew.plans.held[level.device], self._model)

    def _highest(self, level: DeviceLevel) -> int:
        """That can be asked for where the level may change: one more than there are, as memory may be waited for. So
        may the copies."""
        return level.freed * self._rungs + (1 if self.copies.problem else rung(LEAST, self._model)) + 1

    def _ours(self, level: DeviceLevel) -> int:
        """What this engine has of the device at most, for where the driver does not say whose memory is whose."""
        return level.account.need(self._host.running_size(), self._crew.plans.held[level.device]).gpu

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s ended: %s", task.get_name(), error, exc_info=error)
