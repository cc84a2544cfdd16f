"""Fixtures: a second process, and a check that no test leaks descriptors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc.channel import Channel
from ipc.memory import PAGE_BYTES
from ipc.slot_table import Side
from ipc.state import StateSlots
from ipc.tensor_queue import TensorQueue
from tests.ipc.peer import WAIT, AttachQueue, AttachState, Command, Say

ROOT = Path(__file__).parents[2]


class PeerProcess:
    """A process that runs `peer.py`."""

    def __init__(self) -> None:
        ours, theirs = Channel.pair()
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("peer.py")), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self.channel = Channel[Say](ours, Say)

    def tell(self, command: Command, fds: list[int] | None = None) -> None:
        self.channel.send(command, fds or [], timeout=WAIT)

    def hear(self) -> str:
        return self.channel.receive(WAIT).message.text

    def ask(self, command: Command, fds: list[int] | None = None) -> str:
        self.tell(command, fds)
        return self.hear()

    def attach(self, queue: TensorQueue, role: Side, epoch: int, number: int = 0) -> None:
        command = AttachQueue(spec=queue.spec, role=role, epoch=epoch, number=number)
        assert self.ask(command, queue.fds) == "attached"

    def attach_states(self, states: StateSlots, epoch: int) -> None:
        assert self.ask(AttachState(spec=states.spec, epoch=epoch), states.fds) == "attached"

    def kill(self) -> None:
        """SIGKILL and reap."""
        self.popen.kill()
        assert self.popen.wait(WAIT) == -signal.SIGKILL

    def close(self) -> None:
        self.channel.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(WAIT)


@pytest.fixture
def peers() -> Iterator[Callable[[], PeerProcess]]:
    """Starts processes; all of them are gone when the test ends."""
    started: list[PeerProcess] = []

    def start() -> PeerProcess:
        started.append(PeerProcess())
        return started[-1]

    yield start
    for peer in started:
        peer.close()


def open_descriptors() -> dict[str, str]:
    """Number -> what it refers to."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before
