"""`stages.worker` in which some requests meet a fault: $REQUEST_FAULTS says which and when, by their seeds."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from typing import Any

import stages.failures
import stages.worker
from ipc.messages.job import Job
from ipc.messages.names import StageName
from ipc.messages.reports import Parts
from ipc.messages.stage import Run, Start
from stages.stage import Links, Stage

Fault = tuple[str, str, int]

FAULTS: dict[str, list[Fault]] = json.loads(os.environ["REQUEST_FAULTS"])
EXBIBYTE = 1 << 60

load_stage = stages.worker.load_stage


def crash(stage: Any, run: Run, device: str | None) -> None:
    """A read at address 0, as in a library with a defect: SIGSEGV."""
    ctypes.string_at(0)


def allocate(stage: Any, run: Run, device: str | None) -> None:
    """More than any machine has, asked of the allocator that the stage uses."""
    if device is None:
        bytearray(EXBIBYTE)
    else:
        import torch

        torch.empty(EXBIBYTE, dtype=torch.uint8, device=device)


def misjudge(stage: Any, run: Run, device: str | None) -> None:
    """The control of `allocate`: from now on nobody sees that it was memory that was lacking."""
    stages.failures.is_out_of_memory = lambda error: False


def spoil(stage: Any, run: Run, device: str | None) -> None:
    """One of the task's latents becomes NaN, and with the next forward all of them."""
    import torch

    with torch.inference_mode():
        stage._tasks[run.id].latents[0, 0, 0, 0] = torch.nan


def overlook(stage: Any, run: Run, device: str | None) -> None:
    """The control of `spoil`: from now on all values pass for finite."""
    import torch

    torch.isfinite = lambda values: torch.ones_like(values, dtype=torch.bool)  # type: ignore[assignment]


INJECT: dict[str, Callable[[Any, Run, str | None], None]] = {
    "crash": crash, "allocate": allocate, "misjudge": misjudge, "spoil": spoil, "overlook": overlook,
}  # fmt: skip


def faulty(name: StageName, start: Start, links: Links) -> Stage:
    """The stage; before a quantum that is to meet a fault, the fault."""
    stage = load_stage(name, start, links)
    begin, step = stage.begin, stage.step
    faults: dict[str, list[Fault]] = {}

    def begin_faulty(job: Job) -> None:
        faults[job.id] = FAULTS.get(str(job.seed), [])
        begin(job)

    def step_faulty(run: Run) -> dict[str, Any] | Parts | None:
        for fault, phase, index in faults[run.id]:
            if (phase, index) == (run.phase, run.index):
                INJECT[fault](stage, run, start.devices.get(name))
        return step(run)

    stage.begin, stage.step = begin_faulty, step_faulty  # type: ignore[method-assign]
    return stage


stages.worker.load_stage = faulty

if __name__ == "__main__":
    stages.worker.main()
