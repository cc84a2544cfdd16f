"""What the system says when it starts no more processes or threads, or has no memory for them, and what to do then.

It may pass: others end, or free memory. Linux counts threads as processes.
"""

from __future__ import annotations

import errno

from ipc.errors import OutOfMemory, OutOfProcesses

PASSING = (OutOfMemory.code, OutOfProcesses.code)
"""Codes of why a process cannot start now, but may a little later."""

RAISE_PROCESSES = (
    "no thread or process can be started: raise the limit of this user (ulimit -u) or of the cgroup (pids.max), or end "
    "other programs"
)
FREE_MEMORY = "there is no memory: free some, or raise the limit of the cgroup (memory.max)"

REFUSED = ("can't start new thread", "resource temporarily unavailable")
"""What Python says of a thread, and the C++ library of one of its own, in small letters."""


def lacks_processes(error: Exception) -> bool:
    """Whether fork, clone or a thread was refused."""
    if isinstance(error, OSError):
        return error.errno == errno.EAGAIN
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in REFUSED)


def why_not_started(error: OSError) -> str:
    """Why the system has started no process; what to do, where that is known."""
    advice = {errno.EAGAIN: RAISE_PROCESSES, errno.ENOMEM: FREE_MEMORY}.get(error.errno or 0)
    text = error.strerror or str(error)
    return text if advice is None else f"{text}; {advice}"
