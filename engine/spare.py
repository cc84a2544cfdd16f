"""A warm spare process: loaded with all that any stage needs, it becomes the next stage that dies."""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine.process import Body, BodyState
from engine.states import Descriptors
from ipc.lacking import why_not_started

log = logging.getLogger(__name__)


class Spare:
    """One at most; none unless it is wanted, as it takes memory.

    Resource handling: owns the process until it is taken or `end`.
    """

    def __init__(self, wanted: bool, device: str, spawned: Callable[[], Body]) -> None:
        """`device`: where it makes its context, if that is a GPU. `spawned`: makes the process."""
        self._spawned = spawned
        self._wanted = wanted
        self._device = device
        self._body: Body | None = None

    @property
    def pid(self) -> int | None:
        return None if self._body is None else self._body.popen.pid

    def keep(self) -> None:
        """See that there is one, if it is wanted. Without a process or a descriptor to spare there is none."""
        if self._body is not None or not self._wanted:
            return
        try:
            self._body = self._spawned()
        except OSError as error:
            log.warning("no spare process: %s", why_not_started(error))
            return
        self._body.prepare(self._device)

    def take(self) -> Body | None:
        """The spare, loaded or still loading: it is further than a new process would be. None if there is none, or it
        has ended."""
        body, self._body = self._body, None
        if body is None or body.lives():
            return body
        log.warning("the spare process ended with status %s", body.popen.returncode)
        body.end()
        return None

    def state(self, fds: Descriptors) -> BodyState | None:
        return None if self._body is None else self._body.state(fds)

    def put_back(self, state: BodyState | None, fds: Descriptors) -> None:
        """Have the spare of the program before this one."""
        self._body = None if state is None else Body.restored(state, fds)

    def kill(self) -> None:
        """SIGKILL; `end` has then only to reap."""
        if self._body is not None:
            self._body.popen.kill()

    def end(self) -> None:
        """Kill and reap it. Waits for milliseconds."""
        if self._body is not None:
            self._body.end()
            self._body = None
