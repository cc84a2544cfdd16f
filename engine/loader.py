"""The process that reads new weights (`stages/loader.py`), as the supervisor sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from engine.adapters import Part
from engine.params import ModelParams
from engine.process import spawn
from engine.weights import Placed
from ipc.channel import Channel, ChannelClosed, close_fds
from ipc.errors import EngineError, ProtocolError, ServerUnavailable, from_failure
from ipc.messages.loader import AnyLoaderReport, PlacedLora, Read, ReadAll, ReadFailed, ReadLora
from ipc.messages.reports import Loading, Placed as PlacedReport
from ipc.messages.status import LoadProgress
from ipc.messages.weights import Component

LOADER = "stages.loader"
LINGER = 30.0
"""Seconds that the process waits for more: it has torch loaded, which takes as long as to read several GB."""

OnLoading = Callable[[LoadProgress], None]


def read_of(
    model: ModelParams,
    dtype: str,
    components: Sequence[Component],
    devices: Mapping[str, Sequence[str]],
    in_memory: Sequence[str] = (),
    manifest: str | None = None,
) -> Read:
    """The order to read these components of a model, as `Read` says."""
    return Read(
        supervisor_pid=os.getpid(), components=list(components), in_memory=list(in_memory), manifest=manifest,
        devices={name: list(places) for name, places in devices.items()}, dtype=dtype, transformer=model.transformer,
        vae=model.vae, text_encoder=model.text_encoder, image_encoder=model.image_encoder,
    )  # fmt: skip


class Outcome(NamedTuple):
    """What was placed, of a `Read` or of a `ReadLora`."""

    versions: list[Placed]
    adapters: list[Part]

    @property
    def fds(self) -> list[int]:
        return [placed.fd for placed in self.versions] + [part.fd for part in self.adapters]


class Loader:
    """Reads weights in a process that is started when there is something to read, and stays for `linger` seconds.

    Resource handling: owns the process until `end`. Error handling: what is wrong with the files comes as the process
    says it; `ServerUnavailable` when the system has no process to spare, or somebody ended it. A read that is cancelled
    ends it, whatever it is doing.
    """

    def __init__(self, linger: float = LINGER) -> None:
        self._linger = linger
        self._process: _Process | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def read(self, asked: Read, fds: Sequence[int], on_loading: OnLoading) -> list[Placed]:
        """Have it all read; the descriptors that come back are the caller's, `fds`, of what is in memory, stay his.
        One at a time."""
        return (await self._carry_out(asked, fds, on_loading)).versions

    async def read_lora(self, asked: ReadLora) -> list[Part]:
        """Have the files of an adapter read; the descriptors that come back are the caller's. One at a time."""
        return (await self._carry_out(asked, (), lambda progress: None)).adapters

    async def _carry_out(self, asked: Read | ReadLora, fds: Sequence[int], on_loading: OnLoading) -> Outcome:
        self._stop_waiting()
        if self._process is None or not self._process.lives():
            self._renew()
        elif self._process.has_served:
            try:
                return await self._ask(asked, fds, on_loading)
            except _Lost:  # while nobody listened, and it was not seen yet
                self._renew()
        return await self._ask(asked, fds, on_loading)

    def _renew(self) -> None:
        self.end()
        self._process = _Process()

    async def _ask(self, asked: Read | ReadLora, fds: Sequence[int], on_loading: OnLoading) -> Outcome:
        assert self._process is not None
        process = self._process
        try:
            return await process.carry_out(asked, fds, on_loading)
        except EngineError:
            raise
        except BaseException:
            process.broken = True
            raise
        finally:
            if process.broken:
                self.end()
            elif self._process is process:
                self._expiry = asyncio.get_running_loop().call_later(self._linger, self.end)

    def end(self) -> None:
        """Kill the process if there is one; `ended` waits until it is gone."""
        self._stop_waiting()
        if self._process is not None:
            process, self._process = self._process, None
            ending = asyncio.get_running_loop().create_task(process.end())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def ended(self) -> None:
        """Every process that was to end has, and is reaped."""
        if self._ending:
            await asyncio.wait(set(self._ending))

    def _stop_waiting(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None


class _Lost(ServerUnavailable):
    """The process has ended, and has said nothing of what it was asked last."""

    code = ServerUnavailable.code


class _Process:
    """One process, and what it says."""

    def __init__(self) -> None:
        """Raises `ServerUnavailable`, and leaves nothing behind."""
        try:
            ours, theirs = Channel.pair()
            with contextlib.ExitStack() as undo, theirs:
                undo.callback(ours.close)
                self._popen = spawn(LOADER, theirs)
                undo.pop_all()
        except OSError as error:
            raise ServerUnavailable(f"no process could be started to read the weights: {error.strerror}") from error
        self._channel: Channel[AnyLoaderReport] = Channel(ours, AnyLoaderReport)
        self._on_loading: OnLoading | None = None
        self._outcome = Outcome([], [])
        self._done: asyncio.Future[None] | None = None
        self.broken = False
        """It is gone, said what means nothing, or does what nobody wants any more."""
        self.has_served = False
        """It was asked for something before, and has answered, if only that it cannot be."""
        self._has_spoken = False
        """Since the last order."""

    @property
    def pid(self) -> int:
        return self._popen.pid

    def lives(self) -> bool:
        """Reaps it if it has ended."""
        return self._popen.poll() is None

    async def carry_out(self, asked: Read | ReadLora, fds: Sequence[int], on_loading: OnLoading) -> Outcome:
        self._on_loading, self._done = on_loading, asyncio.get_running_loop().create_future()
        self._has_spoken = False
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._readable)
        try:
            with contextlib.suppress(ChannelClosed):  # dead already: reading tells
                self._channel.try_send(asked, fds)
            await self._done
            taken, self._outcome = self._outcome, Outcome([], [])
            return taken
        finally:
            self.has_served = True
            self._stop_listening()

    async def end(self) -> None:
        """Kill it, whatever it is doing, and wait until it is gone."""
        self._popen.kill()
        self._fail(ServerUnavailable("the engine stopped while it read weights"))
        self._stop_listening()
        self._channel.close()
        await asyncio.to_thread(self._popen.wait)

    def _readable(self) -> None:
        assert self._done is not None
        try:
            while not self._done.done() and (received := self._channel.try_receive()) is not None:
                self._has_spoken = True
                self._hear(received.message, received.fds)
        except ChannelClosed:
            self.broken = True
            kind = ServerUnavailable if self._has_spoken else _Lost
            self._fail(kind("the process that reads weights was ended; nothing was changed: try again"))
        except (OSError, ProtocolError) as error:
            self.broken = True
            self._fail(ServerUnavailable(f"the process that reads weights is not understood: {error}; try again"))

    def _hear(self, report: AnyLoaderReport, fds: list[int]) -> None:
        assert self._done is not None and self._on_loading is not None
        match report:
            case Loading(component=component, done=done, total=total):
                self._on_loading(LoadProgress(component=component, done=done, total=total))
            case PlacedReport(version=version, device=device):
                self._outcome.versions.append(Placed(device, version, fds.pop()))
            case PlacedLora(adapter=adapter):
                self._outcome.adapters.append(Part(adapter, fds.pop()))
            case ReadFailed(error=error):
                self._fail(from_failure(error))
            case ReadAll():
                self._done.set_result(None)
        close_fds(fds)

    def _fail(self, error: EngineError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _stop_listening(self) -> None:
        """And let go of what was placed and nobody has taken."""
        if self._channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
        left, self._outcome = self._outcome, Outcome([], [])
        close_fds(left.fds)
