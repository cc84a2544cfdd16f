"""What went wrong in a stage process, in words for whoever asked: a client, or the log.

No torch here: it may not be loaded, so its errors are known by name and text.
"""

from __future__ import annotations

import errno
import re
import traceback

from ipc.errors import EngineError, Failure, OutOfMemory, OutOfProcesses, StageFailed, to_failure
from ipc.lacking import RAISE_PROCESSES, lacks_processes
from ipc.messages.names import StageName

EXIT_DEVICE_LOST = 4
"""The CUDA context is dead; only a new process gets another."""
LACKING = ("can't allocate memory", "out of memory", "out_of_memory", "alloc_failed")
"""What torch on a CPU, CUDA and Triton, its driver, and cuBLAS or cuDNN say, in small letters."""
MAX_ERROR_TEXT = 300
"""Characters of an unexpected exception that travel."""


def describe(error: Exception, stage: StageName) -> Failure:
    """The failure of one request. Tells stderr about a defect; ends the process if its device is lost."""
    if isinstance(error, EngineError):
        return to_failure(error)
    traceback.print_exception(error)
    if is_out_of_memory(error):
        return to_failure(out_of_memory(error, stage))
    if is_device_lost(error):
        raise SystemExit(EXIT_DEVICE_LOST) from error
    return Failure(EngineError.code, f"the {stage} stage failed: {summary(error)}")


def summary(error: Exception) -> str:
    """One line about an exception, without the path that an `OSError` carries."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:MAX_ERROR_TEXT]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, a library of CUDA's, the driver, Python or the system had no memory to give; the process can go
    on."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    named = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    return named or isinstance(error, MemoryError) or any(text in str(error).lower() for text in LACKING)


def out_of_memory(error: Exception, stage: StageName) -> OutOfMemory:
    """What was wanted and what was there, where torch says so."""
    text = str(error)
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    sizes = [f"{wanted[1]} were asked for"] if wanted else []
    sizes += [f"{free[1]} were free"] if free else []
    found = f" ({', '.join(sizes)})" if sizes else ""
    return OutOfMemory(
        f"the {stage} stage ran out of memory{found}; ask for a smaller size or fewer frames, or free memory on this "
        "machine's device"
    )


def is_device_lost(error: Exception) -> bool:
    """Whether CUDA reported an error after which every call of this process fails."""
    if any(cls.__name__ == "AcceleratorError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def start_failure(error: Exception) -> Failure:
    """Why a process cannot start. Tells stderr where an error came from that is none of ours."""
    if isinstance(error, EngineError):
        return to_failure(error)
    traceback.print_exception(error)
    if is_out_of_memory(error):
        return Failure(OutOfMemory.code, summary(error))
    if lacks_processes(error):
        return Failure(OutOfProcesses.code, f"{summary(error)}; {RAISE_PROCESSES}")
    return Failure(StageFailed.code, summary(error))
