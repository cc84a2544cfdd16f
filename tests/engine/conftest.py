"""Fixtures of the server's and the clients' tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.wire import EngineProcess


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
