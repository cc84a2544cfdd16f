"""SIGKILL at a chosen point of a reload of weights, or of the end of a request: the points, a strike at one, and an
engine that strikes itself: `STRIKE=POINT python -m tests.engine.striking python -m engine serve ...`. With WORKER, not
STRIKE: an engine whose stage processes are that module."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeAlias

from engine import process
from engine.journal import Journal
from engine.loader import _Process
from engine.reload import Reloader
from engine.requests import Requests
from engine.supervisor import Supervisor
from engine.tasks import Task
from engine.upkeep import Upkeep
from engine.weights import Versions, WeightStore

ProfileFunction: TypeAlias = Callable[[FrameType, str, Any], None]
Point = tuple[str, CodeType]
"""When the supervisor enters ("call") or leaves ("return") a function."""
POINTS: dict[str, Point] = {
    "the loader is there": ("call", _Process.carry_out.__code__),
    "it reads": ("call", Reloader._note_loading.__code__),
    "a version is placed": ("call", WeightStore.keep.__code__),
    "the last one is kept": ("return", WeightStore.keep.__code__),
    "a stage is told": ("return", Upkeep._tell_adopt.__code__),
    "a stage answers": ("call", Upkeep.handle_adopted.__code__),
    "the canary runs": ("call", Supervisor.try_weights.__code__),
    "it is about to be served": ("call", Versions.flip.__code__),
    "it is served": ("return", Versions.flip.__code__),
    "the old memory is let go": ("call", Upkeep.forget.__code__),
}
"""In the order of a reload."""
ENDS: dict[str, Point] = {
    "it has ended": ("call", Requests.end.__code__),
    "that is being written": ("call", Journal._write.__code__),
    "that is written": ("return", Journal._write.__code__),
    "its client is being told": ("call", Task.tell.__code__),
    "its client is told": ("return", Task.tell.__code__),
}
"""In the order of the end of a request."""


def strike_at(point: Point, victim: Callable[[], int | None]) -> list[int]:
    """SIGKILL the process that `victim` finds the first time that this thread comes to a point of a reload that begins
    after this. Fills the list; `sys.setprofile(None)` ends it."""
    struck: list[int] = []
    sys.setprofile(striking(point, victim, Reloader.carry_out.__code__, struck))
    return struck


def striking(point: Point, victim: Callable[[], int | None], after: CodeType, struck: list[int]) -> ProfileFunction:
    """What does so once `after` was entered, as the profile function of a thread, or of several."""
    begun = False

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal begun
        begun = begun or frame.f_code is after
        if begun and event == point[0] and frame.f_code is point[1] and (pid := victim()) is not None:
            sys.setprofile(None)
            struck.append(pid)
            os.kill(pid, signal.SIGKILL)

    return profile


def main() -> None:
    from engine.cli import main as run

    name = os.environ.get("STRIKE", "")
    if name in POINTS:
        strike_at(POINTS[name], os.getpid)
    elif name in ENDS:  # some are on the journal's thread
        profile = striking(ENDS[name], os.getpid, Requests.end.__code__, [])
        threading.setprofile(profile)
        sys.setprofile(profile)
    else:
        process.WORKER = os.environ["WORKER"]
    sys.argv = sys.argv[sys.argv.index("engine") :]
    run()


if __name__ == "__main__":
    main()
