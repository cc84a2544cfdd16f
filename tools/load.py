"""What every tool that disturbs an engine needs: requests whose results are known, an engine in a process of its own,
and what a process holds."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from engine import AsyncClient, EngineError, Supervisor, UserParams
from engine.resident import resident_bytes

KINDS: tuple[dict[str, Any], ...] = (
    {"prompt": "a red circle moves left on black", "height": 48, "width": 48, "num_frames": 9, "steps": 4},
    {"prompt": "a still green star", "height": 64, "width": 48, "num_frames": 5, "steps": 3, "solver": "dpm++"},
    {"prompt": "a blue square, still", "height": 48, "width": 48, "num_frames": 17, "steps": 3, "guidance_scale": 1.0},
    {"prompt": "a pink triangle on navy", "height": 64, "width": 64, "num_frames": 17, "steps": 5, "solver": "euler"},
    {"prompt": "a blue circle moves left", "height": 48, "width": 48, "num_frames": 9, "steps": 4, "strength": 0.7},
)  # fmt: skip
"""The requests: sizes, solvers, with and without guidance, the last one from a video."""

CLIENTS = 4
PATIENCE = 120.0
"""Seconds without any request done after which the engine counts as stuck."""


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
        """A request done and compared. `Broken` if neither it nor any other is done for `PATIENCE`: on a busy machine a
        single one may wait for longer, as small ones go first and each fault costs the start of a process."""
        generating = asyncio.create_task(self.engine.generate(ask(kind, path, self.source)))
        try:
            done = -1
            while not generating.done():
                if done == self.done:
                    raise Broken(f"{path.name} of kind {kind}: {done} requests are done, none for {PATIENCE:.0f} s")
                done = self.done
                await asyncio.wait([generating], timeout=PATIENCE)
            await generating
        finally:
            generating.cancel()
        await self.compare(kind, path)

    async def compare(self, kind: int, path: Path) -> None:
        """A request of this kind is done: its frames are the undisturbed ones. Removes the file."""
        if (got := await asyncio.to_thread(digest, path)) != self.golden[kind]:
            raise Broken(f"{path.name} of kind {kind} gave {got[:12]}, undisturbed {self.golden[kind][:12]}")
        await asyncio.to_thread(path.unlink)
        self.done += 1
        self._progress.set()
        self.tally.requests += 1


class Server:
    """`engine serve` as a process of its own, in `folder`; `options` as on the command line."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket = folder / "s" / "engine.sock"
        self.socket.parent.mkdir(mode=0o700)
        self._command = [sys.executable, "-m", "engine", "serve", "--socket", str(self.socket), "--state-dir",
                         str(folder / "state"), *options]  # fmt: skip
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


@contextlib.asynccontextmanager
async def serving(folder: Path, *options: str) -> AsyncIterator[AsyncClient]:
    """A `Server` that listens, drained and stopped at the end, killed after an error; a client of it."""
    server = Server(folder, *options)
    server.start()
    client = AsyncClient(str(server.socket))
    try:
        await listening(client)
        yield client
        await server.stop()
    except BaseException:
        server.kill()
        raise


async def listening(client: AsyncClient) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            await client.server()
            return
        except EngineError as error:
            if time.monotonic() > deadline:
                raise Broken(f"the engine does not come up: {error}") from error
            await asyncio.sleep(0.05)


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
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Footprint:
        links = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        with open(f"/proc/{pid}/maps") as maps:
            mapped = sum("/memfd:" in line for line in maps)
        return cls(
            fds=len(links), threads=len(os.listdir(f"/proc/{pid}/task")), children=len(children(pid)),
            memfds=mapped + sum("/memfd:" in link for link in links), resident=resident_bytes(pid),
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


@contextlib.asynccontextmanager
async def timed(seed: int | None) -> AsyncIterator[Tally]:
    """A tally that knows its seed, which is said at once, and how long it took."""
    tally = Tally(secrets.randbelow(2**31) if seed is None else seed)
    print(f"seed {tally.seed}", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        yield tally
    except BaseException as error:
        print(f"seed {tally.seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        tally.seconds = time.monotonic() - began
