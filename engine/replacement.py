"""Replacing the program of a running `engine serve` by the one that is on disk now, as `systemctl daemon-reexec` does.

The process stays: its pid, its children, its memory of file descriptors. After a rehearsal (`engine/rehearsal.py`) its
program is exchanged with `exec` at a moment between two turns of the loop. What clients and stages say meanwhile waits
in their sockets; who connects waits in the listening socket's backlog.

Error handling: up to the `exec` everything that goes wrong is an `EngineError`, and the running program goes on. After
it, what goes wrong ends the process, as a crash would: the stages leave, the requests are in the journal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from engine.handover import Handover, encode, in_memory
from engine.rehearsal import GOES_ON, PROGRAM, environment, rehearse
from engine.server import Server
from engine.states import Descriptors
from engine.supervisor import Supervisor
from engine.systemd import Notify
from ipc.errors import Busy, ReloadFailed, ServerUnavailable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What is handed over."""

    supervisor: Supervisor
    server: Server
    notify: Notify
    announced: bool

    def state(self, fds: Descriptors, held_at: float) -> Handover: ...


class Replacement:
    """One engine's way to the next program; one at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._under_way = False

    async def __call__(self) -> None:
        """Returns never, if all goes well: the next program goes on. Raises `ReloadFailed`, `Busy` or
        `ServerUnavailable`, and everything is as before."""
        self._check_may()
        if self._under_way:
            raise Busy("the program is being replaced already; try again", 1.0)
        self._under_way = True
        try:
            fds = Descriptors()
            document = self._engine.state(fds, time.monotonic())
            await rehearse(encode(document), fds.fds)
            await self._hand_over()
        finally:
            self._under_way = False

    def _check_may(self) -> None:
        engine = self._engine
        if not engine.supervisor.is_serving or engine.server.stop_asked.is_set() or engine.server.drain_asked.is_set():
            raise ServerUnavailable("the engine is stopping; start the new program instead")
        if engine.supervisor.is_reloading:
            raise Busy("weights or stages are being replaced; try again when that is done", 5.0)
        if not engine.announced:
            raise Busy("the engine is still loading; try again when `engine status` shows all stages up", 5.0)

    async def _hand_over(self) -> None:
        engine = self._engine
        engine.notify.reloading()
        try:
            held_at = time.monotonic()
            await engine.server.hold()
            await engine.supervisor.pause()
            try:
                with noticing_signals() as noticed:
                    # What the loop was told of signals before, it carries out now.
                    await asyncio.sleep(0.001)
                    self._check_may()
                    self._exec(held_at, noticed)
            finally:
                await engine.supervisor.unpause()
        finally:
            engine.server.release()
            engine.notify.ready()

    def _exec(self, held_at: float, noticed: Callable[[], bool]) -> None:
        """Without a turn of the loop: take the state, and become the next program. Comes back with `ReloadFailed`."""
        fds = Descriptors()
        document = in_memory(encode(self._engine.state(fds, held_at)))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        try:
            for fd in (document, *fds.fds):
                os.set_inheritable(fd, True)
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            if noticed():
                raise ServerUnavailable("the engine was told to stop")
            os.execve(PROGRAM[0], [*PROGRAM, str(document)], environment())
        except OSError as error:
            raise ReloadFailed(f"the new program could not be started: {error.strerror}; {GOES_ON}") from error
        finally:
            for fd in fds.fds:
                os.set_inheritable(fd, False)
            os.close(document)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def noticing_signals() -> Iterator[Callable[[], bool]]:
    """Whether a signal to stop has come since. The loop, which hears of them later, would be gone by then."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
