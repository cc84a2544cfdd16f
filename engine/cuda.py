"""The GPUs that the stages of this engine will see, and where the management library (NVML) has each of them.

NVML shows every GPU of the machine in an order of its own; CUDA shows those of CUDA_VISIBLE_DEVICES, in its own. What
they have in common is the UUID.
"""

from __future__ import annotations

import logging
import os
import subprocess
from functools import cache
from typing import Any

from engine.child import run_module

VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
"""Of the environment; what the driver shows, and in which order, follows from them."""

TIMEOUT = 60.0
"""Seconds for the driver to look at all GPUs; one that sleeps takes seconds to wake up."""

log = logging.getLogger(__name__)


def visible_devices() -> tuple[str, ...]:
    """The UUIDs of cuda:0, cuda:1, ... as a process with this environment has them; () if it would have none.

    On a machine with a GPU it blocks for as long as the driver takes to start, once per environment. A driver that
    does not work is logged, and is as none.
    """
    return _visible(*(os.environ.get(name) for name in VARIABLES)) if _has_gpu() else ()


def management_handle(device: str) -> Any:
    """NVML's handle of the GPU, or of the MIG instance, that CUDA calls "cuda:N" ("cuda": the first), for as long as
    NVML is initialised. ValueError if CUDA shows none of that number."""
    import pynvml

    visible, number = visible_devices(), int(device.partition(":")[2] or 0)
    if not 0 <= number < len(visible):
        raise ValueError(f"there is no cuda:{number}: CUDA shows {len(visible)} devices here")
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{visible[number]}")
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{visible[number]}")


def _has_gpu() -> bool:
    """NVML has one: in milliseconds, and without a process, where it has none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return bool(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


@cache
def _visible(*environment: str | None) -> tuple[str, ...]:
    try:
        return tuple(ask_driver())
    except OSError as error:
        log.warning("there is a GPU, but CUDA does not work, and nothing is computed on it: %s", error)
        return ()


def ask_driver() -> list[str]:
    """What a CUDA process of this environment says (`ipc/cuda_devices.py`). OSError if it says nothing."""
    try:
        ran = run_module("ipc.cuda_devices", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise OSError(f"the driver did not answer within {TIMEOUT:g} seconds") from None
    if ran.returncode:
        raise OSError(ran.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300])
    return ran.stdout.decode().split()
