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
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from engine.adapters import AdaptersState, KeptAdapter
from engine.admission import admit, check_prompt_tokens
from engine.checkpoint import merged_loras
from engine.crew import Crew, CrewState, OnLoading
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
    Placing,
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
    TokensChanged,
)  # fmt: skip
from engine.footprint import RequestSize, Setting
from engine.journal import Journal, JournalState
from engine.left import Left, take_stock
from engine.levels import Levels, LevelsState
from engine.listing import Row
from engine.loras import Loras
from engine.memory import EngineMemory, MemoryState, capacity
from engine.params import SystemParams, UserParams
from engine.plans import Plans
from engine.reload import Reloader
from engine.requests import Requests
from engine.resident import Resident
from engine.running import RunningTasks
from engine.scheduler import Scheduler
from engine.scheduler_state import SchedulerState
from engine.settings import Change
from engine.starting import Opened, limits_of, look_up, make_memory, plans_at_start, queues_on_device, settings_of
from engine.states import Descriptors, State
from engine.systemd import Notify
from engine.tasks import PoolState, Task, TaskPool
from engine.trace import Trace
from engine.vault import Vault, VaultState
from engine.version import VERSION
from hotreload.given import GivenTensor, pack
from ipc.errors import Cancelled, EngineError, Failure, ServerUnavailable, to_failure
from ipc.messages.client import Reload, When
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import AttentionChoice, MemoryLevel, Placement, Seat, StageName, stage_of
from ipc.messages.reports import AnyStageReport, Dropped, PlacingFile, QuantumDone, QuantumDropped, QuantumFailed, Ready
from ipc.messages.server import Accepted, Done, Failed, Reloaded, Replaced, TaskEvent, Traced
from ipc.messages.status import DeviceMemory, EngineStatus, Holding, LoraInfo, MemoryChange, Span, TaskInfo, VersionInfo

log = logging.getLogger(__name__)


IDLE_CHECK = 1.0
"""Seconds without a task after which the shared memory and the accounts are looked through."""


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
        self._loras = Loras(self.model, self.params.checkpoint_root, lambda: self._running.jobs(), self._keep_adapters)
        self._phase: Literal["new", "open", "draining", "closing", "closed"] = "new"
        self._closed = asyncio.Event()
        self._handing_over = asyncio.Lock()
        """From `pause` to `unpause`; and by the end, which neither waits within nor is disturbed by one."""
        self._timer: asyncio.TimerHandle | None = None
        self._started_at = time.time()
        self._resident = Resident(os.getpid())

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
        left = Left()
        async with contextlib.AsyncExitStack() as undo:
            if self._journal is not None:
                undo.push_async_callback(self._journal.close)
                left = await take_stock(self._journal, self.model)
            self._memory = await make_memory(self.params, self.model, self.device, self.dit_devices)
            undo.callback(self._memory.close)
            undo.callback(self._loras.close)
            settings = self._settings()
            self._crew = self._make_crew(
                settings, await asyncio.to_thread(plans_at_start, self.params, self.model, settings)
            )
            undo.push_async_callback(self._crew.stop)
            self._scheduler = Scheduler(capacity(self._crew.tokens), self.params.policy)
            self._trace = Trace(self._crew.tokens)
            self._make_others(settings)
            undo.push_async_callback(self._levels.end)
            undo.callback(self._give_up)
            if self._vault is not None:
                await self._vault.open(self._crew.placed, self._crew.origins())
            self._phase = "open"
            for seats in self._crew.groups:
                self._crew.start(seats)
            self._levels.start()
            undo.pop_all()
        self._requests.take_back(left)

    def _make_crew(self, settings: Mapping[str, Setting], held: Mapping[str, MemoryPlan]) -> Crew:
        """The stages, none of them started; each device keeps to the plan that it has in `held`."""
        plans = Plans(held)
        plans.limits = limits_of(self.params, self.model, settings)
        return Crew(self.params, self.model, self.checkpoint, self.device, self.dit_devices, self._memory, plans, self)

    def _make_others(self, settings: Mapping[str, Setting]) -> None:
        """Those that work with crew and scheduler."""
        crew = self._crew
        self._running = RunningTasks(
            self.model, self.checkpoint, self._pool, self._scheduler, crew, self._loras.adapters
        )  # fmt: skip
        self._requests = Requests(
            self, self.params, self.model, self._pool, self._scheduler, self._journal, self._loras, crew.on_gpu
        )
        self._levels = Levels(self, crew, self.params, self.model, settings)
        self._reloader = Reloader(self.model, self.params, crew, self._levels, self._running, self.try_weights)

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

    async def settle(self) -> None:
        """All stages are up: what they have read is worth keeping for the next start."""
        if self._vault is not None:
            await self._vault.settle(self._crew.placed, self._crew.origins())

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
        if drain and self._phase == "draining":
            await self._requests.idle.wait()
        if self._phase == "draining":
            self._phase = "closing"
            self._closing = self._loop.create_task(self._shut_down())
        await self._closed.wait()

    async def _shut_down(self) -> None:
        """The end of every task, process, memory and file; runs to its end whoever waits for it."""
        async with self._handing_over:
            self._requests.abandon()
            if self._timer is not None:
                self._timer.cancel()
            try:
                await self._levels.end()
                await self._reloader.end()
                await self._loras.end()
                await self._crew.stop()
                await self._requests.close()
            finally:
                self._memory.close()
                self._loras.close()
                if self._journal is not None:
                    await self._journal.close(forget=True)
                self._phase = "closed"
                self._closed.set()

    def kill(self) -> None:
        """Kill the stage processes now; `stop`, under way or to come, then returns at once. For a host in a hurry."""
        if self._phase in ("open", "draining", "closing"):
            self._crew.kill()

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
        if (journal := state.journal) is not None and made.params.state_dir is not None:
            made._journal = Journal(Path(made.params.state_dir), journal, fds)
        else:
            made._journal = None
        made._memory = EngineMemory.restored(state.memory, fds)
        settings = made._settings()
        made._crew = made._make_crew(settings, dict.fromkeys(settings, MemoryPlan()))
        made._crew.put_back(state.crew, fds)
        made._loras.adapters.put_back(state.loras, fds)
        if state.vault is not None:
            made._vault = Vault.restored(state.vault, Notify.of_environment(), made._crew.placed)
        made._scheduler = Scheduler.restored(state.scheduler)
        made._trace = Trace(made._crew.tokens, state.trace, state.changes)
        made._make_others(settings)
        made._levels.put_back(state.levels)
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
        which the next program knows nothing. Requests must be held back. Raises `ServerUnavailable` if somebody has
        asked for the end, which from here on waits for `unpause`."""
        await self._handing_over.acquire()
        if not self.is_serving:
            self._handing_over.release()
            self.check_serving()
        try:
            await self._levels.end()
            await self._reloader.end()
            if self._journal is not None:
                await self._journal.pause()
        except BaseException:
            await self.unpause()
            raise

    async def unpause(self) -> None:
        """There is no next program: go on."""
        try:
            self._levels.start()
            if self._journal is not None and self._journal.is_paused:
                await self._journal.resume()
        finally:
            self._handing_over.release()

    async def resume(self) -> None:
        """Go on where the program before this one was. `BadConfig` if the journal cannot be opened."""
        entries = await self._journal.open() if self._journal is not None else []
        self._phase = "open"
        if self._journal is not None:
            lost = {task.id for task in self._pool.unfinished()} - {entry.job.id for entry in entries}
            if lost:
                log.error("integrity: %d unfinished requests are not in the journal", len(lost))
        self._requests.resume()
        self._crew.resume()
        self._levels.start()
        self._dispatch(Tick())
        if self._requests.idle.is_set():
            self.handle_idle()

    # Requests.

    async def submit(self, user: UserParams) -> Accepted:
        """Check a request completely, journal it, queue it. Raises `BadRequest`, `Busy` or `ServerUnavailable`."""
        self.check_serving()
        return await self._requests.submit(user)

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
        return await self._pool.get(identity).result()

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
        """Stop a task at its next step; its listeners get `Failed(cancelled)` as soon as the journal has it, which is
        waited for, and no file is left. Too late, and without effect, once the writer has the last chunk. `NotFound` if
        there is no such task."""
        if (task := self._pool.get(identity)).ended is None:
            failure = to_failure(Cancelled("the request was cancelled"))
            if identity in self._scheduler:
                self._dispatch(CancelAsked(identity, failure))
            else:  # it waits for its adapters
                self._requests.end(task, Failed(id=identity, error=failure))
        if self._pool.find(identity) is None:  # it has ended
            await task.until_told()

    def tasks(self) -> list[TaskInfo]:
        """Unfinished tasks and the latest finished ones, oldest first."""
        return [task.info() for task in self._pool]

    def rows(self) -> list[Row]:
        """The same as they go on the wire."""
        return [task.row() for task in self._pool]

    def status(self) -> EngineStatus:
        unfinished = self._pool.unfinished() + self._pool.ending()
        waiting = sum(task.state == "queued" for task in unfinished)
        return EngineStatus(
            engine=VERSION, model=self.model.name, pid=os.getpid(), uptime_seconds=time.time() - self._started_at,
            accepting=self._phase == "open", waiting=waiting, running=len(unfinished) - waiting,
            finished=self._pool.finished, failed=self._pool.failed, resident_bytes=self._resident.bytes(),
            stages=self._crew.status(), queues=self._memory.statistics(), outliving=self._crew.outliving,
            spare_pid=self._crew.spare_pid, forks_pid=self._crew.forks_pid, weights=dict(self._crew.weights.serving),
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
        Requests go on, with the same results. Raises `BadRequest` for blocks that there are not, `OutOfMemory`,
        `BadCheckpoint`, `StageFailed`, or `Busy` while processes are long in mapping new weights: what was before
        holds."""
        self.check_serving()
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
        self._running.report_levels()

    # Weights.

    async def reload(self, asked: Reload) -> Reloaded:
        """Read weights from a directory and give them to new tasks, while the others go on. Nothing has changed when it
        raises: `BadCheckpoint`, `BadConfig`, `OutOfMemory`, `CanaryFailed`, `StageFailed`, `Superseded`."""
        self.check_serving()
        await self.ready()
        return await self._reloader.reload(asked)

    async def replace_stages(
        self,
        stages: Sequence[StageName] = (),
        *,
        attention_backend: AttentionChoice | None = None,
        threads: int | None = None,
        placement: Placement | None = None,
    ) -> Replaced:
        """Put new processes, with the code now on disk, in the places of these stages' (of all, if none is named), one
        after the other; with another attention backend of the dits, or other threads of dit or vae (0: the default), if
        they are given. With another `placement` all are replaced at once, when the last of the old ones has left.
        Requests in hand go on at their next step, and their metadata says what changed. Raises
        `StageFailed` for a process that cannot take over: its predecessor goes on; `BadConfig` for what cannot be."""
        self.check_serving()
        await self.ready()
        return await self._crew.replace(Change(stages, attention_backend, threads, placement))

    async def update_weights(
        self, component: str, tensors: Mapping[str, GivenTensor], when: When = "drain"
    ) -> Reloaded:
        """Give new tasks these weights of a component: all its tensors, by Diffusers' names. They are copied. For
        training loops; raises as `reload`, `BadCheckpoint` for what does not fit."""
        self.check_serving()
        fd = await asyncio.to_thread(pack, tensors)
        try:
            return await self.take_weights(component, fd, when)
        finally:
            os.close(fd)

    async def take_weights(self, component: str, fd: int, when: When = "drain") -> Reloaded:
        """`update_weights` with a sealed memfd (`hotreload/given.py`), which stays the caller's."""
        self.check_serving()
        await self.ready()
        return await self._reloader.take(component, fd, when)

    async def rollback(self, when: When = "drain") -> Reloaded:
        """Give new tasks the versions that were served before the last reload. `NotFound` if there are none."""
        self.check_serving()
        return await self._reloader.rollback(when)

    def versions(self) -> list[VersionInfo]:
        """The versions of weights that are served, were before, or are still used."""
        return self._reloader.versions()

    async def add_lora(self, name: str, *files: str) -> LoraInfo:
        """Read a LoRA file, or the high-noise and the low-noise expert's, and offer it to requests as `name`. Nothing
        has changed when it raises: `BadConfig`, `BadCheckpoint`, `OutOfMemory`."""
        self.check_serving()
        return await self._loras.add(name, files)

    async def remove_lora(self, name: str) -> None:
        """Take an adapter away from requests to come; those that were accepted are finished with it. Raises
        `NotFound`."""
        self.check_serving()
        await self._loras.remove(name)

    def loras(self) -> list[LoraInfo]:
        """The adapters that requests can name, and those that unfinished requests still use."""
        return self._loras.infos([task.job for task in self._pool.unfinished()])

    async def _keep_adapters(self, adapters: list[KeptAdapter]) -> None:
        if self._journal is not None:
            await self._journal.keep_adapters(self.model.name, adapters)

    async def try_weights(self, user: UserParams, weights: dict[str, str]) -> str:
        """Make a video with these versions in the place of those that are served; its path. Not journalled."""
        job = await asyncio.to_thread(self.check, user)
        self._requests.take_trial(user, job, {**self._crew.weights.serving, **weights})
        try:
            return (await self.result(job.id)).path
        except asyncio.CancelledError:
            await self.cancel(job.id)
            raise

    def check_integrity(self) -> list[str]:
        """Problems in the shared memory or in the scheduler's accounts; empty when all is well."""
        return self._memory.check_integrity() + self._scheduler.check()

    def check_serving(self) -> None:
        """`ServerUnavailable` if nothing is asked of it yet, or any more."""
        if not self.is_serving:
            raise ServerUnavailable("the engine is stopping and accepts no more requests")

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
                self._trace.grant(seat, identity, phase, index, self._loop.time())
                self._running.run(seat, self._pool.get(identity), phase, index)
            case BeginTask(seat, identity):
                self._memory.begin(identity, stage_of(seat))
                self._running.begin(seat, self._pool.get(identity))
            case DropTask(seat, identity):
                self._running.drop(seat, identity)
            case Report():
                self._running.report(action)
            case Finish(identity):
                task = self._pool.get(identity)
                self._crew.weights.served.update(task.versions)
                self._requests.end(task, Done(id=identity, path=task.job.output, metadata=task.metadata))
            case Fail(identity, error):
                if (failed := self._pool.find(identity)) is not None:
                    self._requests.end(failed, Failed(id=identity, error=error))
            case Purge(stage, identity):
                self._memory.purge(identity, stage)
            case Restart(seat, delay):
                self._crew.restart(seat, delay)
            case RaiseLevel(seat, level):
                self._levels.raise_above(seat, level)
            case DeclareFailed(seat, error):
                self._crew.declare_failed(seat, error)

    def handle_report(self, epoch: int, seat: Seat, report: AnyStageReport) -> None:
        """What a stage process said, as an event."""
        if isinstance(report, QuantumDone | QuantumFailed | QuantumDropped):
            self._trace.answer(seat, report)
        match report:
            case QuantumDone(id=identity, phase=phase, index=index, seconds=seconds, parts=parts):
                self._running.note_done(seat, report)
                self._dispatch(QuantumEnded(seat, epoch, identity, phase, index, seconds, parts=parts))
            case QuantumFailed(id=identity, phase=phase, index=index, error=error):
                self._dispatch(QuantumEnded(seat, epoch, identity, phase, index, error=error))
            case QuantumDropped(id=identity, phase=phase, index=index):
                self._dispatch(QuantumEnded(seat, epoch, identity, phase, index, dropped=True))
            case PlacingFile(id=identity):
                self._dispatch(Placing(seat, epoch, identity))
            case Dropped(id=identity):
                self._dispatch(TaskDropped(seat, epoch, identity))
                self._reloader.let_go()
                self._loras.let_go()
            case Ready():
                self._dispatch(StageUp(seat, epoch))

    def handle_lost(self, epoch: int, seat: Seat, outside: bool, asked: bool) -> None:
        """The process at a seat is dead, reaped, and its slots are given back."""
        self._trace.lose(seat)
        self._dispatch(StageLost(seat, epoch, outside, asked))
        self._reloader.let_go()

    def handle_gone(self, seat: Seat, error: Failure) -> None:
        """The process at a seat cannot be started."""
        self._dispatch(StageGone(seat, error))

    def handle_moved(self, placement: Placement) -> None:
        """Other stages share a process than before; none is up."""
        self.params = msgspec.structs.replace(self.params, placement=placement)
        self._trace.move(self._crew.tokens)
        settings = self._settings()
        self._crew.plans.limits = limits_of(self.params, self.model, settings)
        self._levels.settle(settings)
        self._dispatch(TokensChanged(self._crew.tokens))

    def handle_accepted(self, task: Task) -> None:
        """Tell the scheduler of a task that may be computed from now on."""
        self._dispatch(Submitted(task.spec))

    def handle_idle(self) -> None:
        """No request is unfinished."""
        self._loop.call_later(IDLE_CHECK, self._check_when_idle)

    def _check_when_idle(self) -> None:
        """With nothing to do, every account must be in order. What is not is a defect, and is not mended here."""
        if not self.is_serving or not self._requests.idle.is_set():
            return
        if len(self._scheduler):  # a stage is still dropping the last task
            self.handle_idle()
            return
        for problem in self.check_integrity():
            log.error("integrity: %s", problem)
