"""Somebody kills a process at each phase of a reload: what is served afterwards is wholly old or wholly new, the
request in hand is finished by the version it began with, and nothing else stays in memory."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from engine import Client, Supervisor
from engine.crew import Crew
from engine.loader import _Process
from engine.process import StageProcess
from engine.reload import Reloader
from engine.upkeep import Upkeep
from engine.weights import Versions, WeightStore
from ipc.errors import EngineError
from ipc.messages import Canary
from tests.conftest import Video, until
from tests.engine.reloading import ask, denoising, engine, order, placed, vary, video
from tests.engine.wire import EngineProcess, session_processes, wait_for
from tools.chaos import pid_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPONENTS = ("transformer", "text_encoder", "vae")
LONG = {"steps": 80}
"""The request in hand: it lives longer than a reload."""

Point = tuple[str, CodeType]
"""When the supervisor enters ("call") or leaves ("return") a function."""
POINTS: dict[str, Point] = {
    "the loader is there": ("call", _Process.carry_out.__code__),
    "it reads": ("call", Reloader._note_loading.__code__),
    "a version is placed": ("call", WeightStore.keep.__code__),
    "the last one is kept": ("return", WeightStore.keep.__code__),
    "a stage is told": ("return", StageProcess.send.__code__),
    "a stage answers": ("call", Crew._on_report.__code__),
    "the canary runs": ("call", Supervisor.try_weights.__code__),
    "it is about to be served": ("call", Versions.flip.__code__),
    "it is served": ("return", Versions.flip.__code__),
    "the old memory is let go": ("call", Upkeep.forget.__code__),
}
VICTIMS = {
    "dit": list(POINTS), "text": list(POINTS)[3:6], "vae": list(POINTS)[5:8], "loader": list(POINTS)[:2],
    "reader": ["it reads"],
}  # fmt: skip
CASES = [(victim, point) for victim, points in VICTIMS.items() for point in points]


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


def strike_at(point: Point, victim: Callable[[], int | None]) -> list[int]:
    """SIGKILL the process that `victim` finds the first time that this thread comes to a point. Fills the list."""
    struck: list[int] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == point[0] and frame.f_code is point[1] and (pid := victim()) is not None:
            sys.setprofile(None)
            struck.append(pid)
            os.kill(pid, signal.SIGKILL)

    sys.setprofile(profile)
    return struck


def find(supervisor: Supervisor, victim: str) -> int | None:
    if victim not in ("loader", "reader"):
        return pid_of(supervisor, victim)
    loader = supervisor._reloader._loader.pid
    if victim == "loader" or loader is None:
        return loader
    found = Path(f"/proc/{loader}/task/{loader}/children").read_text().split()
    return int(found[0]) if found else None


@pytest.mark.parametrize(("victim", "point"), CASES)
async def test_killed_during_a_reload(versioned: Versioned, tmp_path: Path, victim: str, point: str) -> None:
    """A kill of a stage is not seen at all; without who reads, nothing has changed."""
    supervisor = versioned.supervisor
    old = versioned.name_of(supervisor.status().weights)
    new = "a" if old == "b" else "b"
    if point == "the loader is there":
        await supervisor._reloader.end()
    running = asyncio.create_task(supervisor.generate(ask(tmp_path / "running.mp4", **LONG)))
    await until(lambda: denoising(supervisor, 2), "the second step")
    params = msgspec.Raw(msgspec.msgpack.encode(ask(tmp_path / "canary.mp4", steps=1)))
    struck = strike_at(POINTS[point], lambda: find(supervisor, victim))
    try:
        await supervisor.reload(order(versioned.checkpoints[new], *COMPONENTS, canary=Canary(params=params)))
        expected = new
    except EngineError as error:
        assert victim in ("loader", "reader"), error
        expected = old
    made = await running
    serving = {name: [content] for name, content in versioned.weights[expected].items()}
    await until(lambda: placed(supervisor) == serving, "only what is served is placed")
    sys.setprofile(None)
    assert struck, f"nobody was killed when {point}"
    assert (victim in ("loader", "reader")) == (expected == old)
    assert versioned.name_of(supervisor.status().weights) == expected
    assert versioned.name_of(made.metadata["weights"]) == old
    assert Video(made.path).sha256 == versioned.golden[old][1]
    assert await video(supervisor, tmp_path / "v.mp4") == versioned.golden[expected][0]
    await supervisor.ready()
    assert placed(supervisor) == serving
    assert supervisor.check_integrity() == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("steps_into", ["the loader starts", "it is served"])
async def test_the_supervisor_is_killed(short_dir: Path, steps_into: str) -> None:
    """The next engine serves the checkpoint that it is started with, and finishes what was accepted, wholly with it."""
    checkpoint, other = vary(short_dir / "c", 1), vary(short_dir / "other", 2)
    options = ("--checkpoint", checkpoint, "--threads", "1")
    with EngineProcess(short_dir, *options) as first:
        first.wait_ready()
        client = Client(first.socket)
        weights = client.status().weights
        undisturbed = Video(client.generate(ask(short_dir / "calm.mp4", **LONG)).path).sha256
        accepted = client.submit(ask(short_dir / "v.mp4", **LONG))
        if steps_into == "it is served":
            client.reload(other)
            assert client.status().weights != weights
        else:
            asking = threading.Thread(target=_reload_in_vain, args=(client, other))
            asking.start()
            session = first.process.pid
            wait_for(lambda: any("stages.loader" in c for c in session_processes(session)), "the loader to start")
        first.kill()
        if steps_into != "it is served":
            asking.join()
    with EngineProcess(short_dir, *options) as second:
        second.wait_ready()
        client = Client(second.socket)
        assert client.status().weights == weights
        task = next((t for t in client.tasks() if t.id == accepted.id), None)
        if task is not None:  # it may have been done before the kill
            assert client.result(accepted.id).metadata["weights"] == weights
        assert Video(short_dir / "v.mp4").sha256 == undisturbed
    shutil.rmtree(other)


def _reload_in_vain(client: Client, directory: Path) -> None:
    with pytest.raises(EngineError):
        client.reload(directory)
