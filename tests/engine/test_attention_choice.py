"""What the dits and the vae compute with is found out once per engine, and is the same for all processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine import Supervisor, SystemParams, UserParams
from engine.crew import Crew
from engine.start_messages import StartMessages
from ipc.errors import BadConfig
from ipc.messages.names import Seat
from tests.conftest import Video

Wait = Callable[..., Awaitable[None]]


def ask(path: Path) -> UserParams:
    return UserParams(prompt="a red circle moves left", seed=3, steps=4, output=str(path))


async def test_a_dit_that_is_started_again_is_told(tmp_path: Path, wait_until: Wait) -> None:
    """The first dit is told to find out; once it has said what it took, every later one is told to take the same. The
    metadata names it."""
    async with Supervisor(SystemParams(device="cpu", threads=1)) as supervisor:
        crew = supervisor._crew
        assert crew._starts.message(("dit",), 1).attention == "auto"
        done = await supervisor.generate(ask(tmp_path / "first.mp4"))
        versions = done.metadata["versions"]
        assert versions["attention"].startswith("sdpa (torch ") and versions["kernels"] == "torch"
        assert versions["vae"] == "plain torch, float32"
        told = crew._starts.message(("dit",), 1)
        assert (told.attention, told.kernels) == ("sdpa", "torch")
        stage = next(stage for stage in supervisor.status().stages if stage.name == "dit")
        assert stage.pid is not None
        os.kill(stage.pid, signal.SIGKILL)
        again = await supervisor.generate(ask(tmp_path / "again.mp4"))
        assert again.metadata["versions"] == versions
    assert Video(tmp_path / "again.mp4").sha256 == Video(tmp_path / "first.mp4").sha256


async def test_a_vae_that_is_started_again_is_told(tmp_path: Path, wait_until: Wait) -> None:
    """As the dit: the first is told to find out, the next to take what the first took; the video is the same bytes."""
    async with Supervisor(SystemParams(device="cpu", threads=1)) as supervisor:
        crew = supervisor._crew
        assert crew._starts.message(("vae",), 1).vae_kernels == "auto"
        await supervisor.generate(ask(tmp_path / "first.mp4"))
        assert crew._starts.message(("vae",), 1).vae_kernels == "torch"
        stage = next(stage for stage in supervisor.status().stages if stage.name == "vae")
        assert stage.pid is not None
        os.kill(stage.pid, signal.SIGKILL)
        again = await supervisor.generate(ask(tmp_path / "again.mp4"))
        assert again.metadata["versions"]["vae"] == "plain torch, float32"
    assert Video(tmp_path / "again.mp4").sha256 == Video(tmp_path / "first.mp4").sha256


async def test_two_dits_do_not_find_out_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two dits, the second is started when the first has said what it computes with, and is told so; also where it
    would not have to wait for weights."""
    told: list[tuple[Seat, str]] = []
    spawn = Crew._spawn

    def recorded(self: Crew, seats: tuple[Seat, ...]) -> None:
        told.append((seats[0], self._starts.message(seats, 1).attention))
        spawn(self, seats)

    monkeypatch.setattr(Crew, "_spawn", recorded)
    monkeypatch.setattr(StartMessages, "_is_being_placed", lambda self, seats: False)
    async with Supervisor(SystemParams(dit_devices=("cpu", "cpu"), threads=1)) as supervisor:
        assert ("dit:1", "auto") not in told
        await supervisor.ready()
    assert [entry for entry in told if entry[0].startswith("dit")] == [("dit", "auto"), ("dit:1", "sdpa")]


async def test_the_operator_decides(tmp_path: Path) -> None:
    """A backend by name is the one that computes; one that does not work here keeps the engine from starting, and says
    why and what to do."""
    async with Supervisor(SystemParams(device="cpu", attention_backend="math")) as supervisor:
        done = await supervisor.generate(ask(tmp_path / "v.mp4"))
    assert done.metadata["versions"]["attention"].startswith("math ")
    async with Supervisor(SystemParams(device="cpu", attention_backend="cudnn")) as supervisor:
        with pytest.raises(BadConfig, match=r"attention_backend is cudnn, .* needs a GPU; use auto"):
            await supervisor.ready()
