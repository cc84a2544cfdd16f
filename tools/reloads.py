"""Reloads under constant load: `python -m tools.chaos reloads`.

Four clients ask for one small video after another while the weights go to and fro between the two revisions of the
model that ships. Every video must be that of the version which its metadata names, none may fail, and the slowest may
be little slower than without reloads. The same engine is measured with and without them in turns, as others use the
machine too.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from pathlib import Path

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from ipc.messages.client import Reload
from tools.load import CLIENTS, PATIENCE, Broken, Footprint, Tally, digest, nothing_left

REVISIONS = (CONFIGS / "demo", CONFIGS / "demo" / "revision-2")
COMPONENT = "transformer"
TURNS = 5


class Latencies:
    """Seconds from submission to the end, of the requests of one stretch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def percentile(self, percent: int) -> float:
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    def __str__(self) -> str:
        return f"p50 {self.percentile(50):.3f} s, p99 {self.percentile(99):.3f} s of {len(self.seconds)}"


class Rounds:
    """One engine, its clients, and what each version makes of the request."""

    def __init__(self, supervisor: Supervisor, folder: Path, tally: Tally) -> None:
        self._supervisor, self._folder, self._tally = supervisor, folder, tally
        self.golden: dict[str, str] = {}
        """Content hash of the transformer -> SHA-256 of the frames."""
        self.made: dict[str, int] = {}
        """Content hash -> videos."""
        self._numbers = itertools.count()
        self._revisions = itertools.cycle((1, 0))
        self._contents: dict[int, str] = {}
        """Revision -> content hash of its transformer."""

    async def calm(self) -> None:
        """What each version gives when nothing else happens."""
        for revision in (1, 0):
            done = await self.reload(revision)
            path = self._folder / f"calm-{revision}.mp4"
            made = await self._supervisor.generate(ask(path))
            assert done == made.metadata["weights"][COMPONENT], "nobody else reloads"
            self.golden[done], self._contents[revision] = digest(path), done
        if len(set(self.golden.values())) != len(REVISIONS):
            raise Broken("both versions give the same frames, so a mix-up would not be seen")

    async def reload(self, revision: int) -> str:
        """The content hash that is served then."""
        asked = Reload(ref=0, checkpoint=str(REVISIONS[revision]), components=[COMPONENT])
        await self._supervisor.reload(asked)
        return self._supervisor.status().weights[COMPONENT]

    async def requests(self, count: int, reloads: int) -> tuple[Latencies, list[float]]:
        """At least `count` requests, until the reloads that are spread over them are done as well: none is without
        load. Latencies, and the seconds that each reload took."""
        latencies, done, took = Latencies(), asyncio.Condition(), list[float]()

        async def client() -> None:
            while next(started) < count or len(took) < reloads:
                path = self._folder / f"{next(self._numbers)}.mp4"
                began = time.monotonic()
                made = await asyncio.wait_for(self._supervisor.generate(ask(path)), PATIENCE)
                seconds = time.monotonic() - began
                content = made.metadata["weights"][COMPONENT]
                if (got := await asyncio.to_thread(digest, path)) != self.golden[content]:
                    raise Broken(f"{path.name} says it is of {content[:12]}, and its frames are {got[:12]}")
                path.unlink()
                async with done:
                    latencies.seconds.append(seconds)
                    self.made[content] = self.made.get(content, 0) + 1
                    self._tally.requests += 1
                    done.notify_all()

        async def disturb() -> None:
            for number in range(reloads):
                async with done:
                    while len(latencies.seconds) < number * count // reloads:
                        await done.wait()
                began, revision = time.monotonic(), next(self._revisions)
                if (content := await self.reload(revision)) != self._contents[revision]:
                    raise Broken(f"after reload {number} {content[:12]} is served")
                took.append(time.monotonic() - began)
                self._tally.faults["reloads"] += 1

        started = itertools.count()
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client())
            group.create_task(disturb())
        return latencies, took


def ask(path: Path) -> UserParams:
    return UserParams(
        prompt="a red circle moves left on black", seed=5, output=str(path), height=48, width=48, num_frames=9, steps=4
    )


async def reloads(
    tally: Tally, folder: Path, requests: int, count: int, worst: float, without: int | None = None
) -> None:
    """`count` reloads over at least `requests` requests, in turns with `without` requests without; None: as many.
    `Broken` if p99 is more than `worst` times that of these."""
    before = Footprint.of_this_process()
    calm, disturbed, took = Latencies(), Latencies(), list[float]()
    async with Supervisor(SystemParams(model="wan-demo", device="cpu")) as supervisor:
        await supervisor.ready()
        rounds = Rounds(supervisor, folder, tally)
        await rounds.calm()
        for _ in range(TURNS):
            alone, _ = await rounds.requests((requests if without is None else without) // TURNS, 0)
            beside, seconds = await rounds.requests(requests // TURNS, count // TURNS)
            calm.seconds += alone.seconds
            disturbed.seconds += beside.seconds
            took += seconds
        status = supervisor.status()
        if status.failed or problems(supervisor):
            raise Broken(f"{status.failed} requests failed; {problems(supervisor)}")
    nothing_left(folder, before)
    for content in rounds.golden:
        if (number := rounds.made.get(content, 0)) < requests // 10:
            raise Broken(f"only {number} videos are of {content[:12]}: the versions did not take turns")
    ratio = disturbed.percentile(99) / calm.percentile(99)
    made = ", ".join(f"{count} of {content[:12]}" for content, count in sorted(rounds.made.items()))
    tally.notes += [
        f"videos: {made}",
        f"without reloads: {calm}",
        f"with reloads: {disturbed}; p99 {ratio:.2f} times",
        f"a reload: median {statistics.median(took):.3f} s, longest {max(took):.3f} s",
    ]
    if ratio > worst:
        raise Broken(f"with reloads p99 is {ratio:.2f} times that without, expected at most {worst:g}")


def problems(supervisor: Supervisor) -> list[str]:
    """Accounts that are not in order, and versions in memory that nobody needs."""
    serving = supervisor.status().weights.values()
    placed = [h.generation for h in supervisor.memory() if h.name == COMPONENT]
    extra = [f"{content[:12]} is still placed" for content in placed if content not in serving]
    return supervisor.check_integrity() + extra
