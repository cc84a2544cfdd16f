"""What the engines of tests start is forked from one process, but for those that ask for fresh interpreters."""

from __future__ import annotations

import socket

import pytest

from engine import Supervisor, SystemParams, process
from engine.child import python_path
from engine.devices import resolve_device
from tests.engine.test_forks import interpreter_of


async def interpreters() -> set[int]:
    """Of all processes of an engine."""
    async with Supervisor(SystemParams(device="cpu", threads=1)) as supervisor:
        await supervisor.ready()
        status = supervisor.status()
        return {interpreter_of(pid or 0) for pid in (status.forks_pid, *(stage.pid for stage in status.stages))}


@pytest.mark.skipif(resolve_device("auto") != "cpu", reason="with a GPU all interpreters are fresh")
async def test_engines_share_an_interpreter() -> None:
    """One engine after the other."""
    assert len(await interpreters() | await interpreters()) == 1


@pytest.mark.usefixtures("fresh_interpreters")
async def test_those_that_want_fresh_ones_have_them() -> None:
    assert len(await interpreters() | await interpreters()) == 2


def test_it_is_what_a_fresh_one_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module, the environment of now, the end of the channel, and the exit code, for its parent."""
    monkeypatch.setenv("WARM", "as it is now")
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = process.spawn("tests.engine.telling", theirs)
        told = ours.makefile().read().splitlines()
    assert told == ["as it is now", python_path(), "__main__"]
    assert child.wait() == 7, "it is a child of this process"
