"""Looks at the progress of the stage processes, and kills what has been silent for too long; its end then arrives like
any other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from engine.process import StageProcess

log = logging.getLogger(__name__)

WATCH_INTERVAL = 1.0
"""Seconds between looks at the progress counters."""

LEAVE_GRACE = 30.0
"""Seconds a process without a quantum in hand gets to make place: unmapping page-locked memory takes some."""


class Watch:
    """From `begin` to `end`, which may be repeated."""

    def __init__(
        self, processes: Callable[[], Iterable[StageProcess]], start_deadline: float, stage_deadline: float
    ) -> None:
        """Seconds without progress: of a process that is not up yet, and in a quantum."""
        self._processes = processes
        self._start_deadline, self._stage_deadline = start_deadline, stage_deadline
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self.end()
        self._timer = self._loop.call_later(WATCH_INTERVAL, self._look)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """A quantum that hangs, a process that does not come up or does not leave."""
        now = self._loop.time()
        for process in self._processes():
            deadline, silent = self._deadline(process), process.silent_for(now)
            if deadline is not None and silent > deadline:
                names = ", ".join(process.seats)
                log.error("process %d of %s has made no progress for %.0f s: killed", process.pid, names, silent)
                process.kill()
        self.begin()

    def _deadline(self, process: StageProcess) -> float | None:
        """None: it has nothing to do, and may be silent for as long as it likes."""
        if not process.ready:
            return self._start_deadline
        if process.outstanding:
            return self._stage_deadline
        return LEAVE_GRACE if process.leaving else None
