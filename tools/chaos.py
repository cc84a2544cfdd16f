"""Faults on a running engine with the model that ships, and the proof that they do not show in any result.

    python -m tools.chaos kills --kills 1000 --requests 2000       # SIGKILL of random stages at random moments
    python -m tools.chaos kills --dits 3                           # the same with three dits
    python -m tools.chaos stops --stops 100                        # SIGSTOP: stages that hang
    python -m tools.chaos restarts --kills 200                     # SIGKILL of the supervisor
    python -m tools.chaos leaks --requests 10000 --kills 500       # what is left after many requests and restarts

Each prints its seed and what it did; with `--seed` the same faults are drawn again (when they hit is the machine's).
Any difference from the undisturbed result, any request lost or done twice, anything left behind is a `Broken`, and exit
status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from engine import AsyncClient, EngineError, Supervisor, SystemParams, UserParams
from ipc.messages import Seat

KINDS: tuple[dict[str, Any], ...] = (
    {"prompt": "a red circle moves left on black", "height": 48, "width": 48, "num_frames": 9, "steps": 4},
    {"prompt": "a still green star", "height": 64, "width": 48, "num_frames": 5, "steps": 3, "solver": "dpm++"},
    {"prompt": "a blue square, still", "height": 48, "width": 48, "num_frames": 17, "steps": 3, "guidance_scale": 1.0},
    {"prompt": "a pink triangle on navy", "height": 96, "width": 96, "num_frames": 17, "steps": 5, "solver": "euler"},
    {"prompt": "a blue circle moves left", "height": 48, "width": 48, "num_frames": 9, "steps": 4, "strength": 0.7},
)  # fmt: skip
"""The requests: sizes, solvers, with and without guidance, the last one from a video."""

CLIENTS = 4
PATIENCE = 120.0
"""Seconds without any request done after which the engine counts as stuck."""
LEAVE = 5.0
"""Seconds that the stages may outlive their supervisor."""


class Broken(AssertionError):
    """A promise of the engine did not hold."""


@dataclass
class Tally:
    """What a run did and found."""

    seed: int
    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        lines = [f"{self.requests} requests, all identical to the undisturbed ones; {faults or 'no faults'}",
                 f"{self.seconds:.0f} s, seed {self.seed}", *self.notes]  # fmt: skip
        return "\n".join(lines)


def ask(kind: int, output: Path, source: Path) -> UserParams:
    """The request of this kind; `source` is the video that the last kind starts from."""
    video = {"video": str(source)} if "strength" in KINDS[kind] else {}
    return UserParams(seed=kind, output=str(output), **KINDS[kind], **video)


def digest(path: Path) -> str:
    """SHA-256 of the decoded frames."""
    total = hashlib.sha256()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            total.update(frame.to_ndarray(format="rgb24").tobytes())
    return total.hexdigest()


class Load:
    """Requests of all kinds, one after another per client, each compared with its undisturbed result."""

    def __init__(self, engine: Supervisor | AsyncClient, folder: Path, tally: Tally) -> None:
        self.engine = engine
        self.folder = folder
        self.source = folder / "calm-0.mp4"
        self.tally = tally
        self.golden: list[str] = []
        self.done = 0
        self._progress = asyncio.Event()
        self._numbers: Iterator[int] = itertools.count()

    async def calm(self) -> None:
        """What each kind of request gives when nobody disturbs it."""
        for kind in range(len(KINDS)):
            path = self.folder / f"calm-{kind}.mp4"
            await self.engine.generate(ask(kind, path, self.source))
            self.golden.append(await asyncio.to_thread(digest, path))
        if len(set(self.golden)) != len(KINDS):
            raise Broken("two kinds of requests give the same frames, so a mix-up would not be seen")

    async def requests(self, count: int, disturber: asyncio.Task[None]) -> None:
        """At least `count` requests from `CLIENTS` clients, until the disturber is through as well."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(count, disturber))

    async def _client(self, count: int, disturber: asyncio.Task[None]) -> None:
        while (number := next(self._numbers)) < count or not disturber.done():
            await self.one(number % len(KINDS), self.folder / f"{number}.mp4")

    async def have_done(self, count: int) -> None:
        """Wait until so many requests are done."""
        while self.done < count:
            self._progress.clear()
            await self._progress.wait()

    async def one(self, kind: int, path: Path) -> None:
        """A request done and compared."""
        done = await asyncio.wait_for(self.engine.generate(ask(kind, path, self.source)), PATIENCE)
        if (got := await asyncio.to_thread(digest, path)) != self.golden[kind]:
            raise Broken(f"request {done.id} of kind {kind} gave {got[:12]}, undisturbed {self.golden[kind][:12]}")
        await asyncio.to_thread(path.unlink)
        self.done += 1
        self._progress.set()
        self.tally.requests += 1


async def kills(
    tally: Tally, folder: Path, requests: int, count: int, params: SystemParams, stop: bool = False
) -> None:
    """`count` SIGKILLs (or SIGSTOPs) of random stages at random moments, spread over `requests` requests."""
    dice = random.Random(tally.seed)
    before = Footprint.of_this_process()
    async with Supervisor(params) as supervisor:
        load = Load(supervisor, folder, tally)
        await load.calm()
        striking = asyncio.create_task(_strike(supervisor, load, tally, dice, requests, count, stop))
        await load.requests(requests, striking)
        await striking
        await _settled(supervisor)
        status, expected = supervisor.status(), load.done + len(KINDS)
        if status.finished != expected or status.failed:
            raise Broken(f"{status.finished} finished and {status.failed} failed, expected {expected} and 0")
        tally.notes.append("restarts: " + ", ".join(f"{s.name} {s.restarts}" for s in status.stages))
    nothing_left(folder, before)


async def _strike(
    supervisor: Supervisor, load: Load, tally: Tally, dice: random.Random, requests: int, count: int, stop: bool
) -> None:
    """One fault after another, each when its share of the requests is done, and a random moment later."""
    seats = seats_of(supervisor)
    for number in range(count):
        await load.have_done(number * requests // count)
        await asyncio.sleep(dice.uniform(0, 0.4))
        stage = dice.choice(seats)
        while (pid := pid_of(supervisor, stage)) is None:
            stage = dice.choice(seats)
            await asyncio.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if stop else signal.SIGKILL)
            tally.faults[f"{'SIGSTOP' if stop else 'SIGKILL'} of {stage}"] += 1
            if stop:
                await _replaced(supervisor, stage, pid)


async def _replaced(supervisor: Supervisor, stage: Seat, pid: int) -> None:
    """A stopped stage is found as soon as it has something to do; requests go on all the time."""
    deadline = time.monotonic() + PATIENCE
    while pid_of(supervisor, stage) == pid:
        if time.monotonic() > deadline:
            raise Broken(f"the stopped {stage} was not replaced within {PATIENCE:.0f} s")
        await asyncio.sleep(0.05)


def seats_of(supervisor: Supervisor) -> list[Seat]:
    return [stage.name for stage in supervisor.status().stages]


def pid_of(supervisor: Supervisor, stage: Seat) -> int | None:
    return next(s.pid for s in supervisor.status().stages if s.name == stage)


async def _settled(supervisor: Supervisor) -> None:
    """Every slot is given back and all accounts are in order."""
    deadline = time.monotonic() + PATIENCE
    while problems := supervisor.check_integrity() or [q.name for q in supervisor.status().queues if q.depth]:
        if time.monotonic() > deadline:
            raise Broken(f"after all requests: {problems}")
        await asyncio.sleep(0.05)


# What is left behind.


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    fds: int
    threads: int
    children: int
    memfds: int
    resident: int

    @classmethod
    def of_this_process(cls) -> Footprint:
        links = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        with open("/proc/self/maps") as maps:
            mapped = sum("/memfd:" in line for line in maps)
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(
            fds=len(links), threads=len(os.listdir("/proc/self/task")), children=len(children(os.getpid())),
            memfds=mapped + sum("/memfd:" in link for link in links), resident=resident,
        )  # fmt: skip

    def grown(self, later: Footprint) -> dict[str, int]:
        """What a later footprint has more of, but for resident memory."""
        names = ("fds", "threads", "children", "memfds")
        return {n: getattr(later, n) - getattr(self, n) for n in names if getattr(later, n) != getattr(self, n)}


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(child) for child in file.read().split()]
    return found


def nothing_left(folder: Path, before: Footprint) -> None:
    if rest := [p.name for p in folder.iterdir() if p.name.startswith(".") or not p.name.startswith("calm-")]:
        raise Broken(f"left in the output directory: {rest}")
    grown = before.grown(Footprint.of_this_process())
    grown.pop("threads", None)  # of the host's own pool
    if grown:
        raise Broken(f"left in this process: {grown}")


async def leaks(tally: Tally, folder: Path, requests: int, count: int, params: SystemParams) -> None:
    """Many requests and restarts on one supervisor: descriptors, threads, children and memfds end as they were after a
    warm-up, and resident memory grows by less than 1 KiB per request."""
    dice = random.Random(tally.seed)
    small = {"prompt": "a circle", "height": 32, "width": 32, "num_frames": 1, "steps": 1}
    async with Supervisor(params) as supervisor:

        async def batch(name: str, size: int) -> None:
            async def client(numbers: Iterator[int]) -> None:
                for number in numbers:
                    path = folder / f"{name}-{number}.mp4"
                    await asyncio.wait_for(
                        supervisor.generate(UserParams(seed=number, output=str(path), **small)), PATIENCE
                    )
                    path.unlink()
                    tally.requests += 1

            numbers = iter(range(size))
            await asyncio.gather(*(client(numbers) for _ in range(CLIENTS)))

        await batch("warm", max(300, requests // 10))
        await _fill_the_thread_pool()
        await _settled(supervisor)
        start = Footprint.of_this_process()
        for number in range(count):
            stage = dice.choice(seats_of(supervisor))
            if (pid := pid_of(supervisor, stage)) is not None:
                os.kill(pid, signal.SIGKILL)
                tally.faults[f"SIGKILL of {stage}"] += 1
            await batch(str(number), requests // count)
        await supervisor.ready()
        await _settled(supervisor)
        end = Footprint.of_this_process()
    if grown := start.grown(end):
        raise Broken(f"after {requests} requests and {count} restarts: {grown}")
    slope = (end.resident - start.resident) / requests
    tally.notes.append(f"resident memory of the supervisor: {slope:+.0f} bytes per request")
    if slope > 1024:
        raise Broken(f"resident memory grew by {slope:.0f} bytes per request, expected at most 1024")


async def _fill_the_thread_pool() -> None:
    """The host's pool starts its threads as they are needed: have all of them started."""
    size = min(32, (os.cpu_count() or 1) + 4)
    barrier = threading.Barrier(size)
    await asyncio.gather(*(asyncio.to_thread(barrier.wait) for _ in range(size)))


# The supervisor.


class Server:
    """`engine serve` as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s" / "engine.sock"
        self.socket.parent.mkdir(mode=0o700)
        self._command = [sys.executable, "-m", "engine", "serve", "--socket", str(self.socket), "--state-dir",
                         str(folder / "state")]  # fmt: skip
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, cwd=Path(__file__).resolve().parent.parent, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def kill(self) -> list[int]:
        """SIGKILL; the stage processes it leaves behind."""
        assert self.process is not None
        orphans = children(self.process.pid)
        self.process.kill()
        self.process.wait()
        return orphans

    async def stop(self) -> None:
        client = AsyncClient(str(self.socket))
        await client.shutdown(drain=True)
        assert self.process is not None
        await asyncio.to_thread(self.process.wait, 60)


async def restarts(tally: Tally, folder: Path, count: int) -> None:
    """SIGKILL of the supervisor at a random moment, `count` times: its stages leave, and the next one does what was
    accepted, once."""
    dice = random.Random(tally.seed)
    videos = folder / "videos"
    videos.mkdir()
    server = Server(folder)
    server.start()
    client = AsyncClient(str(server.socket))
    await _listening(client)
    load = Load(client, videos, tally)
    await load.calm()
    slowest = 0.0
    for number in range(count):
        accepted: dict[int, Path] = {}
        for kind in dice.sample(range(len(KINDS)), 3):
            path = videos / f"{number}-{kind}.mp4"
            await client.submit(ask(kind, path, load.source))
            accepted[kind] = path
        await asyncio.sleep(dice.uniform(0, 3.0))
        orphans = server.kill()
        tally.faults["SIGKILL of the supervisor"] += 1
        slowest = max(slowest, await _gone(orphans))
        server.start()
        await _listening(client)
        await _finished(client)
        for kind, path in accepted.items():
            if (got := digest(path)) != load.golden[kind]:
                raise Broken(f"{path.name} gave {got[:12]}, undisturbed it gives {load.golden[kind][:12]}")
            path.unlink()
            tally.requests += 1
        if rest := [p.name for p in videos.iterdir() if not p.name.startswith("calm-")]:
            raise Broken(f"left in the output directory: {rest}")
    await server.stop()
    tally.notes.append(f"stages left {slowest:.2f} s after their supervisor at the latest")


async def _listening(client: AsyncClient) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            await client.server()
            return
        except EngineError as error:
            if time.monotonic() > deadline:
                raise Broken(f"the engine does not come up: {error}") from error
            await asyncio.sleep(0.05)


async def _finished(client: AsyncClient) -> None:
    """All tasks of the journal have ended well."""
    deadline = time.monotonic() + PATIENCE
    while tasks := await client.tasks():
        if failed := [task for task in tasks if task.state in ("failed", "cancelled")]:
            raise Broken(f"{failed[0].id} {failed[0].state}: {failed[0].error}")
        if all(task.state == "done" for task in tasks):
            return
        if time.monotonic() > deadline:
            raise Broken(f"not finished: {[(task.state, task.phase) for task in tasks]}")
        await asyncio.sleep(0.05)


async def _gone(pids: list[int]) -> float:
    """Seconds until none of these processes is left."""
    began = time.monotonic()
    while any(_alive(pid) for pid in pids):
        if time.monotonic() - began > LEAVE:
            raise Broken(f"stages outlive their supervisor by {LEAVE:.0f} s")
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def _alive(pid: int) -> bool:
    """The process runs; one that has ended and waits to be reaped does not count."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Command line.


@contextlib.asynccontextmanager
async def timed(seed: int | None) -> AsyncIterator[Tally]:
    """A tally that knows its seed, printed or not, and how long it took."""
    tally = Tally(secrets.randbelow(2**31) if seed is None else seed)
    began = time.monotonic()
    try:
        yield tally
    except BaseException as error:
        print(f"seed {tally.seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        tally.seconds = time.monotonic() - began


async def run(arguments: argparse.Namespace) -> Tally:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with timed(arguments.seed) as tally:
            match arguments.what:
                case "kills":
                    params = SystemParams(dit_devices=("cpu",) * arguments.dits if arguments.dits > 1 else ())
                    await kills(tally, folder, arguments.requests, arguments.kills, params)
                case "stops":
                    params = SystemParams(stage_deadline=2.0, start_deadline=20.0)
                    await kills(tally, folder, 2 * arguments.stops, arguments.stops, params, stop=True)
                case "restarts":
                    await restarts(tally, folder, arguments.kills)
                case "leaks":
                    await leaks(tally, folder, arguments.requests, arguments.kills, SystemParams())
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "stops", "restarts", "leaks"))
    parser.add_argument("--seed", type=int, help="draw the same faults again")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--dits", type=int, default=1, help="for kills: so many, on a CPU")
    arguments = parser.parse_args()
    try:
        tally = asyncio.run(run(arguments))
    except Broken:
        return 1
    print(f"{arguments.what}: {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
