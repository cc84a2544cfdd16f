"""`stages.worker` whose dit, when it is to load, finds no memory as often as the file $LACKING has lines: one goes each
time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import stages.worker

load_stages = stages.worker.load_stages


def lacking(start: Any, links: Any) -> Any:
    file = Path(os.environ["LACKING"])
    if start.stages == ["dit"] and file.exists() and (lines := file.read_text().splitlines()):
        file.write_text("\n".join(lines[1:]))
        raise RuntimeError("cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY")
    return load_stages(start, links)


stages.worker.load_stages = lacking

if __name__ == "__main__":
    stages.worker.main()
