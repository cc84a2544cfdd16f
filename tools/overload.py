"""More requests than the engine can take: what it accepts is done, what it refuses is told when to come back, and
nothing grows.

Requests come by the clock, `TIMES` as many as the engine does, whatever becomes of them. A second client asks for the
status all the time and compares every queue with its bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from engine import AsyncClient, EngineError
from engine.connection import AsyncConnection, Deadlines
from engine.memory import slot_sizes
from engine.models import load_model
from ipc.errors import Busy
from ipc.messages.client import GetStatus
from ipc.messages.server import Status
from ipc.messages.status import EngineStatus
from tools.load import KINDS, PATIENCE, Broken, Load, Tally, ask, serving

TIMES = 10
OFFERED = 1.2 * TIMES
"""Aimed at, so that at least `TIMES` come."""
WARM_UP = 8
"""Requests that tell the engine's rate."""
UNANSWERED = 128
"""Submits at a time, at most: after a pause of this process many are due, and the engine serves 256 connections."""
LOOK = 0.05
"""Seconds between two looks at the status."""
MOST_GROWTH = 16 << 20
"""Bytes that the supervisor's resident memory may grow by under overload."""
ROUND_TRIPS = Deadlines(submit=PATIENCE, reply=PATIENCE)


@dataclass
class Watch:
    """Compares what the engine says of itself with its bounds. `check` raises `Broken`."""

    max_queue: int
    slots: dict[str, int]
    """Of each tensor queue."""
    looks: int = 0
    most: int = 0
    """Requests that waited or ran at a time."""
    first_resident: int = 0
    growth: int = 0
    last: EngineStatus | None = None

    def check(self, status: EngineStatus) -> None:
        unfinished = status.waiting + status.running
        if unfinished > self.max_queue:
            raise Broken(f"{unfinished} requests wait or run, the bound is {self.max_queue}")
        if {queue.name for queue in status.queues} != set(self.slots):
            raise Broken(f"the queues are {[queue.name for queue in status.queues]}, expected {list(self.slots)}")
        for queue in status.queues:
            if max(queue.depth, queue.peak) > self.slots[queue.name]:
                raise Broken(f"{queue.name} had {queue.peak} slots in use, the bound is {self.slots[queue.name]}")
        self.first_resident = self.first_resident or status.resident_bytes
        self.growth = max(self.growth, status.resident_bytes - self.first_resident)
        if self.growth > MOST_GROWTH:
            raise Broken(f"the supervisor grew by {self.growth >> 20} MiB, the bound is {MOST_GROWTH >> 20}")
        self.looks, self.most, self.last = self.looks + 1, max(self.most, unfinished), status

    async def run(self, client: AsyncClient) -> None:
        """Look until cancelled, on one connection."""
        async with AsyncConnection(client.socket, ROUND_TRIPS) as connection:
            while True:
                self.check((await connection.ask(GetStatus(ref=0), Status)).status)
                await asyncio.sleep(LOOK)

    def __str__(self) -> str:
        assert self.last is not None
        peaks = ", ".join(f"{q.name} {q.peak} of {self.slots[q.name]}" for q in self.last.queues)
        return (
            f"{self.looks} looks: at most {self.most} of {self.max_queue} requests in the engine; slots in use at "
            f"most: {peaks}; the supervisor grew by {self.growth / 2**20:.1f} MiB"
        )


def watch_of(max_queue: int, model: str = "wan-demo") -> Watch:
    """With the bounds that the code states."""
    return Watch(max_queue, {name: slots for name, (slots, _) in slot_sizes(load_model(model)).queues.items()})


@dataclass
class Offer:
    """Requests by the clock, each followed to its end."""

    load: Load
    client: AsyncClient
    max_queue: int
    dice: random.Random
    refused: Counter[str] = field(default_factory=Counter)
    offered: int = 0
    unanswered: int = 0
    accepted: int = 0
    reached: float = 0.0
    """`times`, when the last one was offered."""
    slowest: float = 0.0
    """Seconds from a submit to its answer."""

    async def run(self, rate: float, seconds: float) -> None:
        """For so long, where `rate` per second are done; returns when all that were accepted are done and compared."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while (elapsed := time.monotonic() - began) < seconds or self.times < TIMES:
                while self.offered < OFFERED * max(rate * elapsed, self.done) and self.unanswered < UNANSWERED:
                    group.create_task(self._one(self.offered))
                    self.offered, self.unanswered = self.offered + 1, self.unanswered + 1
                await asyncio.sleep(0.01)
            self.reached = self.times

    @property
    def done(self) -> int:
        """While the queue is full: of what was accepted, all but what it holds."""
        return max(0, self.accepted - self.max_queue)

    @property
    def times(self) -> float:
        """How many times as much was offered as was done meanwhile."""
        return self.offered / max(1, self.done)

    async def _one(self, number: int) -> None:
        kind = self.dice.randrange(len(KINDS))
        path = self.load.folder / f"{number}-{kind}.mp4"
        began = time.monotonic()
        try:
            accepted = await self.client.submit(ask(kind, path, self.load.source))
        except EngineError as error:
            self.refused[check_refusal(error)] += 1
            return
        finally:
            self.unanswered -= 1
            self.slowest = max(self.slowest, time.monotonic() - began)
        if accepted.position >= self.max_queue:
            raise Broken(f"accepted at position {accepted.position}, the bound is {self.max_queue}")
        self.accepted += 1
        await self.client.result(accepted.id)
        await self.load.compare(kind, path)


def check_refusal(error: EngineError) -> str:
    """The code of a refusal, which is `busy` and says when to come back."""
    if not isinstance(error, Busy):
        raise Broken(f"refused with {error.code}, expected busy: {error}")
    if error.retry_after is None or error.retry_after <= 0:
        raise Broken(f"busy, and come back in {error.retry_after} seconds: {error}")
    return error.code


def check_ends(status: EngineStatus, expected: int) -> None:
    """Every accepted request has ended, well, and once."""
    if (status.finished, status.failed, status.waiting + status.running) != (expected, 0, 0):
        raise Broken(
            f"{status.finished} finished, {status.failed} failed, {status.waiting + status.running} unfinished; "
            f"expected {expected}, 0 and 0"
        )


@contextlib.asynccontextmanager
async def watched(client: AsyncClient, watch: Watch) -> AsyncIterator[None]:
    """Somebody looks all the time; what is found ends what is done meanwhile."""
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch.run(client))
        yield
        watching.cancel()


async def rate_of(load: Load) -> float:
    """Requests per second when there is always one waiting."""
    began = time.monotonic()
    await load.requests(WARM_UP, asyncio.create_task(asyncio.sleep(0)))
    return WARM_UP / (time.monotonic() - began)


async def overload(tally: Tally, folder: Path, seconds: float, max_queue: int, *options: str) -> Watch:
    """`seconds` of it, on an engine that takes `max_queue` requests; what the watch saw last."""
    videos = folder / "videos"
    videos.mkdir()
    watch = watch_of(max_queue)
    async with serving(folder, "--max-queue", str(max_queue), *options) as client:
        load = Load(client, videos, tally)
        await load.calm()
        rate = await rate_of(load)
        offer = Offer(load, client, max_queue, random.Random(tally.seed))
        before = load.done
        async with watched(client, watch):
            await offer.run(rate, seconds)
        watch.check(await client.status())
        check_ends(await client.status(), len(KINDS) + before + offer.accepted)
    if rest := [path.name for path in videos.iterdir() if not path.name.startswith("calm-")]:
        raise Broken(f"left in the output directory: {rest}")
    if offer.reached < TIMES or watch.most < max_queue:
        raise Broken(f"no overload: {offer.reached:.1f} times what was done, at most {watch.most} requests at a time")
    tally.notes += [
        f"{offer.offered} offered in {seconds:.0f} s, {offer.reached:.1f} times what was done meanwhile; "
        f"{offer.accepted} accepted and done, {sum(offer.refused.values())} refused, all busy with a time to come "
        f"back; the slowest answer to a submit took {offer.slowest:.2f} s",
        str(watch),
    ]
    return watch
