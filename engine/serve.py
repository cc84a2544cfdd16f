"""`engine serve`: one supervisor behind one socket, in a process of its own, on uvloop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from engine.decode import decode_strictly
from engine.display import progress_view
from engine.models import read_yaml
from engine.params import SystemParams
from engine.paths import SocketClaim, default_state_dir, socket_path
from engine.server import Server
from engine.supervisor import Supervisor
from engine.version import VERSION
from ipc.errors import BadConfig

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger(__name__)


def run(params: SystemParams) -> None:
    """Serve until a client or a signal ends it. Raises `BadConfig`, `BadCheckpoint`, `StageFailed`."""
    logging.basicConfig(level=logging.INFO, handlers=[StderrHandler()], format=LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    uvloop.run(serve(params))


class StderrHandler(logging.Handler):
    """Writes to what stderr is at the time: a progress bar puts itself in its place, to draw below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, TypeError, ValueError):
            self.handleError(record)


def system_params(config: Path | None, flags: dict[str, Any]) -> SystemParams:
    """The file's parameters, overridden by the options that were given. `BadConfig` names what does not fit."""
    from_file = read_yaml(config, SystemParams) if config is not None else SystemParams()
    params = decode_strictly(SystemParams, msgspec.to_builtins(from_file) | flags, BadConfig, "the command")
    if params.state_dir is not None:
        return params
    return msgspec.structs.replace(params, state_dir=str(default_state_dir()))


async def serve(params: SystemParams) -> None:
    """Claim the path, start the stages, answer clients, and end in the opposite order."""
    with SocketClaim(socket_path(params.socket), shared=bool(params.allow_uids)) as claim:
        supervisor = Supervisor(params)
        server = Server(supervisor, claim)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, handle_stop_signal, server, claim, number)
        try:
            await supervisor.start()
            await server.start()
            await _until_asked(server, supervisor, claim)
        finally:
            await supervisor.stop()
            await server.stop()
    log.info("stopped")


def handle_stop_signal(server: Server, claim: SocketClaim, number: signal.Signals) -> None:
    """The first stops without waiting for tasks, which stay in the journal; the second leaves at once.

    The stage processes end when they see the end of their control channels.
    """
    if server.stop_asked.is_set():
        log.warning("%s again: leaving at once", number.name)
        claim.close()
        os._exit(128 + number)
    log.info("%s: stopping; unfinished tasks stay in the journal", number.name)
    server.stop_asked.set()


async def _until_asked(server: Server, supervisor: Supervisor, claim: SocketClaim) -> None:
    """Returns when the engine is to stop, after draining if that was asked; raises if a stage cannot be started."""
    announced = asyncio.create_task(_announce(supervisor, claim))
    stop_asked = asyncio.create_task(server.stop_asked.wait())
    drain_asked = asyncio.create_task(server.drain_asked.wait())
    waiting: set[asyncio.Task[None] | asyncio.Task[bool]] = {announced, stop_asked, drain_asked}
    draining: asyncio.Task[None] | None = None
    try:
        while not stop_asked.done() and not (draining is not None and draining.done()):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if announced in done:
                announced.result()
            if drain_asked in done:
                draining = asyncio.create_task(supervisor.stop(drain=True))
                waiting.add(draining)
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)


async def _announce(supervisor: Supervisor, claim: SocketClaim) -> None:
    """Show what is loaded, then say that the engine is ready."""
    started = time.monotonic()
    with progress_view(quiet=False) as view:
        await supervisor.ready(view.load)
    taken = time.monotonic() - started
    print(f"engine {VERSION} serves {supervisor.model.name} on {claim.path} (ready in {taken:.1f} s)", flush=True)
