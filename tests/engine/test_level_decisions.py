"""What `Levels` does about what is seen, asked for, and fails: with a crew that keeps to every plan at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from engine import levels
from engine.device_level import rung
from engine.footprint import Account, Bounds, RequestSize, Setting
from engine.levels import Levels
from engine.models import load_model
from engine.monitor import Sample
from engine.params import SystemParams
from engine.upkeep import Unlocked
from ipc.errors import BadRequest, Busy, OutOfMemory
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import MemoryLevel, Seat
from ipc.messages.status import MemoryChange
from tests.engine.gpu_crew import GPU, GpuCrew

Wait = Callable[..., Awaitable[None]]

MODEL = load_model("wan2.1-t2v-14b")
SETTING = Setting(queues=False)
GIB = 1 << 30
TOTAL = 80 * GIB
SIZE = RequestSize(832, 480, 81)


class Host:
    """Hears what the supervisor would."""

    def __init__(self) -> None:
        self.said: list[tuple[Seat, int, int]] = []
        self.changes: list[MemoryChange] = []

    def handle_level(self, seat: Seat, level: int, top: int) -> None:
        self.said.append((seat, level, top))

    def handle_memory_change(self, change: MemoryChange) -> None:
        self.changes.append(change)

    def running_size(self) -> RequestSize | None:
        return SIZE

    is_exchanging_weights = False


class Watched:
    """Levels of a 14B model on an 80 GiB GPU, whose samples a test makes up. The copies are there."""

    def __init__(self, **params: Any) -> None:
        self.crew, self.host = GpuCrew(), Host()
        self.crew.pretend(MODEL.components)
        self.levels = Levels(self.host, self.crew, SystemParams(**params), MODEL, {GPU: SETTING})  # type: ignore[arg-type]
        self.now = 0.0

    @property
    def plan(self) -> MemoryPlan:
        return self.crew.plans.held[GPU]

    async def see(self, others: int, seconds: float = 0.5) -> None:
        """Others have taken so much for so long."""
        (level,) = self.levels._devices.values()
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.levels._look(level, Sample(at=self.now, total=TOTAL, others=others, free=TOTAL - others))
            for _ in range(20):
                await asyncio.sleep(0)


@pytest_asyncio.fixture
async def watched() -> AsyncIterator[Watched]:
    made = Watched()
    made.levels.start()
    yield made
    await made.levels.end()
    made.crew.close()


async def test_pages_that_could_not_be_locked(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so once, the status as long as it is so, and what is chosen is what is fast then: under pressure as
    many blocks stay as fit."""
    await watched.see(0, 5)
    assert watched.levels.status()[0].slow == ""
    watched.crew.not_locked = Unlocked(28 * 10**9, "CUDA error 2")
    await watched.see(0, 5)
    slow = watched.levels.status()[0].slow
    assert "28.0 GB" in slow and "(CUDA error 2)" in slow
    assert [message for message in caplog.messages if "locked" in message] == [f"{GPU}: {slow}"]
    await watched.see(60 * GIB, 1)
    unlocked = watched.plan
    assert unlocked.level == 3 and unlocked.blocks

    await watched.see(0, 30)
    watched.crew.not_locked = None
    await watched.see(0, 1)
    assert watched.plan == MemoryPlan() and watched.levels.status()[0].slow == ""
    await watched.see(60 * GIB, 1)
    assert watched.plan.level == 3 and watched.plan.blocks is not None and watched.plan.blocks < unlocked.blocks


async def test_what_there_can_ever_be_for_a_request(watched: Watched) -> None:
    """All of the GPU, whatever others have of it now, and all memory of the host, with any level or with the one that
    was asked for."""
    assert watched.levels.room() is None, "nothing was seen yet"
    (level,) = watched.levels._devices.values()
    watched.levels._look(level, Sample(at=1.0, total=TOTAL, others=GIB, free=GIB, host_total=64 * GIB))
    room = watched.levels.room()
    assert room is not None and room.bytes == TOTAL and room.bounds == Bounds(host=64 * GIB)
    await watched.levels.change(1, None)
    room = watched.levels.room()
    assert room is not None and room.bounds == Bounds(lowest=1, highest=1, host=64 * GIB)


async def test_the_level_follows_what_others_take(watched: Watched) -> None:
    """60 GiB are taken: within a second the level is one that fits; they are given back: level 0 again. The scheduler
    hears of both, for every seat, and each change says why."""
    await watched.see(0, 5)
    assert watched.plan == MemoryPlan()
    await watched.see(60 << 30, 1)
    raised = watched.plan
    assert raised.level >= 2
    assert Account(MODEL, SETTING).need(SIZE, raised).gpu <= TOTAL - (60 << 30)
    assert watched.host.said[-3:] == [(s, rung(raised, MODEL), 44) for s in ("text", "dit", "vae")]
    await watched.see(0, 5)
    assert watched.plan == MemoryPlan()
    first, second = watched.host.changes
    assert (first.before, first.after, second.after) == (MemoryPlan(), raised, MemoryPlan())
    assert "64.4 GB of the GPU are others'" in first.why and first.error is None
    (status,) = watched.levels.status()
    assert status.last == second and status.sample is not None and status.sample["others"] == 0


async def test_a_level_that_was_asked_for_stays(watched: Watched) -> None:
    """Whatever others take; with auto it follows again."""
    await watched.levels.change(2, None)
    await watched.see(0, 5)
    await watched.see(70 << 30, 5)
    assert watched.plan == MemoryPlan(level=2) and watched.levels.status()[0].mode == "fixed"
    assert watched.host.said[-1] == ("vae", 2, 2), "no quantum is tried above it"
    await watched.levels.change("auto", None)
    await watched.see(70 << 30, 5)
    assert watched.plan.level == 3 and watched.levels.status()[0].mode == "auto"


async def test_the_stages_share_a_process(watched: Watched) -> None:
    """Their contexts are fewer: what did not fit beside others' memory fits now, and with a process for each it does
    not again. Settings of other devices are refused."""
    one, each = (Setting(queues=False, processes=count) for count in (1, 3))
    fused, split = (Account(MODEL, setting).need(SIZE, MemoryPlan()).gpu for setting in (one, each))
    assert fused < split
    others = TOTAL - int(TOTAL * levels.SLACK) - (fused + split) // 2
    assert each == SETTING
    await watched.see(others, 10)
    assert watched.plan.level > 0
    watched.levels.settle({GPU: one})
    await watched.see(others, 30)
    assert watched.plan == MemoryPlan()
    watched.levels.settle({GPU: each})
    await watched.see(others, 10)
    assert watched.plan.level > 0
    with pytest.raises(ValueError, match="cuda:7"):
        watched.levels.settle({"cuda:7": each})


async def test_a_failed_allocation_raises_the_level(watched: Watched, wait_until: Wait) -> None:
    """By one; asked twice before it is answered, once. The policy does not come back to what has failed."""
    await watched.see(0, 5)
    watched.host.said.clear()
    for _ in range(2):
        watched.levels.raise_above("dit", 0)
    await wait_until(lambda: watched.host.said, "an answer")
    assert watched.plan == MemoryPlan(level=1) and len(watched.host.changes) == 1
    assert watched.host.changes[0].why == "the dit stage ran out of memory"
    assert watched.host.said == [("text", 1, 44), ("dit", 1, 44), ("vae", 1, 44)]
    await watched.see(0, 20)
    assert watched.plan == MemoryPlan(level=1), "there is no more memory than when it failed"


async def test_a_raise_that_fails(watched: Watched, wait_until: Wait) -> None:
    """The scheduler hears first that there is no higher level, so that what waits for one fails, then that later ones
    may be tried; the plan is as before, and the status says why."""
    await watched.see(0, 5)
    watched.host.said.clear()
    watched.crew.refusal = OutOfMemory("the slots do not fit")
    watched.levels.raise_above("dit", 0)
    await wait_until(lambda: len(watched.host.said) == 6, "both answers")
    assert [said for said in watched.host.said if said[0] == "dit"] == [("dit", 0, 0), ("dit", 0, 44)]
    last = watched.levels.status()[0].last
    assert watched.plan == MemoryPlan() and last is not None and last.error is not None


async def test_what_others_have_is_waited_for(watched: Watched, wait_until: Wait) -> None:
    """At the highest level an allocation fails, and others have more than leaves room for it: the scheduler hears
    nothing until they have given it back, then of a level above all before. When it fails again, though it should fit,
    the scheduler hears that there is no more."""
    await watched.levels.change(3, 0)
    await watched.levels.change("auto", None)
    await watched.see(TOTAL - (1 << 30))
    said = len(watched.host.said)
    (top,) = {top for _, _, top in watched.host.said[-3:]}
    watched.levels.raise_above("dit", 43)
    await watched.see(TOTAL - (1 << 30), 3)
    assert len(watched.host.said) == said
    await watched.see(TOTAL - (40 << 30))
    await wait_until(lambda: len(watched.host.said) > said, "an answer")
    _, level, higher = watched.host.said[-1]
    assert level > 43 and higher > top >= 44
    said = len(watched.host.said)
    watched.levels.raise_above("dit", higher)
    await wait_until(lambda: len(watched.host.said) > said, "a refusal")
    assert all(top == level for _, level, top in watched.host.said[said : said + 3]), "there is no more"


async def test_while_weights_are_exchanged(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read to where the level needs them: it is not lowered so that they would be needed elsewhere, unless
    that is asked for; and then not while processes map them."""
    await watched.see(0, 5)
    await watched.see(60 << 30, 1)
    raised = watched.plan
    monkeypatch.setattr(watched.host, "is_exchanging_weights", True)
    await watched.see(0, 5)
    assert watched.plan == raised
    monkeypatch.setattr(levels, "MAPPING_PATIENCE", 0.05)
    async with watched.levels.kept():
        with pytest.raises(Busy, match="new weights have been mapped for 0"):
            await watched.levels.change(0, None)
    assert watched.plan == raised and watched.levels.status()[0].mode == "auto"
    await watched.levels.change(0, None)
    assert watched.plan == MemoryPlan()
    await watched.levels.change("auto", None)
    await watched.see(60 << 30, 1)
    raised = watched.plan
    assert raised.level == 3
    monkeypatch.setattr(watched.host, "is_exchanging_weights", False)
    await watched.see(0, 12)
    assert watched.plan == MemoryPlan()


async def test_a_change_that_was_asked_for_and_fails_changes_nothing(watched: Watched) -> None:
    """Neither the plan nor that it follows what is seen."""
    watched.crew.refusal = OutOfMemory("the slots do not fit")
    with pytest.raises(OutOfMemory, match="the slots do not fit"):
        await watched.levels.change(3, 10)
    assert watched.plan == MemoryPlan() and watched.levels.status()[0].mode == "auto"
    await watched.see(60 << 30, 2)
    assert watched.plan.level >= 2


@pytest.mark.parametrize(
    ("level", "blocks", "says"),
    [
        (3, 41, "blocks is 41, but the DiT of wan2.1-t2v-14b has 40 blocks; it must be from 0 to 40"),
        (3, -1, "from 0 to 40"),
        (2, 4, "blocks is 4 and the level 2; blocks are of level 3"),
        ("auto", 4, "blocks are of level 3"),
    ],
)
async def test_blocks_that_there_are_not(watched: Watched, level: MemoryLevel, blocks: int, says: str) -> None:
    """Refused, not cut to what there is; and nothing has changed."""
    with pytest.raises(BadRequest, match=says):
        await watched.levels.change(level, blocks)
    assert watched.plan == MemoryPlan() and watched.levels.status()[0].mode == "auto" and not watched.host.changes
    await watched.levels.change(3, 40)
    assert watched.plan == MemoryPlan(level=3, blocks=40)


async def test_of_two_that_are_asked_for_at_once_the_second_holds(watched: Watched) -> None:
    """Also when the first fails after the second was asked for: the level does not follow what is seen then."""
    (device,) = watched.levels._devices.values()
    watched.crew.refusal = OutOfMemory("the slots do not fit")
    async with device.turn:  # a change that is under way
        both = [asyncio.create_task(watched.levels.change(level, None)) for level in (3, 2)]
        await asyncio.sleep(0.01)
    first, second = await asyncio.gather(*both, return_exceptions=True)
    assert isinstance(first, OutOfMemory) and second is None
    assert watched.levels.status()[0].mode == "fixed"
    await watched.see(0, 5)
    assert watched.plan == MemoryPlan(level=2)


async def test_a_fixed_level_is_not_raised(wait_until: Wait) -> None:
    """An engine that was started with a level: no policy, and the scheduler knows from the start that it is the top."""
    made = Watched(memory_level=0)
    made.levels.start()
    assert made.host.said == [("text", 0, 0), ("dit", 0, 0), ("vae", 0, 0)]
    await made.see(70 << 30, 5)
    assert made.plan == MemoryPlan() and made.levels.status()[0].sample is not None
    await made.levels.end()
    made.crew.close()


async def test_it_goes_on_after_a_hand_over(watched: Watched) -> None:
    """Mode and last change are those of the program before."""
    await watched.levels.change(2, None)
    state = watched.levels.state()
    after = Watched()
    after.crew.plans.put_back(watched.crew.plans.state())
    after.levels.put_back(state)
    after.levels.start()
    (level,) = after.levels.status()
    assert (level.plan, level.mode, level.last) == (MemoryPlan(level=2), "fixed", watched.host.changes[-1])
    await after.levels.end()
    after.crew.close()


async def test_a_reload_makes_room(watched: Watched) -> None:
    """The weights leave the GPU, once, and come back as memory allows; a level that was asked for stays."""
    await watched.see(0, 1)
    assert await watched.levels.make_room()
    assert watched.plan == MemoryPlan(level=2)
    assert watched.host.changes[-1].why == "a reload has no room for another version"
    assert watched.host.said[-1] == ("vae", 2, 44)
    assert not await watched.levels.make_room(), "there is no more to be had"
    await watched.see(0, 15)
    assert watched.plan == MemoryPlan()
    await watched.levels.change(1, None)
    assert not await watched.levels.make_room()
    assert watched.plan == MemoryPlan(level=1)
