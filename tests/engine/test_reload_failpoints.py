"""Somebody kills a process at each phase of a reload: what is served afterwards is wholly old or wholly new, the
request in hand is finished by the version it began with, and nothing else stays in memory."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from engine import Client, Supervisor
from ipc.errors import EngineError
from ipc.messages.client import Canary
from tests.conftest import Video, until
from tests.engine.reloading import ask, denoising, engine, order, placed, vary, video
from tests.engine.striking import POINTS, strike_at
from tests.engine.wire import EngineProcess, wait_for
from tools.chaos import pid_of

COMPONENTS = ("transformer", "text_encoder", "vae")
LONG = {"steps": 80}
"""The request in hand: it lives longer than a reload."""

VICTIMS = {seat: list(POINTS) for seat in ("text", "dit", "vae", "writer", "loader")} | {"reader": ["it reads"]}
"""Who, and at which points; there is a reader at one of them only."""
CASES = [(victim, point) for victim, points in VICTIMS.items() for point in points]
READING = ("the loader is there", "it reads")
"""Points at which a reload fails without the process that reads."""


class Versioned:
    """One engine; two checkpoints that differ in every component; what each makes of a request."""

    def __init__(self, supervisor: Supervisor, checkpoints: dict[str, Path]) -> None:
        self.supervisor, self.checkpoints = supervisor, checkpoints
        self.weights: dict[str, dict[str, str]] = {}
        self.golden: dict[str, tuple[str, str]] = {}
        """Name -> SHA-256 of the frames of `ask`, and of it with `LONG`."""

    async def calm(self, folder: Path) -> None:
        for name, directory in self.checkpoints.items():
            await self.supervisor.reload(order(directory, *COMPONENTS))
            self.weights[name] = self.supervisor.status().weights
            short = await video(self.supervisor, folder / "v.mp4")
            self.golden[name] = (short, await video(self.supervisor, folder / "v.mp4", **LONG))

    def name_of(self, weights: dict[str, str]) -> str:
        """Of the version that these are, wholly."""
        (name,) = [name for name, whole in self.weights.items() if whole == weights]
        return name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def versioned(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Versioned]:
    folder = tmp_path_factory.mktemp("checkpoints")
    async with engine(warm_spare=True) as supervisor:
        found = Versioned(supervisor, {"a": vary(folder / "a", 1), "b": vary(folder / "b", 2)})
        await found.calm(folder)
        yield found


def find(supervisor: Supervisor, victim: str) -> int | None:
    if victim not in ("loader", "reader"):
        return pid_of(supervisor, victim)
    loader = supervisor._reloader._loader.pid
    if victim == "loader" or loader is None:
        return loader
    found = Path(f"/proc/{loader}/task/{loader}/children").read_text().split()
    return int(found[0]) if found else None


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("victim", "point"), CASES)
async def test_killed_during_a_reload(versioned: Versioned, tmp_path: Path, victim: str, point: str) -> None:
    """A kill of a stage is not seen at all; without who reads, nothing has changed, unless all was read."""
    supervisor = versioned.supervisor
    old = versioned.name_of(supervisor.status().weights)
    new = "a" if old == "b" else "b"
    if point == "the loader is there":
        await supervisor._reloader.end()
    running = asyncio.create_task(supervisor.generate(ask(tmp_path / "running.mp4", **LONG)))
    await until(lambda: denoising(supervisor, 2), "the second step")
    canary = Canary(params=msgspec.Raw(msgspec.msgpack.encode(ask(tmp_path / "canary.mp4", steps=1))))
    struck = strike_at(POINTS[point], lambda: find(supervisor, victim))
    fails = victim in ("loader", "reader") and point in READING
    expected = old if fails else new
    with pytest.raises(EngineError) if fails else contextlib.nullcontext():
        await supervisor.reload(order(versioned.checkpoints[new], *COMPONENTS, canary=canary))
    made = await running
    serving = {name: [content] for name, content in versioned.weights[expected].items()}
    await until(lambda: placed(supervisor) == serving, "only what is served is placed")
    sys.setprofile(None)
    assert struck, f"nobody was killed when {point}"
    assert versioned.name_of(supervisor.status().weights) == expected
    assert versioned.name_of(made.metadata["weights"]) == old
    assert Video(made.path).sha256 == versioned.golden[old][1]
    assert await video(supervisor, tmp_path / "v.mp4") == versioned.golden[expected][0]
    await supervisor.ready()
    assert placed(supervisor) == serving
    assert supervisor.check_integrity() == []


@pytest.mark.timeout(900)
def test_the_supervisor_is_killed(short_dir: Path) -> None:
    """At each point, one engine after the other: the next one serves the checkpoint that it is started with, and
    finishes what was accepted, wholly with it."""
    checkpoint, other = vary(short_dir / "c", 1), vary(short_dir / "other", 2)
    options = ("--checkpoint", checkpoint, "--threads", "1")
    through = (sys.executable, "-m", "tests.engine.striking")
    params = msgspec.Raw(msgspec.msgpack.encode(ask(short_dir / "canary.mp4", steps=1)))
    with EngineProcess(short_dir, *options) as engine:
        engine.wait_ready()
        client = Client(engine.socket)
        weights = client.status().weights
        undisturbed = Video(client.generate(ask(short_dir / "calm.mp4", **LONG)).path).sha256
    output = short_dir / "calm.mp4"
    for number, point in enumerate(POINTS):
        with EngineProcess(short_dir, *options, through=through, STRIKE=point) as engine:
            engine.exit_codes = (-signal.SIGKILL,)
            engine.wait_ready()
            client = Client(engine.socket)
            finished(client, output, undisturbed)
            assert client.status().weights == weights
            output = short_dir / f"{number}.mp4"
            client.submit(ask(output, **LONG))
            with contextlib.suppress(EngineError):  # at the last point, it has been answered
                client.reload(other, canary=Canary(params=params))
            assert engine.process.wait(60) == -signal.SIGKILL, point
    with EngineProcess(short_dir, *options) as engine:
        engine.wait_ready()
        client = Client(engine.socket)
        finished(client, output, undisturbed)
        assert client.status().weights == weights
        assert client.reload(other).weights.keys() == weights.keys()


def finished(client: Client, output: Path, frames: str) -> None:
    """What the engine before has left is done, and is what it would have been."""
    wait_for(lambda: not [t for t in client.tasks() if t.state in ("queued", "running")], "all to be done")
    assert [task.state for task in client.tasks() if task.state != "done"] == []
    assert Video(output).sha256 == frames
