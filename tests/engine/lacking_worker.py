"""`stages.worker` that lacks something as it starts, as often as the file $LACKING has lines such as `dit thread`: the
stage, or `forks` for what others are forked from, and what it lacks. One goes each time, the first of that stage. A
line `forking 0` has the system refuse a fork, `forking 1` the second of the two that make a process."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import stages.forks
import stages.worker

NOBODY = 61234
"""A user who has no other processes, for a limit that does not hold for root."""

LACKS: dict[str, Exception] = {
    "device": RuntimeError("cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY"),
    "memory": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "thread": RuntimeError("can't start new thread"),
    "fork": OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
}

load_stages, load_libraries = stages.worker.load_stages, stages.worker.load_libraries
fork = stages.forks.fork


def next_of(stage: str) -> str | None:
    """What it lacks now."""
    file = Path(os.environ["LACKING"])
    lines = file.read_text().splitlines()
    mine = [line for line in lines if line.startswith(f"{stage} ")]
    if not mine:
        return None
    lines.remove(mine[0])
    file.write_text("\n".join(lines))
    return mine[0].split()[1]


def lack(stage: str) -> None:
    if (what := next_of(stage)) is not None:
        raise LACKS[what]


def limited_fork() -> int:
    if (more := next_of("forking")) is None:
        return fork()
    limits, root = resource.getrlimit(resource.RLIMIT_NPROC), os.getuid() == 0
    resource.setrlimit(resource.RLIMIT_NPROC, (len(os.listdir("/proc/self/task")) + int(more), limits[1]))
    if root:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        return fork()
    finally:
        if root:
            os.setresuid(0, 0, 0)
        resource.setrlimit(resource.RLIMIT_NPROC, limits)


def lacking(start: Any, links: Any) -> Any:
    if len(start.stages) == 1:
        lack(start.stages[0])
    return load_stages(start, links)


def lacking_libraries() -> None:
    lack("forks")
    load_libraries()


stages.worker.load_stages, stages.worker.load_libraries = lacking, lacking_libraries
stages.forks.fork = limited_fork

if __name__ == "__main__":
    stages.worker.main()
