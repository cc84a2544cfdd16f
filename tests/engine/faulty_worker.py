"""`stages.worker` whose dit meets a CUDA error at its third step, once: the file $FAULT is there until then."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import stages.dit
import stages.worker

advance = stages.dit.DitStage._advance


def fail(device: str) -> None:
    """An illegal access on a GPU; on a CPU, the error that torch would raise for one."""
    if device == "cpu":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    import torch

    torch.zeros(8, device=device)[torch.full((8,), 1 << 40, device=device)].cpu()


def faulty(self: Any, task: Any) -> None:
    path = Path(os.environ["FAULT"])
    if task.done == 2 and path.exists():
        path.unlink()
        fail(self._device)
    advance(self, task)


stages.dit.DitStage._advance = faulty  # type: ignore[method-assign]

if __name__ == "__main__":
    stages.worker.main()
