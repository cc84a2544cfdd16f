"""`stages.worker` whose vae delivers no chunk but the last before the next one is decoded; $LACKING in the environment:
the first delivery lacks memory, once."""

from __future__ import annotations

import os
import threading
from typing import Any

import stages.vae
from ipc.messages.stage import Run
from ipc.messages.status import Copied
from stages.leaving import Leaving
from stages.vae import VaeStage
from stages.worker import main

LAST = 2
"""Of the clip's chunks."""
PATIENCE = 30.0
"""Seconds."""

step = VaeStage.step
decoded: dict[int, threading.Event] = {index: threading.Event() for index in range(LAST + 1)}
lacking = ["LACKING" in os.environ]


def noticed(stage: VaeStage, run: Run) -> Any:
    done = step(stage, run)
    decoded[run.index].set()
    return done


class Late(Leaving):
    def __call__(self) -> Copied | None:
        if lacking.pop() if lacking else False:
            raise MemoryError("no memory for a copy")
        if self._sequence < LAST and not decoded[self._sequence + 1].wait(PATIENCE):
            raise TimeoutError("the next chunk is not decoded while this one is delivered")
        return super().__call__()


if __name__ == "__main__":
    VaeStage.step = noticed  # type: ignore[assignment]
    stages.vae.Leaving = Late  # type: ignore[misc]
    main()
