"""The process that reads new weights, or a LoRA (`stages/loader.py`), as the supervisor sees it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from engine.adapters import Part
from engine.process import spawn
from engine.weights import Placed
from ipc.channel import Channel, ChannelClosed, close_fds
from ipc.errors import BadCheckpoint, ProtocolError, ServerUnavailable, from_failure
from ipc.messages import (
    AnyLoaderReport,
    Loading,
    LoadProgress,
    Placed as PlacedReport,
    PlacedLora,
    Read,
    ReadAll,
    ReadFailed,
    ReadLora,
)

LOADER = "stages.loader"


class Loader:
    """One run of the loader. `async with` ends the process, whatever it is doing, and closes what nobody has taken.

    Error handling: what is wrong with the files comes as the loader says it; `BadCheckpoint` if the files killed it;
    `ServerUnavailable` when the system has no process to spare.
    """

    def __init__(
        self,
        asked: Read | ReadLora,
        fds: Sequence[int] = (),
        on_loading: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> None:
        """Start it. `fds`, of the components in memory, stay the caller's."""
        self._on_loading = on_loading
        self._placed: list[Placed] = []
        self._parts: list[Part] = []
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ours, theirs = Channel.pair()
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            with theirs:
                self._popen = self._spawn(theirs)
            undo.pop_all()
        self._channel: Channel[AnyLoaderReport] = Channel(ours, AnyLoaderReport)
        with contextlib.suppress(ChannelClosed):  # dead already: reading tells
            self._channel.try_send(asked, fds)
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._readable)

    async def placed(self) -> list[Placed]:
        """Wait for all of a `Read`; the descriptors are the caller's then."""
        await self._ended
        taken, self._placed = self._placed, []
        return taken

    async def parts(self) -> list[Part]:
        """Wait for all of a `ReadLora`; the descriptors are the caller's then."""
        await self._ended
        taken, self._parts = self._parts, []
        return taken

    def _spawn(self, end: socket.socket) -> subprocess.Popen[bytes]:
        try:
            return spawn(LOADER, end)
        except OSError as error:
            raise ServerUnavailable(f"no process could be started to read the weights: {error.strerror}") from error

    def _readable(self) -> None:
        try:
            while not self._ended.done() and (received := self._channel.try_receive()) is not None:
                self._hear(received.message, received.fds)
        except (ChannelClosed, ProtocolError):
            self._end(BadCheckpoint("the process that read the weights died of them; nothing was changed"))

    def _hear(self, report: AnyLoaderReport, fds: list[int]) -> None:
        match report:
            case Loading(component=component, done=done, total=total):
                self._on_loading(LoadProgress(component=component, done=done, total=total))
            case PlacedReport(version=version, device=device):
                self._placed.append(Placed(device, version, fds.pop()))
            case PlacedLora(adapter=adapter):
                self._parts.append(Part(adapter, fds.pop()))
            case ReadFailed(error=error):
                self._end(from_failure(error))
            case ReadAll():
                self._end(None)
        close_fds(fds)

    def _end(self, error: Exception | None) -> None:
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._popen.kill()
        self._ended.cancel()
        close_fds(placed.fd for placed in self._placed)
        close_fds(part.fd for part in self._parts)
        await asyncio.shield(asyncio.to_thread(self._popen.wait))
        self._channel.close()
