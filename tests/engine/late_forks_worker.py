"""`stages.worker` from which processes are forked, but it says so too late for `tests/engine/test_forks_broken.py`."""

from __future__ import annotations

import time

import stages.forks

SECONDS = 1.0

fork = stages.forks.fork


def fork_and_sleep() -> int:
    pid = fork()
    if pid:
        time.sleep(SECONDS)
    return pid


if __name__ == "__main__":
    stages.forks.fork = fork_and_sleep
    from stages.worker import main

    main()
