"""`python -m ipc.device_maker FD`: a short-lived process that makes, or tests, GPU memory for the supervisor.

The supervisor has no CUDA context, so one process makes the memory, and another, which finds in it what the first one
wrote, proves that memory of this driver, in this container, outlives its maker. FD is the channel's end.
"""

from __future__ import annotations

import os
import socket
import sys

from ipc.channel import Channel, close_fds
from ipc.device_memory import DeviceMemory, DeviceView
from ipc.messages.memory import MakeMemory, MemoryReply, ProbeMemory

PATTERN = bytes(range(1, 256)) * 16
"""Written at both ends of each piece: 4,080 bytes without a zero."""
TIMEOUT = 30.0


def make(message: MakeMemory) -> list[DeviceMemory]:
    """The pieces, with the pattern at both ends."""
    pieces = [DeviceMemory.create(message.device, size) for size in message.sizes]
    for piece in pieces:
        for end in ends(piece.view):
            end[:] = memoryview(PATTERN)[: len(end)]
    return pieces


def test(message: ProbeMemory, fds: list[int]) -> str:
    """What is wrong with the pieces, which are clear afterwards; empty if nothing is."""
    problem = ""
    for fd, size in zip(fds, message.sizes, strict=True):
        with DeviceMemory.attach(fd, message.device, size) as piece:
            for end in ends(piece.view):
                if end.tobytes() != PATTERN[: len(end)]:
                    problem = "memory that one process wrote reads differently in another"
                end[:] = memoryview(bytes(len(end)))
    return problem


def ends(view: DeviceView) -> list[DeviceView]:
    """The first and the last bytes; of a small piece, all of it."""
    return [view[: len(PATTERN)]] + ([view[-len(PATTERN) :]] if len(view) >= 2 * len(PATTERN) else [])


def run(channel: Channel[MakeMemory | ProbeMemory]) -> None:
    """Do what the one message asks for and answer it."""
    message, fds = channel.receive(TIMEOUT)
    pieces: list[DeviceMemory] = []
    try:
        match message:
            case MakeMemory():
                pieces, problem = make(message), ""
            case ProbeMemory():
                problem = test(message, fds)
    except OSError as error:
        problem = str(error)
    close_fds(fds)
    channel.send(MemoryReply(problem=problem), [] if problem else [piece.fd for piece in pieces], timeout=TIMEOUT)


def main() -> None:
    run(Channel(socket.socket(fileno=int(sys.argv[1])), MakeMemory | ProbeMemory))
    os._exit(0)  # as stages do: the kernel frees everything


if __name__ == "__main__":
    main()
