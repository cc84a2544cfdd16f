"""The process that stage processes are forked from: torch is loaded once, there, and each of them is there in
milliseconds and shares that memory.

It is a worker (`stages/worker.py`) that was told to be this, and computes nothing itself. What is forked becomes a
child of this process at once, so that it is watched, reaped and orphaned like any other. There is one from the first
start on; one that ends is replaced when it is next needed, or when stages have come up. Without it a stage process is a
fresh interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from engine.child import AdoptedChild, Child, how_it_ended
from engine.process import Body, BodyState
from engine.states import Descriptors
from ipc.channel import ChannelClosed
from ipc.errors import Failure, ProtocolError
from ipc.lacking import PASSING, why_not_started
from ipc.messages.reports import Forked, ForkRefused, ForksReady, StartFailed
from ipc.messages.stage import Fork, ServeForks

log = logging.getLogger(__name__)

PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
"""Of <linux/prctl.h>."""
FORK_TIMEOUT = 2.0
"""Seconds for a fork, which takes some ten milliseconds, unless somebody has stopped the process. Nothing else is done
meanwhile."""

_turn = threading.Lock()
"""Who takes orphans is a matter of the whole process, in which there may be engines in other threads."""


class NotForked(Exception):
    """The process to fork from did not do it, or did not say so."""


class Forks:
    """One such process at most; none unless it is wanted.

    Resource handling: owns the process until `end`. Error handling: OSError when the system has no process to spare,
    forked or fresh; whatever else keeps it from forking, the stage process is a fresh interpreter then.
    """

    def __init__(self, wanted: bool, deadline: float, on_settled: Callable[[], None]) -> None:
        """`on_settled` is called when one that was loading is ready, has ended or is renewed, at the latest after
        `deadline` seconds."""
        self._wanted = wanted
        self._deadline = deadline
        self._on_settled = on_settled
        self._loop = asyncio.get_running_loop()
        self._body: Body | None = None
        self._ready = False
        self._unfit = False
        """The last one ended before it was ready by a fault of its own, and the code is still the same."""
        self._lacking = False
        """The last one found no memory, thread or process to become this."""
        self._refusal: Failure | None = None
        """Why the one that is there cannot be this, as it says."""
        self._giving_up: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        return None if self._body is None else self._body.popen.pid

    @property
    def is_loading(self) -> bool:
        """It will be ready soon, and is worth waiting for."""
        return self._body is not None and not self._ready

    def keep(self, settled: bool) -> None:
        """See that there is one, loaded or loading, if it is wanted and the code is fit for it. `settled`: stages are
        up, so that what the last one lacked may be there again; else nobody waits for another try."""
        self._lacking = self._lacking and not settled
        if self._body is None and self._wanted and not self._unfit and not self._lacking:
            self._start()

    def body(self) -> Body:
        """A process that is no stage yet: forked, or a fresh interpreter. OSError as `Body`."""
        if self._body is not None and self._ready:
            try:
                return Body(self._fork)
            except NotForked as error:
                # What it may have forked all the same has the end of a channel that is closed, and leaves.
                log.warning("process %s could not fork (%s): a fresh interpreter is started instead", self.pid, error)
                self.end()
        return Body()

    def renew(self) -> None:
        """The code on the disk is to be loaded by whoever is started from now on."""
        was_loading = self.is_loading
        self.end()
        self._unfit = self._lacking = False
        if was_loading:
            self._on_settled()  # who waits for it waits for another one

    def end(self) -> None:
        """Kill and reap it. Waits for milliseconds."""
        if self._body is None:
            return
        self._stop_listening(self._body)
        self._body.end()
        self._body, self._ready, self._refusal = None, False, None

    def kill(self) -> None:
        """SIGKILL; `end` has then only to reap. Nobody is told."""
        if self._body is not None:
            self._stop_listening(self._body)
            self._body.popen.kill()

    def state(self, fds: Descriptors) -> BodyState | None:
        return None if self._body is None else self._body.state(fds)

    def put_back(self, state: BodyState | None, fds: Descriptors) -> None:
        """End the one of the program before this one: it has that program's code."""
        if state is not None:
            Body.restored(state, fds).end()

    def _start(self) -> None:
        try:
            self._body = Body()
        except OSError as error:
            log.warning("no process to fork from: %s", why_not_started(error))
            return
        with contextlib.suppress(ChannelClosed):  # dead already: the pidfd tells
            self._body.channel.try_send(ServeForks(supervisor_pid=os.getpid()))
        self._giving_up = self._loop.call_later(self._deadline, self._body.popen.kill)
        self._loop.add_reader(self._body.channel.fileno(), self._readable)
        self._loop.add_reader(self._body.pidfd, self._died)

    def _readable(self) -> None:
        """It says that it is ready, or why it will not be. That it hangs up means that it is of no use."""
        assert self._body is not None
        try:
            received = self._body.channel.try_receive()
        except (OSError, ProtocolError):
            self._body.popen.kill()
            self._loop.remove_reader(self._body.channel.fileno())
            return
        if received is not None and isinstance(received.message, ForksReady):
            self._stop_listening(self._body)
            self._loop.add_reader(self._body.pidfd, self._died)
            self._ready = True
            self._loop.call_soon(self._on_settled)
        elif received is not None and isinstance(received.message, StartFailed):
            self._refusal = received.message.error

    def _died(self) -> None:
        assert self._body is not None
        if not self._ready:
            self._readable()  # its last words
        body, was_ready, refusal = self._body, self._ready, self._refusal
        how = how_it_ended(body.popen.wait()) if refusal is None else refusal.message
        self.end()
        if was_ready:
            log.warning("process %d, which stages are forked from, ended: %s", body.popen.pid, how)
        else:
            log.warning("process %d ended (%s) before stages could be forked from it: they are fresh interpreters, "
                        "which take longer to start", body.popen.pid, how)  # fmt: skip
            self._lacking = refusal is not None and refusal.code in PASSING
            self._unfit = not self._lacking
        self._on_settled()

    def _stop_listening(self, body: Body) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        self._loop.remove_reader(body.channel.fileno())
        self._loop.remove_reader(body.pidfd)

    def _fork(self, channel_end: socket.socket) -> Child:
        """A process that holds this end of its channel. `NotForked` says why there is none that we know of; OSError,
        why the system has started none."""
        assert self._body is not None
        channel = self._body.channel
        try:
            with taking_orphans():
                channel.send(Fork(), [channel_end.fileno()], timeout=FORK_TIMEOUT)
                answer = channel.receive(FORK_TIMEOUT).message
        except (OSError, ProtocolError) as error:
            raise NotForked(str(error)) from error
        if isinstance(answer, ForkRefused):
            raise OSError(answer.number, answer.reason)
        if not isinstance(answer, Forked):
            raise NotForked(f"got {type(answer).__name__}, expected Forked")
        return AdoptedChild(answer.pid)


@contextlib.contextmanager
def taking_orphans() -> Iterator[None]:
    """Processes among the descendants of this one whose parent ends now become children of this one, not of init: so it
    is always if a host wants that for its own ones."""
    before = ctypes.c_int()
    with _turn:
        _prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            yield
        finally:
            _prctl(PR_SET_CHILD_SUBREAPER, before.value)


def _prctl(option: int, argument: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")
