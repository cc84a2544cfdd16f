"""The supervisor: it keeps the stage processes alive, the tasks in order, and the promises to the clients.

One asyncio object. Whatever happens - a request, a report of a stage, a death, a deadline - becomes an event for the
pure `Scheduler`; the actions that come back are carried out here. It never imports torch, never blocks the loop, and
leaves signal handlers and the event-loop policy to its host.

    async with Supervisor(SystemParams(model="wan-demo")) as supervisor:
        done = await supervisor.generate(UserParams(prompt="a red circle moves left", output="red.mp4"))
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from engine.adapters import AdaptersState, KeptAdapter, adapter_metadata
from engine.admission import admit, check_prompt_tokens, resolved_params
from engine.checkpoint import EXPERTS, lora_metadata, merged_loras, open_model
from engine.crew import Crew, CrewState, OnLoading
from engine.devices import resolve_devices
from engine.events import (
    Action,
    BeginTask,
    CancelAsked,
    DeclareFailed,
    DropTask,
    Event,
    Fail,
    Finish,
    Grant,
    LevelChanged,
    Purge,
    QuantumEnded,
    RaiseLevel,
    Report,
    Restart,
    StageGone,
    StageLost,
    StageUp,
    Submitted,
    TaskDropped,
    Tick,
)  # fmt: skip
from engine.footprint import RequestSize, Setting
from engine.journal import Entry, Journal, JournalState
from engine.levels import Levels, LevelsState
from engine.loras import Loras
from engine.memory import EngineMemory, MemoryState, capacity
from engine.models import load_model
from engine.params import ModelParams, SystemParams, UserParams
from engine.plans import Plans
from engine.process import resident_bytes
from engine.records import PHASES_OF
from engine.reload import Reloader
from engine.scheduler import Scheduler
from engine.scheduler_state import SchedulerState
from engine.starting import check_level, limits_of, make_memory, plans_at_start, queues_on_device, settings_of
from engine.states import Descriptors, State
from engine.systemd import Notify
from engine.tasks import PoolState, Task, TaskPool, computed_metadata, task_spec
from engine.trace import Trace
from engine.vault import Origin, Vault, VaultState
from engine.version import VERSION
from hotreload.checkpoint import Checkpoint
from hotreload.given import GivenTensor, pack
from ipc.errors import (
    BadRequest,
    Busy,
    Cancelled,
    EngineError,
    Failure,
    ServerUnavailable,
    StageFailed,
    from_failure,
    to_failure,
)
from ipc.messages import (
    STAGE_OF_COMPONENT,
    STAGE_OF_PHASE,
    Accepted,
    AnyStageReport,
    AttentionChoice,
    Begin,
    DeviceMemory,
    Done,
    Drop,
    Dropped,
    EngineStatus,
    Failed,
    Holding,
    Job,
    LoraInfo,
    MemoryChange,
    MemoryLevel,
    MemoryPlan,
    Phase,
    Progress,
    QuantumDone,
    QuantumDropped,
    QuantumFailed,
    Ready,
    Reload,
    Reloaded,
    Replaced,
    Run,
    Seat,
    Span,
    StageName,
    TaskEvent,
    TaskInfo,
    Traced,
    VersionInfo,
    WeightChange,
    When,
    stage_of,
)  # fmt: skip

log = logging.getLogger(__name__)


IDLE_CHECK = 1.0
"""Seconds without a task after which the shared memory and the accounts are looked through."""


class Opened(NamedTuple):
    """What is found before anything is started."""

    model: ModelParams
    device: str
    dit_devices: tuple[str, ...]
    checkpoint: Checkpoint


def look_up(params: SystemParams) -> Opened:
    """The model, its devices and its files. Raises `BadConfig` and `BadCheckpoint`."""
    model = load_model(params.model)
    device, dit_devices = resolve_devices(params)
    check_level(params, device)
    return Opened(model, device, dit_devices, open_model(model, params))


class SupervisorState(State, frozen=True, kw_only=True):
    """A `Supervisor` that is serving, between two turns of the loop, with no request being looked at."""

    params: SystemParams
    opened: Opened
    pool: PoolState
    scheduler: SchedulerState
    memory: MemoryState
    crew: CrewState
    levels: LevelsState
    journal: JournalState | None
    loras: AdaptersState
    vault: VaultState | None
    started_at: float
    trace: list[Span]
    changes: list[MemoryChange]


class Supervisor:
    """Serves one model. `async with` starts and stops it; every method belongs to the loop that started it.

    Resource handling: owns the stage processes, the shared memory and the journal between `start` and `stop`.
    Error handling: `BadConfig` and `BadCheckpoint` at construction, before anything is started; `BadRequest` and `Busy`
    at `submit`, before anything is allocated; what happens to an accepted task comes as its last event.
    """

    def __init__(
        self, params: SystemParams | None = None, opened: Opened | None = None, vault: Vault | None = None
    ) -> None:
        """`opened`: what the program before this one has found; None: it is looked for now. `vault`: the weights are
        kept there for the next start."""
        self._vault = vault
        self.params = params or SystemParams()
        self.model, self.device, self.dit_devices, self.checkpoint = opened or look_up(self.params)
        self._pool = TaskPool()
        self._loras = Loras(self.model, self._known_jobs, self._keep_adapters)
        self._admitting = 0
        self._outputs: set[str] = set()
        self._background: set[asyncio.Task[Any]] = set()
        self._phase: Literal["new", "open", "draining", "closing", "closed"] = "new"
        self._idle = asyncio.Event()
        self._idle.set()
        self._no_admissions = asyncio.Event()
        self._no_admissions.set()
        self._closed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._started_at = time.time()

    # Life.

    async def __aenter__(self) -> Supervisor:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Make the memory, take up what the journal holds, start the stages. Requests are accepted from now on."""
        assert self._phase == "new", "a supervisor is started once"
        self._loop = asyncio.get_running_loop()
        self._journal = Journal(Path(self.params.state_dir)) if self.params.state_dir is not None else None
        entries = await self._journal.open() if self._journal is not None else []
        adapters = await self._journal.adapters(self.model.name) if self._journal is not None else []
        async with contextlib.AsyncExitStack() as undo:
            if self._journal is not None:
                undo.push_async_callback(self._journal.close)
            self._memory = await make_memory(self.params, self.model, self.device, self.dit_devices)
            undo.callback(self._memory.close)
            undo.callback(self._loras.close)
            settings = self._settings()
            plans = Plans(await asyncio.to_thread(plans_at_start, self.params, self.model, settings))
            plans.limits = limits_of(self.params, self.model, settings)
            self._crew = Crew(
                self.params, self.model, self.checkpoint, self.device, self.dit_devices, self._memory, plans, self
            )
            undo.push_async_callback(self._crew.stop)
            self._reloader = Reloader(self, self._crew)
            self._levels = Levels(self, self._crew, self.params, self.model, settings)
            undo.push_async_callback(self._levels.end)
            self._trace = Trace(self._crew.tokens)
            self._scheduler = Scheduler(capacity(self._crew.tokens), self.params.policy)
            undo.callback(self._give_up)
            if self._vault is not None:
                await self._vault.open(self._crew.placed, self._origins())
            self._phase = "open"
            for seats in self._crew.groups:
                self._crew.start(seats)
            self._levels.start()
            undo.pop_all()
        wanted = [entry.job for entry in entries if entry.model == self.model.name]
        if wanted:
            log.info("taking up %d unfinished requests of the journal", len(wanted))
        self._loras.take_back(adapters, wanted, self._schedule_waiting)
        for entry in entries:
            if entry.model == self.model.name:
                self._take_up(entry)
            else:
                log.warning("request %s in the journal is for %s and waits for it", entry.job.id, entry.model)

    def _settings(self) -> dict[str, Setting]:
        """Of each device, what its memory depends on."""
        queues = self._memory.on_device and queues_on_device(self.params, self.device, self.dit_devices)
        return settings_of(self.params, self.device, self.dit_devices, queues)

    def _give_up(self) -> None:
        """A start that failed: nothing is accepted, nor done about what the stages still report."""
        self._phase = "closed"
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()

    def _origins(self) -> list[Origin]:
        """What is to be read, for which device."""
        crew = self._crew
        return [
            Origin(self.model.name, device, crew.dtype, component)
            for component in self.checkpoint.components.values()
            for device in crew.upkeep.places_of(component.name)
        ]

    async def settle(self) -> None:
        """All stages are up: what they have read is worth keeping for the next start."""
        if self._vault is not None:
            await self._vault.settle(self._crew.placed, self._origins())

    async def ready(self, on_loading: OnLoading = lambda loading: None) -> None:
        """Wait until every stage is loaded; `on_loading` hears how far that is. Raises the error of a stage that cannot
        be."""
        await self._crew.ready(on_loading)

    async def stop(self, drain: bool = False) -> None:
        """Stop accepting; with `drain`, finish what was accepted first. Then end all processes and free all memory.

        Tasks that are not finished end for their listeners with `ServerUnavailable`; they stay in the journal, if there
        is one, and continue at the next start. May be called again, without `drain`, while a drain is under way.
        """
        if self._phase == "new":
            self._phase = "closed"
            self._closed.set()
        elif self._phase == "open":
            self._phase = "draining"
        if drain:
            await self._idle.wait()
        if self._phase == "draining":
            self._phase = "closing"
            self._closing = self._loop.create_task(self._shut_down())
        await self._closed.wait()

    async def _shut_down(self) -> None:
        """The end of every task, process, memory and file; runs to its end whoever waits for it."""
        unfinished = self._pool.unfinished()
        kept = "it stays in the journal and continues at the next start" if self._journal else "submit it again"
        for task in unfinished:
            error = ServerUnavailable(f"the engine stopped before this request was finished; {kept}")
            self._pool.end(task, Failed(id=task.id, error=to_failure(error)))
        self._idle.set()
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._levels.end()
            await self._reloader.end()
            await self._loras.end()
            await self._crew.stop()
            for task in self._pool:
                _unlink(task.job)
            await self._no_admissions.wait()
            if self._background:
                await asyncio.wait(self._background)
        finally:
            self._memory.close()
            self._loras.close()
            if self._journal is not None:
                await self._journal.close()
            self._phase = "closed"
            self._closed.set()

    def kill(self) -> None:
        """Kill the stage processes now; `stop`, under way or to come, then returns at once. For a host in a hurry."""
        if self._phase in ("open", "draining", "closing"):
            self._crew.kill()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    # From one program to the next.

    @property
    def is_serving(self) -> bool:
        """It has been started, and nobody has asked for its end."""
        return self._phase == "open"

    @property
    def is_reloading(self) -> bool:
        """Weights or stages are being exchanged, a LoRA is being read, or a memory level is changing."""
        return self._reloader.is_busy or self._crew.is_replacing or self._loras.is_busy or self._levels.is_changing

    def state(self, fds: Descriptors) -> SupervisorState:
        """All that it has and knows. The journal is closed first: `pause`."""
        assert self._phase == "open", "only a supervisor that serves is handed over"
        return SupervisorState(
            params=self.params, opened=Opened(self.model, self.device, self.dit_devices, self.checkpoint),
            pool=self._pool.state(), scheduler=self._scheduler.state(), memory=self._memory.state_of(fds),
            crew=self._crew.state(fds), levels=self._levels.state(),
            journal=None if self._journal is None else self._journal.state(fds),
            loras=self._loras.adapters.state(fds), vault=None if self._vault is None else self._vault.state(),
            started_at=self._started_at, trace=self._trace.spans(), changes=self._trace.changes(),
        )  # fmt: skip

    @classmethod
    def restored(cls, state: SupervisorState, fds: Descriptors) -> Supervisor:
        """What goes on where the program before this one was; nothing is touched before `resume`. ValueError if
        something does not fit."""
        made = cls(state.params, state.opened)
        made._loop = asyncio.get_running_loop()
        made._started_at = state.started_at
        made._pool.put_back(state.pool)
        unfinished = made._pool.unfinished()
        made._outputs = {task.job.output for task in unfinished}
        if unfinished:
            made._idle.clear()
        if (journal := state.journal) is not None and made.params.state_dir is not None:
            made._journal = Journal(Path(made.params.state_dir), journal, fds)
        else:
            made._journal = None
        made._memory = EngineMemory.restored(state.memory, fds)
        settings = made._settings()
        plans = Plans(dict.fromkeys(settings, MemoryPlan()))
        plans.limits = limits_of(made.params, made.model, settings)
        made._crew = Crew(
            made.params, made.model, made.checkpoint, made.device, made.dit_devices, made._memory, plans, made
        )  # fmt: skip
        made._crew.put_back(state.crew, fds)
        made._levels = Levels(made, made._crew, made.params, made.model, settings)
        made._levels.put_back(state.levels)
        made._loras.adapters.put_back(state.loras, fds)
        if state.vault is not None:
            made._vault = Vault.restored(state.vault, Notify.of_environment(), made._crew.placed)
        made._reloader = Reloader(made, made._crew)
        made._trace = Trace(made._crew.tokens, state.trace, state.changes)
        made._scheduler = Scheduler.restored(state.scheduler)
        made._check_restored(state)
        return made

    def _check_restored(self, state: SupervisorState) -> None:
        """The parts are of one whole."""
        seats = state.scheduler.capacity.devices.keys()
        if seats != self._crew.tokens.keys():
            raise ValueError(f"the scheduler's seats are {', '.join(seats)}; expected {', '.join(self._crew.tokens)}")
        scheduled = {task.spec.id for task in state.scheduler.tasks if not task.ended}
        if scheduled != (known := {task.id for task in self._pool.unfinished()}):
            raise ValueError(f"{len(scheduled ^ known)} tasks are either scheduled or known, but not both")

    async def pause(self) -> None:
        """Before the hand-over: put everything on disk and close the journal; end the processes that read weights, of
        which the next program knows nothing. Requests must be held back."""
        await self._levels.end()
        await self._reloader.end()
        if self._journal is not None:
            await self._journal.pause()

    async def unpause(self) -> None:
        """There is no next program: go on."""
        self._levels.start()
        if self._journal is not None:
            await self._journal.resume()

    async def resume(self) -> None:
        """Go on where the program before this one was. `BadConfig` if the journal cannot be opened."""
        entries = await self._journal.open() if self._journal is not None else []
        self._phase = "open"
        if self._journal is not None and (lost := self._outputs - {entry.job.output for entry in entries}):
            log.error("integrity: %d unfinished requests are not in the journal", len(lost))
        self._crew.resume()
        self._levels.start()
        self._dispatch(Tick())
        if self._idle.is_set():
            self._loop.call_later(IDLE_CHECK, self._check_when_idle)

    # Requests.

    async def submit(self, user: UserParams) -> Accepted:
        """Check a request completely, journal it, queue it. Raises `BadRequest`, `Busy` or `ServerUnavailable`."""
        self._check_accepting()
        self._admitting += 1
        self._no_admissions.clear()
        try:
            if user.lora:
                await self._loras.taken_back()
            job = await asyncio.to_thread(self.check, user)
            if job.output in self._outputs:
                raise BadRequest(f"another unfinished request already writes to {user.output!r}; choose another name")
            with self._loras.adapters.lend(job):
                self._outputs.add(job.output)
                try:
                    return await self._accept(job, user)
                except BaseException:
                    self._outputs.discard(job.output)
                    raise
        finally:
            self._admitting -= 1
            if not self._admitting:
                self._no_admissions.set()

    def check(self, user: UserParams) -> Job:
        """Everything that can be wrong with a request; also before `start`. Raises `BadRequest`.

        Blocks on the file system and on short-lived processes: call it in a thread.
        """
        job = admit(
            user, self.model, self.params, on_gpu=self.device != "cpu", adapters=self._loras.adapters,
            room=None if self._phase == "new" else self._levels.room(),
        )  # fmt: skip
        check_prompt_tokens(job, self.model, Path(self.checkpoint.tokenizer))
        return job

    def events(self, identity: str) -> AsyncIterator[TaskEvent]:
        """The events of a task from its present state to its end. `NotFound` if there is none."""
        return self._pool.get(identity).events()

    async def result(self, identity: str) -> Done:
        """Wait for the end of a task; raises its error if it did not end well."""
        async for event in self.events(identity):
            if isinstance(event, Done):
                return event
            if isinstance(event, Failed):
                raise from_failure(event.error)
        raise AssertionError("a task's events end with Done or Failed")

    async def generate(self, user: UserParams) -> Done:
        """Submit and wait. When the waiting coroutine is cancelled, so is the task."""
        accepted = await self.submit(user)
        try:
            return await self.result(accepted.id)
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):
                await self.cancel(accepted.id)
            raise

    async def cancel(self, identity: str) -> None:
        """Stop a task at its next step; its listeners get `Failed(cancelled)` at once, and no file is left. Too late,
        and without effect, once the writer has the last chunk. `NotFound` if there is no such task."""
        if (task := self._pool.get(identity)).ended is None:
            failure = to_failure(Cancelled("the request was cancelled"))
            if identity in self._scheduler:
                self._dispatch(CancelAsked(identity, failure))
            else:  # it waits for its adapters
                self._end(task, Failed(id=identity, error=failure))

    def tasks(self) -> list[TaskInfo]:
        """Unfinished tasks and the latest finished ones, oldest first."""
        return [task.info() for task in self._pool]

    def status(self) -> EngineStatus:
        unfinished = self._pool.unfinished()
        waiting = sum(task.state == "queued" for task in unfinished)
        return EngineStatus(
            engine=VERSION, model=self.model.name, pid=os.getpid(), uptime_seconds=time.time() - self._started_at,
            accepting=self._phase == "open", waiting=waiting, running=len(unfinished) - waiting,
            finished=self._pool.finished, failed=self._pool.failed, resident_bytes=resident_bytes(os.getpid()),
            stages=self._crew.status(), queues=self._memory.statistics(), outliving=self._crew.outliving,
            spare_pid=self._crew.spare_pid, weights=dict(self._crew.weights.serving),
            loras=merged_loras(self.checkpoint), memory=self._levels.status(),
        )  # fmt: skip

    def memory(self) -> list[Holding]:
        """Who has what of the memory that outlives the stages."""
        return self._crew.placed.holdings() + self._loras.adapters.holdings() + self._memory.holdings()

    def trace(self) -> Traced:
        """When the latest quanta ran, and where; `engine.trace.chrome_trace` makes a file for Perfetto of it."""
        clock = time.time() - time.monotonic()
        return Traced(spans=self._trace.spans(), clock=clock, changes=self._trace.changes())

    # Memory levels.

    async def change_memory(self, level: MemoryLevel, blocks: int | None = None) -> list[DeviceMemory]:
        """Keep so much of the weights on the devices from now on (`MemoryPlan`), or, with auto, as much as fits.
        Requests go on, with the same results. Raises `OutOfMemory`, `BadCheckpoint` or `StageFailed`: what was before
        holds."""
        self._check_open()
        await self.ready()
        await self._levels.change(level, blocks)
        return self._levels.status()

    def memory_levels(self) -> list[DeviceMemory]:
        """How much of the weights each device keeps, and why."""
        return self._levels.status()

    def running_size(self) -> RequestSize | None:
        """The largest of the requests that are being computed."""
        return self._pool.running_size()

    @property
    def is_exchanging_weights(self) -> bool:
        """New weights are on their way to where they are needed."""
        return self._reloader.is_busy

    def handle_level(self, seat: Seat, level: int, top: int) -> None:
        """Tell the scheduler how much a seat leaves on its device, and how much it could."""
        self._dispatch(LevelChanged(seat, level, top))

    def handle_memory_change(self, change: MemoryChange) -> None:
        """Have it in the trace, and tell those who follow requests."""
        self._trace.change(change)
        for task in self._pool.unfinished():
            level = self._level_of(task.id, task.progress.phase)
            if level != task.progress.memory_level:
                task.report(msgspec.structs.replace(task.progress, memory_level=level))

    def _level_of(self, identity: str, phase: Phase | Literal["queued"]) -> int:
        """The memory level at which a task's phase is computed."""
        if phase == "queued":
            return 0
        stage = STAGE_OF_PHASE[phase]
        seat = self._scheduler.seat_of(identity, stage) if identity in self._scheduler else None
        return self._crew.level_of(seat or stage)

    # Weights.

    async def reload(self, asked: Reload) -> Reloaded:
        """Read weights from a directory and give them to new tasks, while the others go on. Nothing has changed when it
        raises: `BadCheckpoint`, `BadConfig`, `OutOfMemory`, `CanaryFailed`, `StageFailed`, `Superseded`."""
        self._check_open()
        await self.ready()
        return await self._reloader.reload(asked)

    async def replace_stages(
        self,
        stages: Sequence[StageName] = (),
        *,
        attention_backend: AttentionChoice | None = None,
        threads: int | None = None,
    ) -> Replaced:
        """Put new processes, with the code now on disk, in the places of these stages' (of all, if none is named), one
        after the other; with another attention backend of the dits, or other threads of dit or vae (0: the default), if
        they are given. Requests in hand go on at their next step, and their metadata says what changed. Raises
        `StageFailed` for a process that cannot take over: its predecessor goes on; `BadConfig` for what cannot be."""
        self._check_open()
        await self.ready()
        return await self._crew.replace(stages, attention_backend, threads)

    async def update_weights(
        self, component: str, tensors: Mapping[str, GivenTensor], when: When = "drain"
    ) -> Reloaded:
        """Give new tasks these weights of a component: all its tensors, by Diffusers' names. They are copied. For
        training loops; raises as `reload`, `BadCheckpoint` for what does not fit."""
        self._check_open()
        fd = await asyncio.to_thread(pack, tensors)
        try:
            return await self.take_weights(component, fd, when)
        finally:
            os.close(fd)

    async def take_weights(self, component: str, fd: int, when: When = "drain") -> Reloaded:
        """`update_weights` with a sealed memfd (`hotreload/given.py`), which stays the caller's."""
        self._check_open()
        await self.ready()
        return await self._reloader.take(component, fd, when)

    async def rollback(self, when: When = "drain") -> Reloaded:
        """Give new tasks the versions that were served before the last reload. `NotFound` if there are none."""
        self._check_open()
        return await self._reloader.rollback(when)

    def versions(self) -> list[VersionInfo]:
        """The versions of weights that are served, were before, or are still used."""
        return self._reloader.versions()

    async def add_lora(self, name: str, *files: str) -> LoraInfo:
        """Read a LoRA file, or the high-noise and the low-noise expert's, and offer it to requests as `name`. Nothing
        has changed when it raises: `BadConfig`, `BadCheckpoint`, `OutOfMemory`."""
        self._check_open()
        return await self._loras.add(name, files)

    async def remove_lora(self, name: str) -> None:
        """Take an adapter away from requests to come; those that were accepted are finished with it. Raises
        `NotFound`."""
        self._check_open()
        await self._loras.remove(name)

    def loras(self) -> list[LoraInfo]:
        """The adapters that requests can name, and those that unfinished requests still use."""
        return self._loras.infos([task.job for task in self._pool.unfinished()])

    async def _keep_adapters(self, adapters: list[KeptAdapter]) -> None:
        if self._journal is not None:
            await self._journal.keep_adapters(self.model.name, adapters)

    def _known_jobs(self) -> list[Job]:
        """Of each task that a stage may still know."""
        return [task.job for task in self._pool if task.ended is None or task.id in self._scheduler]

    def weights_in_use(self) -> list[frozenset[tuple[str, str]]]:
        """Of each task that a stage may still know: (component, content hash)."""
        return [task.versions for task in self._pool if task.ended is None or task.id in self._scheduler]

    async def make_room(self) -> bool:
        return await self._levels.make_room()

    def places_for(self, components: Sequence[str]) -> dict[str, list[str]]:
        """Where new versions of these are to be placed: where they are computed with, and, if there is room, where the
        level may need them."""
        self._levels.copies.make_way(components)
        return {name: self._crew.upkeep.places_of(name) for name in components}

    def change_running(self, weights: dict[str, str]) -> None:
        """Have running tasks change to these versions: a transformer between two steps, another component where nothing
        was computed with it yet."""
        for task in self._pool.unfinished():
            for component, content in weights.items():
                if task.weights.get(component) not in (None, content):
                    self._change(task, component, content)

    def _change(self, task: Task, component: str, content: str) -> None:
        stage = STAGE_OF_COMPONENT[component]
        step = max(self._scheduler.granted(task.id, phase) for phase in PHASES_OF[stage])
        if not step:
            task.weights[component] = content
        elif component in EXPERTS and step < task.spec.denoise:
            task.changes.append(WeightChange(step=step, component=component, content=content))
        else:
            return
        if (seat := self._scheduler.seat_of(task.id, stage)) is not None:
            self._begin(seat, task)

    def _begin(self, seat: Seat, task: Task) -> None:
        """Tell a stage of a task; with what it needs for the task's adapters, if it is a dit."""
        stage = stage_of(seat)
        lent = self._loras.adapters.of(task.job) if stage == "dit" else []
        begin = Begin(stage=stage, job=self._described(task), adapters=[version for version, _ in lent])
        self._crew.send(seat, begin, [fd for _, fd in lent])

    async def try_weights(self, user: UserParams, weights: dict[str, str]) -> str:
        """Make a video with these versions in the place of those that are served; its path. Not journalled."""
        job = await asyncio.to_thread(self.check, user)
        if job.output in self._outputs:
            raise BadRequest(f"another unfinished request already writes to {user.output!r}; choose another name")
        params = resolved_params(user, job, self.model)
        entry = Entry(
            model=self.model.name,
            job=job,
            params=params,
            submitted_at=time.time(),
            priority=user.priority,
            deadline_at=None,
        )
        self._check_open()
        self._take_up(entry, {**self._crew.weights.serving, **weights})
        try:
            return (await self.result(job.id)).path
        except asyncio.CancelledError:
            await self.cancel(job.id)
            raise

    def check_integrity(self) -> list[str]:
        """Problems in the shared memory or in the scheduler's accounts; empty when all is well."""
        return self._memory.check_integrity() + self._scheduler.check()

    def _check_accepting(self) -> None:
        self._check_open()
        unfinished = len(self._pool.unfinished()) + self._admitting
        if unfinished >= self.params.max_queue:
            wait = self._scheduler.retry_after()
            raise Busy(f"{unfinished} requests are waiting or running, which is the limit; try again", wait)

    def _check_open(self) -> None:
        if self._phase != "open":
            raise ServerUnavailable("the engine is stopping and accepts no more requests")

    async def _accept(self, job: Job, user: UserParams) -> Accepted:
        now = time.time()
        entry = Entry(
            model=self.model.name, job=job, params=resolved_params(user, job, self.model), submitted_at=now,
            priority=user.priority, deadline_at=now + user.deadline if user.deadline is not None else None,
        )  # fmt: skip
        self._check_open()
        if self._journal is not None:
            await self._write_down(self._journal, entry)
        self._check_open()
        position = len(self._pool.unfinished())
        self._take_up(entry)
        return Accepted(id=job.id, position=position, params=entry.params)

    async def _write_down(self, journal: Journal, entry: Entry) -> None:
        """Journal a request; if it will not be accepted after all, take it out again."""
        adding = self._loop.create_task(journal.add(entry))
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            self._in_background(journal.withdraw(entry.job.id, adding))
            raise
        if self._phase != "open":
            await journal.remove(entry.job.id)

    def _take_up(self, entry: Entry, weights: dict[str, str] | None = None) -> None:
        """A new task, or one from the journal; to be computed with these `weights`, or those that are served when it
        begins."""
        job = entry.job
        self._outputs.add(job.output)
        self._idle.clear()
        deadline = None
        if entry.deadline_at is not None:
            deadline = self._loop.time() + entry.deadline_at - time.time()
        spec = task_spec(job, self.model, entry.priority, deadline, self._crew.on_gpu)
        task = Task(job, spec, entry.params, entry.submitted_at)
        task.weights = weights or {}
        self._pool.add(task)
        if not (self._loras.is_taking_back and self._loras.adapters.missing(job)):
            self._schedule(task)

    def _schedule(self, task: Task) -> None:
        """To be run from now on; or it fails, if its adapters are lost."""
        if gone := self._loras.adapters.missing(task.job):
            self._end(task, Failed(id=task.id, error=to_failure(self._loras.lost(gone[0]))))
        else:
            self._dispatch(Submitted(task.spec))

    def _schedule_waiting(self) -> None:
        """The adapters are there that an earlier run has kept, or are lost."""
        for task in self._pool.unfinished():
            if task.id not in self._scheduler:
                self._schedule(task)
        self._loras.let_go()

    # Events and actions.

    def _dispatch(self, event: Event) -> None:
        """Tell the scheduler, do what it says, wake up when it wants to."""
        if self._phase not in ("open", "draining"):
            return
        now = self._loop.time()
        for action in self._scheduler.on(event, now):
            self._carry_out(action)
        if self._timer is not None:
            self._timer.cancel()
        wakeup = self._scheduler.next_wakeup(now)
        self._timer = None if wakeup is None else self._loop.call_at(wakeup, self._dispatch, Tick())

    def _carry_out(self, action: Action) -> None:
        match action:
            case Grant(seat, identity, phase, index):
                task = self._pool.get(identity)
                last = phase == "write" and index == task.spec.chunks - 1
                run = Run(id=identity, phase=phase, index=index, seconds=dict(task.seconds) if last else None)
                self._trace.grant(seat, identity, phase, index, self._loop.time())
                self._crew.run(seat, run)
            case BeginTask(seat, identity):
                task = self._pool.get(identity)
                # Later ones for what was not loaded yet: the first stages are up before the last.
                task.weights = {**self._crew.weights.serving, **task.weights}
                self._memory.begin(identity, stage_of(seat))
                self._begin(seat, task)
            case DropTask(seat, identity):
                self._crew.send(seat, Drop(id=identity, stage=stage_of(seat)))
            case Report(identity, phase, step, steps, seconds_left):
                self.handle_progress(identity, phase, step, steps, seconds_left)
            case Finish(identity):
                task = self._pool.get(identity)
                self._end(task, Done(id=identity, path=task.job.output, metadata=task.metadata))
            case Fail(identity, error):
                if (failed := self._pool.find(identity)) is not None:
                    self._end(failed, Failed(id=identity, error=error))
            case Purge(stage, identity):
                self._memory.purge(identity, stage)
            case Restart(seat, delay):
                self._crew.restart(seat, delay)
            case RaiseLevel(seat, level):
                self._levels.raise_above(seat, level)
            case DeclareFailed(seat, error):
                self._crew.declare_failed(seat, error)

    def handle_progress(self, identity: str, phase: Any, step: int, steps: int, seconds_left: float | None) -> None:
        """Pass the scheduler's view of a task on to its listeners."""
        if (task := self._pool.find(identity)) is not None:
            level = self._level_of(identity, phase)
            task.report(
                Progress(
                    id=identity, phase=phase, step=step, steps=steps, seconds_left=seconds_left, memory_level=level
                )
            )  # fmt: skip

    def handle_report(self, epoch: int, seat: Seat, report: AnyStageReport) -> None:
        """What a stage process said, as an event."""
        if isinstance(report, QuantumDone | QuantumFailed | QuantumDropped):
            self._trace.answer(seat, report)
        match report:
            case QuantumDone(id=identity, phase=phase, index=index, seconds=seconds, metadata=metadata, parts=parts):
                if (task := self._pool.find(identity)) is not None:
                    task.seconds[phase] += seconds
                    self._note_computed(task, seat, phase, index)
                    if metadata is not None:
                        task.metadata = metadata
                self._dispatch(QuantumEnded(seat, epoch, identity, phase, index, seconds, parts=parts))
            case QuantumFailed(id=identity, phase=phase, index=index, error=error):
                self._dispatch(QuantumEnded(seat, epoch, identity, phase, index, error=error))
            case QuantumDropped(id=identity, phase=phase, index=index):
                self._dispatch(QuantumEnded(seat, epoch, identity, phase, index, dropped=True))
            case Dropped(id=identity):
                self._dispatch(TaskDropped(seat, epoch, identity))
                self._reloader.let_go()
                self._loras.let_go()
            case Ready():
                self._dispatch(StageUp(seat, epoch))

    def _note_computed(self, task: Task, seat: Seat, phase: Phase, index: int) -> None:
        """The writer, if it knows the task already, hears of a change."""
        if task.note_computed(phase, index, self._crew.computes(seat)):
            log.info("%s is computed with other settings from %s %d on", task.id, phase, index)
            if task.id in self._scheduler and (writer := self._scheduler.seat_of(task.id, "writer")) is not None:
                self._begin(writer, task)

    def handle_lost(self, epoch: int, seat: Seat, outside: bool, asked: bool) -> None:
        """The process at a seat is dead, reaped, and its slots are given back."""
        self._trace.lose(seat)
        self._dispatch(StageLost(seat, epoch, outside, asked))
        self._reloader.let_go()

    def handle_gone(self, seat: Seat, error: Failure) -> None:
        """The process at a seat cannot be started."""
        self._dispatch(StageGone(seat, error))

    def _end(self, task: Task, event: Done | Failed) -> None:
        self._pool.end(task, event)
        why = f": {event.error.message}" if isinstance(event, Failed) else ""
        log.info("%s %s after %.1f s%s", task.id, task.state, time.time() - task.submitted_at, why)
        self._outputs.discard(task.job.output)
        if isinstance(event, Failed):
            _unlink(task.job)
        else:
            self._crew.weights.served.update(task.versions)
        if self._journal is not None and not _is_ours(event):
            self._in_background(self._journal.remove(task.id))
        self._loras.let_go()
        if not self._pool.unfinished():
            self._idle.set()
            self._loop.call_later(IDLE_CHECK, self._check_when_idle)

    def _check_when_idle(self) -> None:
        """With nothing to do, every account must be in order. What is not is a defect, and is not mended here."""
        if self._phase != "open" or not self._idle.is_set():
            return
        if len(self._scheduler):  # a stage is still dropping the last task
            self._loop.call_later(IDLE_CHECK, self._check_when_idle)
            return
        for problem in self.check_integrity():
            log.error("integrity: %s", problem)

    def _described(self, task: Task) -> Job:
        """The job with the metadata that goes into the file; the weights are known once their stage is up."""
        job = task.job
        metadata = {
            "engine": VERSION, "model": self.model.name, "task": task.id, "parameters": task.params, "seed": job.seed,
            "weights": task.weights, "device": self.device, **computed_metadata(task, self._crew.versions),
        } | lora_metadata(self.checkpoint) | adapter_metadata(job)  # fmt: skip
        if task.changes:
            metadata["weight_changes"] = msgspec.to_builtins(task.changes)
        if job.init is not None:
            metadata["init"] = {"file": os.path.basename(job.init), "as": job.init_as}
        return msgspec.structs.replace(job, metadata=metadata, weights=task.weights, changes=task.changes)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_ended)

    def _background_ended(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s; tried again with the next request", error)


def _is_ours(event: Done | Failed) -> bool:
    """The request failed because this engine could not run it: the journal keeps it for the next start."""
    return isinstance(event, Failed) and event.error.code == StageFailed.code


def _unlink(job: Job) -> None:
    """Remove what a dead writer may have left of it."""
    for path in job.temporaries:
        with contextlib.suppress(OSError):
            os.unlink(path)
