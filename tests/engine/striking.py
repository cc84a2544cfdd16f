"""SIGKILL at a chosen phase of a reload of weights: the points, a strike at one, and an engine that strikes itself:
`STRIKE=POINT python -m tests.engine.striking python -m engine serve ...`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from engine.loader import _Process
from engine.reload import Reloader
from engine.supervisor import Supervisor
from engine.upkeep import Upkeep
from engine.weights import Versions, WeightStore

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


def strike_at(point: Point, victim: Callable[[], int | None]) -> list[int]:
    """SIGKILL the process that `victim` finds the first time that this thread comes to a point of a reload that begins
    after this. Fills the list; `sys.setprofile(None)` ends it."""
    struck: list[int] = []
    reloading = False

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal reloading
        reloading = reloading or frame.f_code is Reloader.carry_out.__code__
        if reloading and event == point[0] and frame.f_code is point[1] and (pid := victim()) is not None:
            sys.setprofile(None)
            struck.append(pid)
            os.kill(pid, signal.SIGKILL)

    sys.setprofile(profile)
    return struck


def main() -> None:
    from engine.cli import main as run

    strike_at(POINTS[os.environ["STRIKE"]], os.getpid)
    sys.argv = sys.argv[sys.argv.index("engine") :]
    run()


if __name__ == "__main__":
    main()
