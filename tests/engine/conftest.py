"""Fixtures of the server's, the clients' and the memory levels' tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine import loader, process
from engine.devices import resolve_device
from engine.process import spawn
from tests.engine.gpu_crew import GpuCrew
from tests.engine.warm import WarmInterpreters
from tests.engine.wire import EngineProcess


@pytest.fixture(scope="session", autouse=True)
def warm_interpreters() -> Iterator[None]:
    """What the engines of this process start has torch loaded (`tests/engine/warm.py`). Not where there is a GPU: a
    process whose work is there is always a fresh interpreter."""
    if resolve_device("auto") != "cpu":
        yield
        return
    with WarmInterpreters() as warm, pytest.MonkeyPatch.context() as patched:
        patched.setattr(process, "spawn", warm.spawn)
        patched.setattr(loader, "spawn", warm.spawn)
        yield


@pytest.fixture
def fresh_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of this test start fresh interpreters, as they do for users."""
    monkeypatch.setattr(process, "spawn", spawn)
    monkeypatch.setattr(loader, "spawn", spawn)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory of mode 0700 with a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def engine_process() -> Iterator[EngineProcess]:
    """One `engine serve` for the tests of a module. Requests are accepted at once; `wait_ready` for the stages."""
    with (
        tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as directory,
        EngineProcess(Path(directory)) as process,
    ):
        yield process


@pytest_asyncio.fixture
async def crew() -> AsyncIterator[GpuCrew]:
    """With the weights of the model that ships placed on what it says is a GPU; every descriptor is closed at the
    end."""
    before = len(os.listdir("/proc/self/fd"))
    crew = GpuCrew()
    await crew.load()
    yield crew
    crew.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "every descriptor is closed"
