"""The program that takes the place of a running `engine serve`, in the same process: `python -m engine.reexec FD`.

FD is a memfd with the document (`engine/handover.py`); the descriptors that it speaks of were inherited. With
`--rehearse`, FD is one end of a channel, by which copies of all that come; everything is built from them, without being
touched, and the answer is whether that went well.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time

import msgspec
import uvloop

from engine.handover import Handover, decode, descriptors_of, from_memory
from engine.serve import Service, log_to_stderr
from engine.server import Restored
from engine.states import Descriptors
from engine.version import VERSION
from ipc.channel import Channel
from ipc.errors import EngineError
from ipc.messages.program import ProgramRehearsed, RehearseProgram

RECEIVE_TIMEOUT = 10.0
"""Seconds: what is received has been sent before this process was started."""

MAX_PROBLEM = 1500
"""Characters of what is said about a failed rehearsal."""

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--rehearse", fd]:
            rehearse(int(fd))
        case [fd]:
            return take_over(int(fd))
        case _:
            print("this program is started by `engine reload --supervisor`", file=sys.stderr)
    return 2


def take_over(fd: int) -> int:
    """Go on; returns the exit status. Whatever is raised before the end, the requests are in the journal."""
    log_to_stderr()
    try:
        document = decode(from_memory(fd))
        os.close(fd)
        uvloop.run(_serve_on(document))
    except EngineError as error:
        print(f"engine: {error}", file=sys.stderr)
        return error.exit_code
    return 0


async def _serve_on(document: Handover) -> None:
    inherited = descriptors_of(document)
    service, restored = build(document, inherited)
    log.info("engine %s takes the place of engine %s", VERSION, document.engine)
    await service.run(lambda: service.resume(restored))


def build(document: Handover, fds: Descriptors) -> tuple[Service, Restored]:
    """Everything that the document speaks of. Reads from no client and no stage, and writes nowhere. ValueError,
    OSError or `EngineError` if something does not fit."""
    service = Service.restored(document, fds)
    restored = service.server.put_back(document.server, fds, time.monotonic() - document.held_at)
    fds.check_all_taken()
    return service, restored


def rehearse(fd: int) -> None:
    """Answer, and leave at once: what was built is copies, and must not be closed in the ways of the living."""
    channel: Channel[RehearseProgram] = Channel(socket.socket(fileno=fd), RehearseProgram)
    problem = ""
    try:
        document, fds = _receive(channel)
        asyncio.run(_build_only(decode(document), fds))
    except OSError as error:
        problem = f"{error.strerror or type(error).__name__}"  # without the path that it carries
    except (ValueError, EngineError) as error:
        problem = f"{error}"[:MAX_PROBLEM]
    channel.send(ProgramRehearsed(problem=problem, engine=VERSION), timeout=RECEIVE_TIMEOUT)
    os._exit(0)


async def _build_only(document: Handover, fds: Descriptors) -> None:
    build(msgspec.structs.replace(document, fds=fds.fds), fds)


def _receive(channel: Channel[RehearseProgram]) -> tuple[bytes, Descriptors]:
    fds: list[int] = []
    more = True
    while more:
        received = channel.receive(RECEIVE_TIMEOUT)
        fds += received.fds
        more = received.message.more
    return from_memory(fds[0]), Descriptors(fds[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
