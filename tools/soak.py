"""Clients that die: an engine that serves them for an hour is as it was in the first minutes.

    python -m tools.soak client SOCKET OUTPUT SOURCE KIND FOLLOW SEED     # one of them; started by `soak`

Each client is a process of its own. It takes up the task that a dead one left (FOLLOW, or -), submits a request with
its events, and then, as the dice say, waits for the end, cancels, asks on, or hangs up and comes back; at a random
moment it is killed. What it said before that is what the engine has to keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine import AsyncClient
from engine.child import how_it_ended
from engine.connection import Connection, Deadlines
from ipc.errors import Cancelled
from ipc.messages.client import Cancel, ListTasks, Submit, Subscribe
from ipc.messages.server import Accepted, Done, Failed, Ok, TaskList
from ipc.messages.status import EngineStatus
from tools.load import CLIENTS, KINDS, PATIENCE, Broken, Footprint, Load, Tally, ask, serving

ROOT = Path(__file__).resolve().parent.parent
LIFE = (0.3, 5.0)
"""Seconds after which a client is killed: before it has connected, in the middle, after the end."""
WARM_UP = 5
"""One part in so many of the time passes before the engine is measured."""
STEADY = 2.0
"""Seconds."""
MOST_GROWTH = 16 << 20
"""Bytes of the supervisor's resident memory."""
SLOPE = 1024
"""Bytes per request that it may grow by in a run of at least `ENOUGH` requests."""
ENOUGH = 1000
"""Requests from which on a slope is not the noise of the allocator: 256 ended ones are remembered."""


# The client.


def client(path: Path, output: str, source: Path, kind: int, follow: str, seed: int) -> None:
    """Says `accepted ID` and `cancelling ID` as it goes, `left` at the end. What it is refused with is raised."""
    dice = random.Random(seed)
    with Connection(path, Deadlines()) as connection:
        if follow != "-":
            connection.ask(Subscribe(ref=0, id=follow), Ok)
        params = msgspec.Raw(msgspec.msgpack.encode(ask(kind, Path(output), source)))
        identity = connection.ask(Submit(ref=0, params=params), Accepted).id
        print("accepted", identity, flush=True)
        if dice.random() < 0.25:
            time.sleep(dice.uniform(0, 1.0))
            print("cancelling", identity, flush=True)
            connection.ask(Cancel(ref=0, id=identity), Ok)
        for _ in range(dice.choice((0, 0, 5, 50))):
            connection.ask(ListTasks(ref=0), TaskList)
        if dice.random() < 0.7:
            _end_of(connection, identity)
    with Connection(path, Deadlines()) as connection:
        connection.ask(Subscribe(ref=0, id=identity), Ok)
        _end_of(connection, identity)
    print("left", flush=True)


def _end_of(connection: Connection, identity: str) -> None:
    while not isinstance(event := connection.event(), Done | Failed) or event.id != identity:
        pass


# The soak.


@dataclass
class Soak:
    """Clients one after another in each of `CLIENTS` places, and what the engine owes them."""

    engine: AsyncClient
    load: Load
    tally: Tally
    dice: random.Random
    numbers: Iterator[int] = field(default_factory=itertools.count)
    left_behind: list[str] = field(default_factory=list)
    """Tasks whose client is dead, for the next one to follow."""
    cancelling: set[str] = field(default_factory=set)
    silent: dict[Path, int] = field(default_factory=dict)
    """Outputs, and kinds, of clients that died before they said anything."""
    ends: Counter[str] = field(default_factory=Counter)

    async def run(self, until: float) -> None:
        """Serve dying clients until then (of the monotonic clock)."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._place(until))

    async def _place(self, until: float) -> None:
        while time.monotonic() < until:
            number, kind = next(self.numbers), self.dice.randrange(len(KINDS))
            path = self.load.folder / f"{number}-{kind}.mp4"
            said = await self._life(kind, path)
            await self.settle(kind, path, said)

    async def _life(self, kind: int, path: Path) -> list[str]:
        """What one client said before its end."""
        follow = self.left_behind.pop() if self.left_behind and self.dice.random() < 0.7 else "-"
        words = ("client", self.engine.socket, path, self.load.source, kind, follow, self.dice.getrandbits(32))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tools.soak", *map(str, words), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        handle = os.pidfd_open(process.pid)  # `process.kill` may reap it first, and then its status is lost
        try:
            talking = asyncio.create_task(process.communicate())
            await asyncio.wait([talking], timeout=self.dice.uniform(*LIFE))
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            out, err = await talking
        finally:
            os.close(handle)
        assert process.returncode is not None, "its output has ended, and it was waited for"
        if process.returncode not in (0, -signal.SIGKILL):
            how = how_it_ended(process.returncode)
            raise Broken(f"a client that does nothing wrong ended with {how}: {err.decode()[-500:]}")
        self.tally.faults["SIGKILL of a client" if process.returncode else "client that left by itself"] += 1
        return out.decode().split()

    async def settle(self, kind: int, path: Path, said: list[str]) -> None:
        """What the dead client was promised is kept: its task ends once, well, or cancelled if it may have asked."""
        if "accepted" not in said:
            self.silent[path] = kind
            return
        identity = said[said.index("accepted") + 1]
        self.left_behind = [*self.left_behind[-8:], identity]
        try:
            await asyncio.wait_for(self.engine.result(identity), PATIENCE)
        except Cancelled:
            if "cancelling" not in said:
                raise Broken(f"{path.name} was cancelled, and nobody asked for it") from None
            if await asyncio.to_thread(path.exists):
                raise Broken(f"{path.name} is there, though its task was cancelled") from None
            self.ends["cancelled"] += 1
            return
        self.ends["done"] += 1
        await self.load.compare(kind, path)

    async def settle_silent(self) -> None:
        """Those that died before they could say `accepted` were accepted or not; what is there is whole."""
        await quiet(self.engine)
        for path, kind in self.silent.items():
            if path.exists():
                self.ends["done, though its client died before it heard that it was accepted"] += 1
                await self.load.compare(kind, path)


async def quiet(engine: AsyncClient) -> EngineStatus:
    """The status when nothing waits or runs."""
    deadline = time.monotonic() + PATIENCE
    while (status := await engine.status()).waiting + status.running:
        if time.monotonic() > deadline:
            raise Broken(f"{status.waiting} requests wait and {status.running} run after {PATIENCE:.0f} s")
        await asyncio.sleep(0.1)
    return status


async def soak(tally: Tally, folder: Path, seconds: float, *options: str) -> None:
    """Dying clients for so long; the engine ends as it was after the first part of that."""
    videos = folder / "videos"
    videos.mkdir()
    async with serving(folder, *options) as engine:
        load = Load(engine, videos, tally)
        await load.calm()
        run = Soak(engine, load, tally, random.Random(tally.seed))
        began = time.monotonic()
        await run.run(began + seconds / WARM_UP)
        warm, first = await footprint(engine), tally.requests
        await run.run(began + seconds)
        end = await footprint(engine)
        await run.settle_silent()
        check_flat(warm, end, tally.requests - first)
        check_ends(await engine.status(), run.ends, len(KINDS))
    if rest := [path.name for path in videos.iterdir() if not path.name.startswith("calm-")]:
        raise Broken(f"left in the output directory: {rest}")
    tally.notes += [
        f"{sum(run.ends.values())} accepted: " + ", ".join(f"{count} {end}" for end, count in run.ends.items()),
        f"the supervisor after {seconds / WARM_UP:.0f} s: {warm.resident / 2**20:.1f} MiB, {warm.fds} descriptors, "
        f"{warm.threads} threads; at the end: {end.resident / 2**20:.1f} MiB, {end.fds}, {end.threads}",
    ]


async def footprint(engine: AsyncClient) -> Footprint:
    """Of the supervisor, once it has noticed that its clients are gone: it has no fewer descriptors for `STEADY`."""
    pid = (await quiet(engine)).pid
    least, until = Footprint.of(pid), time.monotonic() + STEADY
    while time.monotonic() < until:
        if (now := Footprint.of(pid)).fds < least.fds:
            least, until = now, time.monotonic() + STEADY
        await asyncio.sleep(0.1)
    return least


def check_flat(warm: Footprint, end: Footprint, requests: int) -> None:
    """Nothing was left by so many requests."""
    grown = warm.grown(end)
    grown.pop("threads", None)  # of its pool, which is bounded and fills up over time
    if grown:
        raise Broken(f"left in the supervisor by dead clients: {grown}")
    growth = end.resident - warm.resident
    most = min(MOST_GROWTH, SLOPE * requests) if requests >= ENOUGH else MOST_GROWTH
    if growth > most:
        raise Broken(f"the supervisor grew by {growth >> 10} KiB in {requests} requests, the bound is {most >> 10}")


def check_ends(status: EngineStatus, ends: Counter[str], calm: int) -> None:
    """The engine counts as many ends as were seen, so no request ended twice and none was lost."""
    done = calm + ends.total() - ends["cancelled"]
    if (status.finished, status.failed) != (done, ends["cancelled"]):
        raise Broken(
            f"the engine says {status.finished} finished and {status.failed} failed or cancelled, its clients saw "
            f"{done} and {ends['cancelled']}"
        )


if __name__ == "__main__":
    _, _, socket, output, source, kind, follow, seed = sys.argv
    client(Path(socket), output, Path(source), int(kind), follow, int(seed))
