"""`stages.worker` that is short of memory in ways that files in $LEVELS say, each with a level, while they are there.

short: below this level the dit's steps do not fit. refuse: the change to this level does not fit. die: the process dies
of the change to this level, once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import stages.dit
import stages.worker
from ipc.messages import MemoryPlan, MemorySet, SetMemory
from stages.worker import Entry, Worker

held = MemoryPlan()
"""What this process keeps to."""

advance = stages.dit.DitStage._advance
take_in = Worker._take_in
carry_out = Worker._carry_out


def said(name: str) -> int | None:
    """The level in a file; None: it is not there."""
    path = Path(os.environ["LEVELS"], name)
    return int(path.read_text()) if path.exists() else None


def short(self: Any, task: Any) -> None:
    if held.level < (said("short") or 0):
        raise MemoryError("the step does not fit")
    advance(self, task)


def set_memory(plan: MemoryPlan) -> MemorySet:
    global held
    if said("die") == plan.level:
        Path(os.environ["LEVELS"], "die").unlink()
        os._exit(1)
    if said("refuse") == plan.level:
        failure = stages.worker.describe(MemoryError("the slots do not fit"), "dit")
        return MemorySet(plan=held, error=failure)
    held = plan
    return MemorySet(plan=plan)


def take_in_level(self: Any, received: Any) -> None:
    if isinstance(received.message, SetMemory):
        self._entries.append(Entry(received.message))
    else:
        take_in(self, received)


def carry_out_level(self: Any, entry: Any) -> Any:
    return set_memory(entry.message.plan) if isinstance(entry.message, SetMemory) else carry_out(self, entry)


stages.dit.DitStage._advance = short  # type: ignore[method-assign]
Worker._take_in = take_in_level  # type: ignore[method-assign]
Worker._carry_out = carry_out_level  # type: ignore[method-assign]

if __name__ == "__main__":
    stages.worker.main()
