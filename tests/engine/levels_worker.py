"""`stages.worker` that is short of memory in ways that files in $LEVELS say, each with a level, while they are there.

short: below this level the dit's steps do not fit. refuse: the change to this level does not fit. die: the process dies
of the change to this level, once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import stages.dit
from ipc.messages.memory import MemoryPlan
from ipc.messages.reports import MemorySet
from stages.failures import describe
from stages.loop import Worker
from stages.worker import main

level = 0
"""That this process keeps."""

load = stages.dit.DitStage.load
advance = stages.dit.DitStage._advance
carry_out = Worker._set_memory


def said(name: str) -> int | None:
    """The level in a file; None: it is not there."""
    try:
        return int(Path(os.environ["LEVELS"], name).read_text())
    except FileNotFoundError:
        return None


def first_to_remove(name: str) -> bool:
    """Of several processes, one gets True."""
    try:
        Path(os.environ["LEVELS"], name).unlink()
    except FileNotFoundError:
        return False
    return True


def note_level(start: Any, links: Any) -> Any:
    global level
    level = start.memory.level
    return load(start, links)


def short(self: Any, task: Any) -> None:
    if level < (said("short") or 0):
        raise MemoryError("the step does not fit")
    advance(self, task)


def set_memory(self: Any, plan: MemoryPlan) -> MemorySet:
    global level
    if said("die") == plan.level and first_to_remove("die"):
        os._exit(1)
    if said("refuse") == plan.level:
        return MemorySet(plan=self._plan, error=describe(MemoryError("the slots do not fit"), "dit"))
    done = carry_out(self, plan)
    level = done.plan.level
    return done


stages.dit.DitStage.load = note_level  # type: ignore[method-assign]
stages.dit.DitStage._advance = short  # type: ignore[method-assign]
Worker._set_memory = set_memory  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
