"""Talk to a running engine: `Client` (blocking, from any thread) and `AsyncClient` (asyncio), one API.

Every call uses a connection of its own, so a client holds nothing between calls, may be shared between threads or
tasks, and survives a restart of the server.

    Client().generate(prompt="a red circle moves left", output="red.mp4")
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.arrays import given_tensors
from engine.connection import AsyncConnection, Connection, Deadlines
from engine.decode import decode_strictly
from engine.params import UserParams
from engine.paths import socket_path
from hotreload.given import pack
from ipc.errors import BadRequest, EngineError, from_failure
from ipc.messages.client import (
    AddLora,
    Canary,
    Cancel,
    ChangeMemory,
    GetMemory,
    GetStatus,
    GetTrace,
    ListLoras,
    ListTasks,
    ListVersions,
    Reload,
    ReloadSupervisor,
    RemoveLora,
    ReplaceStages,
    Rollback,
    Shutdown,
    Submit,
    Subscribe,
    UpdateWeights,
    When,
)
from ipc.messages.names import MemoryLevel, StageName
from ipc.messages.server import (
    Accepted,
    Done,
    Failed,
    LoraList,
    MemoryReport,
    Ok,
    Progress,
    Reloaded,
    Replaced,
    Status,
    SupervisorReloaded,
    TaskEvent,
    TaskList,
    Traced,
    VersionList,
    Welcome,
)
from ipc.messages.status import DeviceMemory, EngineStatus, Holding, LoraInfo, TaskInfo, VersionInfo

OnProgress = Callable[[Progress], object]


class Client:
    """A running engine, from blocking code. `with` checks that it is there; nothing needs to be closed.

    Error handling: `ServerUnavailable` when nobody listens or answers; what the engine refuses or what a task ends with
    comes as the exception of `ipc/errors.py` (`Busy` with `retry_after`).
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None, deadlines: Deadlines | None = None) -> None:
        """`socket`: path of the engine's socket; None: the default one. `BadConfig` if it is too long."""
        self.socket = socket_path(socket)
        self._deadlines = deadlines or Deadlines()

    def __enter__(self) -> Client:
        self.server()
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def server(self) -> Welcome:
        """Who is there: version, model, pid."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.welcome

    def submit(self, params: UserParams | None = None, /, **fields: Any) -> Accepted:
        """Hand in a request, as `UserParams` or by its fields. When this returns, it will be done, whoever leaves."""
        request = _request(params, fields)
        with Connection(self.socket, self._deadlines) as connection:
            submit = Submit(ref=0, params=request, subscribe=False)
            return connection.ask(submit, Accepted, self._deadlines.submit)

    def events(self, identity: str) -> Iterator[TaskEvent]:
        """The events of a task, from its present state to its end: `Progress`, then `Done` or `Failed`."""
        with Connection(self.socket, self._deadlines) as connection:
            connection.ask(Subscribe(ref=0, id=identity), Ok)
            while True:
                event = connection.event()
                yield event
                if isinstance(event, Done | Failed):
                    return

    def result(self, identity: str, on_progress: OnProgress | None = None) -> Done:
        """Wait for the end of a task; raises its error if it did not end well."""
        with Connection(self.socket, self._deadlines) as connection:
            connection.ask(Subscribe(ref=0, id=identity), Ok)
            while (done := _outcome(connection.event(), on_progress)) is None:
                pass
            return done

    def generate(
        self, params: UserParams | None = None, /, *, on_progress: OnProgress | None = None, **fields: Any
    ) -> Done:
        """Submit and wait. If the waiting is interrupted (Ctrl-C, an error in `on_progress`), the task is cancelled."""
        accepted = self.submit(params, **fields)
        try:
            return self.result(accepted.id, on_progress)
        except EngineError:
            raise
        except BaseException:
            with contextlib.suppress(EngineError):
                self.cancel(accepted.id)
            raise

    def cancel(self, identity: str) -> None:
        """Stop a task at its next step; without effect once the end of its video is being written. `NotFound` if there
        is no such task."""
        with Connection(self.socket, self._deadlines) as connection:
            connection.ask(Cancel(ref=0, id=identity), Ok, self._deadlines.cancel)

    def tasks(self) -> list[TaskInfo]:
        """Unfinished tasks and the latest finished ones, oldest first."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(ListTasks(ref=0), TaskList).tasks

    def status(self) -> EngineStatus:
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(GetStatus(ref=0), Status).status

    def memory(self) -> list[Holding]:
        """Who has what of the memory that outlives the stages."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(GetStatus(ref=0, memory=True), Status).memory

    def reload(
        self,
        checkpoint: str | os.PathLike[str],
        components: Sequence[str] = (),
        when: When = "drain",
        canary: Canary | None = None,
        manifest: str | os.PathLike[str] | None = None,
        dry_run: bool = False,
    ) -> Reloaded:
        """Have the engine read weights from a directory, `components` of them or all, and give them to new tasks.
        Returns when it does; if it raises, nothing has changed."""
        asked = _reload(checkpoint, components, when, canary, manifest, dry_run)
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(asked, Reloaded, self._deadlines.reload)

    def replace_stages(
        self, stages: Sequence[StageName] = (), *, attention_backend: str | None = None, threads: int | None = None,
        placement: str | None = None,
    ) -> Replaced:  # fmt: skip
        """Have new processes, with the code now on disk, take the places of these stages' (none: of all), with another
        attention backend of the dits or other threads of dit or vae, if they are given, or another placement (split,
        fused) of all. Returns when they serve; if it raises, the one that it was about goes on."""
        asked = ReplaceStages(
            ref=0, stages=list(stages), attention_backend=attention_backend, threads=threads, placement=placement
        )
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(asked, Replaced, self._deadlines.reload)

    def update_weights(self, component: str, tensors: Mapping[str, Any], when: When = "drain") -> Reloaded:
        """Give new tasks these weights of a component: all its tensors, by Diffusers' names, as numpy arrays or what
        becomes one. Returns when it does; if it raises, nothing has changed."""
        fd = pack(given_tensors(tensors))
        try:
            with Connection(self.socket, self._deadlines) as connection:
                asked = UpdateWeights(ref=0, component=component, when=when)
                return connection.ask(asked, Reloaded, self._deadlines.reload, fd)
        finally:
            os.close(fd)

    def rollback(self, when: When = "drain") -> Reloaded:
        """Have new tasks get the weights that were served before the last reload."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(Rollback(ref=0, when=when), Reloaded, self._deadlines.reload)

    def versions(self) -> list[VersionInfo]:
        """The versions of weights that are served, were before, or are still used."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(ListVersions(ref=0), VersionList).versions

    def reload_supervisor(self) -> SupervisorReloaded:
        """Replace the engine's own program by the one that is on disk now. `ReloadFailed` if that cannot go on: the
        running one does."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(ReloadSupervisor(ref=0), SupervisorReloaded, self._deadlines.reload)

    def trace(self) -> Traced:
        """When the latest quanta ran, and where."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(GetTrace(ref=0), Traced)

    def memory_levels(self) -> list[DeviceMemory]:
        """How much of the weights each device keeps, and why."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(GetMemory(ref=0), MemoryReport).devices

    def change_memory(self, level: MemoryLevel, blocks: int | None = None) -> list[DeviceMemory]:
        """Have the devices keep so much of the weights from now on (at level 3 `blocks` of the DiT's), or, with auto,
        as much as fits. Returns when they do; if it raises, what was before holds."""
        with Connection(self.socket, self._deadlines) as connection:
            asked = ChangeMemory(ref=0, level=level, blocks=blocks)
            return connection.ask(asked, MemoryReport, self._deadlines.reload).devices

    def add_lora(self, name: str, *files: str | os.PathLike[str]) -> LoraInfo:
        """Have the engine read a LoRA file, or the high-noise and the low-noise expert's, and offer it to requests as
        `name`. Returns when it does; if it raises, nothing has changed."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(_add_lora(name, files), LoraList, self._deadlines.reload).loras[0]

    def remove_lora(self, name: str) -> None:
        """Take an adapter away from requests to come. `NotFound` if there is none of this name."""
        with Connection(self.socket, self._deadlines) as connection:
            connection.ask(RemoveLora(ref=0, name=name), Ok, self._deadlines.reload)

    def loras(self) -> list[LoraInfo]:
        """The adapters that requests can name, and those that unfinished requests still use."""
        with Connection(self.socket, self._deadlines) as connection:
            return connection.ask(ListLoras(ref=0), LoraList).loras

    def shutdown(self, drain: bool = True) -> None:
        """Stop the engine, with `drain` after everything that was accepted. Returns when it has gone."""
        with Connection(self.socket, self._deadlines) as connection:
            connection.ask(Shutdown(ref=0, drain=drain), Ok)
            connection.wait_closed()


class AsyncClient:
    """A running engine, from asyncio. `async with` checks that it is there; nothing needs to be closed.

    Error handling: as `Client`.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None, deadlines: Deadlines | None = None) -> None:
        """`socket`: path of the engine's socket; None: the default one. `BadConfig` if it is too long."""
        self.socket = socket_path(socket)
        self._deadlines = deadlines or Deadlines()

    async def __aenter__(self) -> AsyncClient:
        await self.server()
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def server(self) -> Welcome:
        """Who is there: version, model, pid."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return connection.welcome

    async def submit(self, params: UserParams | None = None, /, **fields: Any) -> Accepted:
        """Hand in a request, as `UserParams` or by its fields. When this returns, it will be done, whoever leaves."""
        request = _request(params, fields)
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return await connection.ask(
                Submit(ref=0, params=request, subscribe=False), Accepted, self._deadlines.submit
            )

    async def events(self, identity: str) -> AsyncIterator[TaskEvent]:
        """The events of a task, from its present state to its end: `Progress`, then `Done` or `Failed`."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            await connection.ask(Subscribe(ref=0, id=identity), Ok)
            while True:
                event = await connection.event()
                yield event
                if isinstance(event, Done | Failed):
                    return

    async def result(self, identity: str, on_progress: OnProgress | None = None) -> Done:
        """Wait for the end of a task; raises its error if it did not end well."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            await connection.ask(Subscribe(ref=0, id=identity), Ok)
            while (done := _outcome(await connection.event(), on_progress)) is None:
                pass
            return done

    async def generate(
        self, params: UserParams | None = None, /, *, on_progress: OnProgress | None = None, **fields: Any
    ) -> Done:
        """Submit and wait. If the waiting is interrupted (cancelled, an error in `on_progress`), so is the task."""
        accepted = await self.submit(params, **fields)
        try:
            return await self.result(accepted.id, on_progress)
        except EngineError:
            raise
        except BaseException:
            with contextlib.suppress(EngineError):
                await self.cancel(accepted.id)
            raise

    async def cancel(self, identity: str) -> None:
        """Stop a task at its next step; without effect once the end of its video is being written. `NotFound` if there
        is no such task."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            await connection.ask(Cancel(ref=0, id=identity), Ok, self._deadlines.cancel)

    async def tasks(self) -> list[TaskInfo]:
        """Unfinished tasks and the latest finished ones, oldest first."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return (await connection.ask(ListTasks(ref=0), TaskList)).tasks

    async def status(self) -> EngineStatus:
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return (await connection.ask(GetStatus(ref=0), Status)).status

    async def memory(self) -> list[Holding]:
        """Who has what of the memory that outlives the stages."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return (await connection.ask(GetStatus(ref=0, memory=True), Status)).memory

    async def reload(
        self,
        checkpoint: str | os.PathLike[str],
        components: Sequence[str] = (),
        when: When = "drain",
        canary: Canary | None = None,
        manifest: str | os.PathLike[str] | None = None,
        dry_run: bool = False,
    ) -> Reloaded:
        """Have the engine read weights from a directory, `components` of them or all, and give them to new tasks.
        Returns when it does; if it raises, nothing has changed."""
        asked = _reload(checkpoint, components, when, canary, manifest, dry_run)
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return await connection.ask(asked, Reloaded, self._deadlines.reload)

    async def replace_stages(
        self, stages: Sequence[StageName] = (), *, attention_backend: str | None = None, threads: int | None = None,
        placement: str | None = None,
    ) -> Replaced:  # fmt: skip
        """Have new processes, with the code now on disk, take the places of these stages' (none: of all), with another
        attention backend of the dits or other threads of dit or vae, if they are given, or another placement (split,
        fused) of all. Returns when they serve; if it raises, the one that it was about goes on."""
        asked = ReplaceStages(
            ref=0, stages=list(stages), attention_backend=attention_backend, threads=threads, placement=placement
        )
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return await connection.ask(asked, Replaced, self._deadlines.reload)

    async def update_weights(self, component: str, tensors: Mapping[str, Any], when: When = "drain") -> Reloaded:
        """Give new tasks these weights of a component: all its tensors, by Diffusers' names, as numpy arrays or what
        becomes one. Returns when it does; if it raises, nothing has changed."""
        fd = await asyncio.to_thread(lambda: pack(given_tensors(tensors)))
        try:
            async with AsyncConnection(self.socket, self._deadlines) as connection:
                asked = UpdateWeights(ref=0, component=component, when=when)
                return await connection.ask(asked, Reloaded, self._deadlines.reload, fd)
        finally:
            os.close(fd)

    async def rollback(self, when: When = "drain") -> Reloaded:
        """Have new tasks get the weights that were served before the last reload."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return await connection.ask(Rollback(ref=0, when=when), Reloaded, self._deadlines.reload)

    async def versions(self) -> list[VersionInfo]:
        """The versions of weights that are served, were before, or are still used."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return (await connection.ask(ListVersions(ref=0), VersionList)).versions

    async def reload_supervisor(self) -> SupervisorReloaded:
        """Replace the engine's own program by the one that is on disk now. `ReloadFailed` if that cannot go on: the
        running one does."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return await connection.ask(ReloadSupervisor(ref=0), SupervisorReloaded, self._deadlines.reload)

    async def trace(self) -> Traced:
        """When the latest quanta ran, and where."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return await connection.ask(GetTrace(ref=0), Traced)

    async def memory_levels(self) -> list[DeviceMemory]:
        """How much of the weights each device keeps, and why."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return (await connection.ask(GetMemory(ref=0), MemoryReport)).devices

    async def change_memory(self, level: MemoryLevel, blocks: int | None = None) -> list[DeviceMemory]:
        """Have the devices keep so much of the weights from now on (at level 3 `blocks` of the DiT's), or, with auto,
        as much as fits. Returns when they do; if it raises, what was before holds."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            asked = ChangeMemory(ref=0, level=level, blocks=blocks)
            return (await connection.ask(asked, MemoryReport, self._deadlines.reload)).devices

    async def add_lora(self, name: str, *files: str | os.PathLike[str]) -> LoraInfo:
        """Have the engine read a LoRA file, or the high-noise and the low-noise expert's, and offer it to requests as
        `name`. Returns when it does; if it raises, nothing has changed."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return (await connection.ask(_add_lora(name, files), LoraList, self._deadlines.reload)).loras[0]

    async def remove_lora(self, name: str) -> None:
        """Take an adapter away from requests to come. `NotFound` if there is none of this name."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            await connection.ask(RemoveLora(ref=0, name=name), Ok, self._deadlines.reload)

    async def loras(self) -> list[LoraInfo]:
        """The adapters that requests can name, and those that unfinished requests still use."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            return (await connection.ask(ListLoras(ref=0), LoraList)).loras

    async def shutdown(self, drain: bool = True) -> None:
        """Stop the engine, with `drain` after everything that was accepted. Returns when it has gone."""
        async with AsyncConnection(self.socket, self._deadlines) as connection:
            await connection.ask(Shutdown(ref=0, drain=drain), Ok)
            await connection.wait_closed()


def absolute_params(params: UserParams) -> UserParams:
    """The same request with its paths made absolute, since they mean something in this process's directory only."""
    paths = {name: getattr(params, name) for name in ("output", "image", "video")}
    absolute = {name: os.path.abspath(Path(path).expanduser()) for name, path in paths.items() if path is not None}
    return msgspec.structs.replace(params, **absolute)


def _reload(
    checkpoint: str | os.PathLike[str],
    components: Sequence[str],
    when: When,
    canary: Canary | None,
    manifest: str | os.PathLike[str] | None,
    dry_run: bool,
) -> Reload:
    """With absolute paths, since relative ones mean something in this process's directory only."""
    return Reload(
        ref=0, checkpoint=os.path.abspath(checkpoint), components=list(components), when=when, canary=canary,
        manifest=None if manifest is None else os.path.abspath(manifest), dry_run=dry_run,
    )  # fmt: skip


def _add_lora(name: str, files: Sequence[str | os.PathLike[str]]) -> AddLora:
    """With absolute paths, as `_reload`."""
    return AddLora(ref=0, name=name, files=[os.path.abspath(Path(file).expanduser()) for file in files])


def _request(params: UserParams | None, fields: dict[str, Any]) -> msgspec.Raw:
    """The request as it is sent. `BadRequest` names the field that does not fit its declaration."""
    given = fields if params is None else msgspec.to_builtins(params) | fields
    checked = decode_strictly(UserParams, given, BadRequest, "the request")
    try:
        return msgspec.Raw(msgspec.msgpack.encode(absolute_params(checked)))
    except UnicodeEncodeError as error:
        raise BadRequest("the request contains characters that are not valid Unicode; remove them") from error


def _outcome(event: TaskEvent, on_progress: OnProgress | None) -> Done | None:
    """`Done` when the task is; raises its error when it failed."""
    match event:
        case Done():
            return event
        case Failed(error=error):
            raise from_failure(error)
        case Progress():
            if on_progress is not None:
                on_progress(event)
            return None
