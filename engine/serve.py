"""`engine serve`: one supervisor behind one socket, in a process of its own, on uvloop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from engine.decode import decode_strictly
from engine.handover import FORMAT, Handover
from engine.models import read_yaml
from engine.params import SystemParams
from engine.paths import SocketClaim, default_state_dir, socket_path
from engine.replacement import STOP_SIGNALS, Replacement
from engine.server import Restored, Server
from engine.states import Descriptors
from engine.supervisor import Supervisor
from engine.systemd import Notify, passed
from engine.vault import KIND, Vault
from engine.version import VERSION
from ipc.errors import BadConfig

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger(__name__)


def run(params: SystemParams) -> None:
    """Serve until a client or a signal ends it. Raises `BadConfig`, `BadCheckpoint`, `StageFailed`."""
    log_to_stderr()
    uvloop.run(serve(params))


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, handlers=[StderrHandler()], format=LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")


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
    listener, kept = passed(KIND)
    vault = Vault(Notify.of_environment(), kept)
    with SocketClaim(_path(params, listener), shared=bool(params.allow_uids)) as claim:
        service = Service(Supervisor(params, vault=vault), claim)
        await service.run(lambda: service.start(listener))


def _path(params: SystemParams, listener: socket.socket | None) -> Path:
    """Of the socket; one that was passed to us has a path already."""
    if listener is not None and params.socket is None:
        return Path(listener.getsockname())
    return socket_path(params.socket)


class Service:
    """One supervisor behind one socket, in a process of its own: `engine serve`, under this program or the next.

    Resource handling: `run` ends what it was given and what it has begun.
    """

    def __init__(self, supervisor: Supervisor, claim: SocketClaim) -> None:
        self.supervisor = supervisor
        self.server = Server(supervisor, claim, reload=Replacement(self))
        self.notify = Notify.of_environment()
        self.announced = False
        """All stages were up once."""
        self._claim = claim

    async def start(self, listener: socket.socket | None = None) -> None:
        """Begin anew."""
        self.notify.status(f"loading {self.supervisor.model.name}")
        await self.supervisor.start()
        await self.server.start(listener)

    async def run(self, begin: Callable[[], Awaitable[None]]) -> None:
        """`begin`, then serve until somebody asks for the end, after draining if that was asked. Raises what keeps a
        stage from being started."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.handle_stop_signal, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the program before this one
        with self._claim:
            try:
                await begin()
                await self._until_asked()
            finally:
                self.notify.stopping()
                await self.supervisor.stop()
                await self.server.stop()
        log.info("stopped")

    def handle_stop_signal(self, number: signal.Signals) -> None:
        """The first stops without waiting for tasks, which stay in the journal; the second leaves at once.

        The stage processes end when they see the end of their control channels.
        """
        if self.server.stop_asked.is_set():
            log.warning("%s again: leaving at once", number.name)
            self._claim.close()
            os._exit(128 + number)
        log.info("%s: stopping; unfinished tasks stay in the journal", number.name)
        self.server.stop_asked.set()

    # From one program to the next.

    def state(self, fds: Descriptors, held_at: float) -> Handover:
        return Handover(
            format=FORMAT, engine=VERSION, held_at=held_at, supervisor=self.supervisor.state(fds),
            server=self.server.state(fds), claim=self._claim.state(fds), fds=fds.fds,
        )  # fmt: skip

    @classmethod
    def restored(cls, document: Handover, fds: Descriptors) -> Service:
        """What goes on where the program before this one was. Nothing is touched before `resume`."""
        made = cls(Supervisor.restored(document.supervisor, fds), SocketClaim.restored(document.claim, fds))
        made.announced = True
        return made

    async def resume(self, restored: Restored) -> None:
        await self.supervisor.resume()
        self.server.resume(restored)
        self.notify.ready()

    # Its end.

    async def _until_asked(self) -> None:
        announced = asyncio.create_task(self._announce())
        stop_asked = asyncio.create_task(self.server.stop_asked.wait())
        drain_asked = asyncio.create_task(self.server.drain_asked.wait())
        waiting: set[asyncio.Task[None] | asyncio.Task[bool]] = {announced, stop_asked, drain_asked}
        draining: asyncio.Task[None] | None = None
        try:
            while not stop_asked.done() and not (draining is not None and draining.done()):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if announced in done:
                    announced.result()
                if drain_asked in done:
                    draining = asyncio.create_task(self.supervisor.stop(drain=True))
                    waiting.add(draining)
        finally:
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.wait(waiting)

    async def _announce(self) -> None:
        """Show what is loaded, then say that the engine is ready; once, whatever the programs."""
        if self.announced:
            return
        from engine.display.progress import progress_view  # a third of the time in which the next program is loaded

        started = time.monotonic()
        with progress_view(quiet=False) as view:
            await self.supervisor.ready(view.load)
        await self.supervisor.settle()
        self.announced = True
        taken = time.monotonic() - started
        name, path = self.supervisor.model.name, self._claim.path
        print(f"engine {VERSION} serves {name} on {path} (ready in {taken:.1f} s)", flush=True)
        self.notify.ready(f"serving {name}")
