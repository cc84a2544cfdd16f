"""GPU memory for the queues and the states, made at start by a process that then leaves, and tested by another."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from engine.child import python_path
from engine.memory import DeviceSizes
from ipc.channel import Channel, close_fds
from ipc.messages.memory import MakeMemory, MemoryReply, ProbeMemory
from ipc.payload import DeviceFd

log = logging.getLogger(__name__)

TIMEOUT = 60.0
"""Seconds for a process to make a CUDA context and do its work."""


def make_device_memory(device: str, sizes: DeviceSizes) -> Mapping[str, DeviceFd] | None:
    """Memory of these sizes on a device such as "cuda:0", by what it is for. None where this driver, or this container,
    has no memory that outlives the process which made it; the log says why. Blocks until both processes are through."""
    number = int(device.rpartition(":")[2])
    wanted = list(sizes.values())
    try:
        fds = ask(MakeMemory(device=number, sizes=wanted), [])
    except (OSError, TimeoutError) as error:
        log.warning("no GPU memory that outlives a process: %s; a stage that dies reads its weights again", error)
        return None
    try:
        ask(ProbeMemory(device=number, sizes=wanted), fds)
    except (OSError, TimeoutError) as error:
        close_fds(fds)
        log.warning("GPU memory does not outlive a process: %s; a stage that dies reads its weights again", error)
        return None
    return {name: DeviceFd(number, fd) for name, fd in zip(sizes, fds, strict=True)}


def ask(message: MakeMemory | ProbeMemory, fds: Sequence[int]) -> list[int]:
    """Have a process of its own do this; the descriptors that it answers with. OSError says what went wrong."""
    ours, theirs = Channel.pair()
    with Channel[MemoryReply](ours, MemoryReply) as channel:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "ipc.device_maker", str(theirs.fileno())], pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": python_path()},
            )  # fmt: skip
        try:
            channel.send(message, fds, timeout=TIMEOUT)
            reply, made = channel.receive(TIMEOUT)
        finally:
            child.kill()
            child.wait()
    if reply.problem:
        raise OSError(reply.problem)
    return made
