"""Before the program is replaced, the next one shows that it can take everything: in a process of its own, from copies.

The copy of a descriptor is of the same open file, so the rehearsing program reads and writes nothing: it maps memory,
compares headers and accounts, answers, and leaves (`engine/reexec.py`).

Error handling: `ReloadFailed` says what kept it from answering, or what it answered; the process is gone then.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from engine.child import python_path
from engine.handover import in_memory
from ipc.channel import MAX_FDS, Channel, ChannelClosed
from ipc.errors import ProtocolError, ReloadFailed
from ipc.messages.program import ProgramRehearsed, RehearseProgram

REHEARSAL_TIMEOUT = 60.0
"""Seconds for the next program to be loaded and to answer. The engine goes on meanwhile."""

SEND_TIMEOUT = 5.0

GOES_ON = "the running program goes on"

PROGRAM = (sys.executable, "-P", "-m", "engine.reexec")
"""What takes the place of this program. `-P`: nothing is imported from the working directory."""


async def rehearse(document: bytes, fds: Sequence[int]) -> None:
    """Have the program that is on disk now take up `document` and copies of its descriptors. Returns when it could.

    They are sent before this waits for anything, so they are of the moment of the document.
    """
    try:
        ours, theirs = Channel.pair()
        with ours, theirs:
            _send(ours, document, fds)
            child = _spawn(theirs)
            theirs.close()
            await asyncio.to_thread(_hear, ours, child)
    except OSError as error:
        raise ReloadFailed(f"the new program could not be started: {error.strerror}; {GOES_ON}") from error


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, "--rehearse", str(theirs.fileno())], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
        env=environment(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    """Of the new program: it is imported from where this one was."""
    return {**os.environ, "PYTHONPATH": python_path()}


def _send(ours: socket.socket, document: bytes, fds: Sequence[int]) -> None:
    """A few packets, which wait in the socket for who will read them. TimeoutError if there is no room for them."""
    channel: Channel[ProgramRehearsed] = Channel(ours, ProgramRehearsed)
    memory = in_memory(document)
    try:
        every = [memory, *fds]
        parts = [every[first : first + MAX_FDS] for first in range(0, len(every), MAX_FDS)]
        for number, part in enumerate(parts, 1):
            channel.send(RehearseProgram(more=number < len(parts)), part, timeout=0.0 if number > 1 else SEND_TIMEOUT)
    finally:
        os.close(memory)


def _hear(ours: socket.socket, child: subprocess.Popen[bytes]) -> None:
    """Its answer; then it is reaped, whatever it was. Blocks."""
    try:
        answer = Channel[ProgramRehearsed](ours, ProgramRehearsed).receive(REHEARSAL_TIMEOUT).message
    except TimeoutError:
        raise ReloadFailed(
            f"the new program did not answer within {REHEARSAL_TIMEOUT:g} seconds; it was ended, and {GOES_ON}"
        ) from None
    except ChannelClosed:
        status = _ended(child)
        raise ReloadFailed(
            f"the new program ended with status {status} before it had everything: look at the log; {GOES_ON}"
        ) from None
    except ProtocolError as error:
        raise ReloadFailed(f"the new program answered what this one does not understand: {error}; {GOES_ON}") from error
    finally:
        child.kill()
        child.wait()
    if answer.problem:
        raise ReloadFailed(f"the new program (engine {answer.engine}) cannot go on: {answer.problem}; {GOES_ON}")


def _ended(child: subprocess.Popen[bytes]) -> int | str:
    """Its status. It has closed its end, so it is about to leave, if it has not left."""
    end = time.monotonic() + 1.0
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    return "none" if child.returncode is None else child.returncode
