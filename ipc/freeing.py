"""Letting go of large memory without waiting for the kernel, which takes a second to free 5 GB of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from functools import partial

from ipc.channel import close_fds

LARGE = 128 << 20
"""Bytes from which on nobody waits; less is freed in 20 ms."""


def apart(work: Callable[[], object], name: str) -> None:
    """Do it in a thread that nobody waits for; here, if there can be no other."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError:
        work()


def close_memory(fds: Iterable[int]) -> None:
    """Close descriptors of memory: of a large one in a thread, as it may be the last, which frees it, and an event loop
    that stood still for seconds would be taken for a dead one."""
    large = []
    for fd in fds:
        if os.fstat(fd).st_size >= LARGE:
            large.append(fd)
        else:
            os.close(fd)
    if large:
        apart(partial(close_fds, large), "free-memory")
