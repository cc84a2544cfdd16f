"""The stage processes of one engine: starting, restarting, watching and ending them, and what they say.

Each has its seats (`engine/posts.py`): the names of its stages, or "dit:1", "dit:2", ... for further dits. Restart
policy is the scheduler's; this only carries it out.

Resource handling: owns the `StageProcess`es, and the spare (`engine/spare.py`), between `start` and `stop`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from engine.checkpoint import file_bytes
from engine.devices import compute_tokens, devices_of_seats
from engine.forks import Forks
from engine.memory import EngineMemory
from engine.models import checkpoint_directory
from engine.params import ModelParams, SystemParams
from engine.plans import Plans, PlansState
from engine.posts import Changes, Post, Posts, PostState, groups_of
from engine.process import Body, BodyState, ProcessState, StageProcess, encode_start
from engine.settings import Change, Settings, computed_with
from engine.spare import Spare
from engine.start_messages import StartMessages
from engine.states import Descriptors, State
from engine.takeover import Takeover
from engine.upkeep import Upkeep
from engine.vault import Origin
from engine.watch import Watch
from engine.weights import PlacedState, Versions, VersionsState, WeightStore
from hotreload.checkpoint import Checkpoint
from ipc.channel import close_fds
from ipc.errors import BadConfig, Failure, OutOfMemory, StageFailed, from_failure
from ipc.lacking import PASSING, why_not_started
from ipc.messages.names import STAGE_OF_COMPONENT, STAGE_OF_PHASE, Placement, Seat, stage_of
from ipc.messages.reports import (
    Adopted,
    AnyStageReport,
    Chosen,
    Dropped,
    Loading,
    MemorySet,
    Placed,
    PlacingFile,
    QuantumDone,
    QuantumDropped,
    QuantumFailed,
    Ready,
    StartFailed,
    Unlocked,
    VaeChosen,
)
from ipc.messages.server import Replaced
from ipc.messages.stage import AnyStageProcessMessage, Run, Stop
from ipc.messages.status import LoadProgress, StageStatus

log = logging.getLogger(__name__)

STOP_GRACE = 5.0
"""Seconds a process gets to finish the quantum in hand before it is killed."""


OnLoading = Callable[[Sequence[LoadProgress]], None]
"""Hears of all components whenever more of one of them is loaded."""


class Owner(Protocol):
    """Who hears of the crew: the supervisor."""

    def handle_report(self, epoch: int, seat: Seat, report: AnyStageReport) -> None: ...
    def handle_lost(self, epoch: int, seat: Seat, outside: bool, asked: bool) -> None: ...
    def handle_gone(self, seat: Seat, error: Failure) -> None: ...
    def handle_moved(self, placement: Placement) -> None: ...


class CrewState(State, frozen=True, kw_only=True):
    """A `Crew` that is replacing nothing. `pending`: seats to be started again, and the seconds until then."""

    posts: list[PostState]
    processes: list[ProcessState]
    placed: list[PlacedState]
    weights: VersionsState
    source: str
    versions: dict[str, str]
    loading: list[LoadProgress]
    epoch: int
    forks: BodyState | None
    spare: BodyState | None
    pending: list[tuple[tuple[Seat, ...], float]]
    held_back: list[tuple[Seat, ...]]
    chosen: Chosen | None
    vae_chosen: VaeChosen | None
    plans: PlansState
    settings: Settings


class Crew:
    """All stage processes."""

    def __init__(
        self,
        params: SystemParams,
        model: ModelParams,
        checkpoint: Checkpoint,
        device: str,
        dit_devices: tuple[str, ...],
        memory: EngineMemory,
        plans: Plans,
        owner: Owner,
    ) -> None:
        """`device`: of text and vae; `dit_devices`: of each dit; both from `resolve_devices`. `plans`: of all these."""
        self._params, self._model, self._checkpoint = params, model, checkpoint
        self._memory = memory
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.device = device
        self.on_gpu = self.device.startswith("cuda")
        devices = devices_of_seats(device, dit_devices)
        self.tokens = compute_tokens(params, devices)
        """The compute token each seat needs, for the scheduler."""
        self._posts = Posts(devices, params.placement)
        self.placed = WeightStore()
        self.plans = plans
        self.weights = Versions()
        self._source = checkpoint_directory(model, params.checkpoint).name
        self.versions: dict[str, str] = {}
        self._starts = StartMessages(
            params, model, checkpoint, device, memory, self._posts, self.placed, self.weights, plans
        )
        self.dtype, self.outliving = self._starts.dtype, self._starts.outliving
        self._loading = {
            name: LoadProgress(component=name, done=0, total=file_bytes(component))
            for name, component in checkpoint.components.items()
        }
        self._epoch = 0
        # On a GPU every process is a fresh interpreter: that is what was tried there.
        self._forks = Forks(not self.on_gpu, params.start_deadline, self._forks_settled)
        self._spare = Spare(params.warm_spare, device, self._forks.body)
        self._pending: dict[tuple[Seat, ...], asyncio.TimerHandle] = {}
        self._takeover = Takeover(params, self._posts, self._starts, lambda: self.ready(lambda loading: None))
        self._held_back: list[tuple[Seat, ...]] = []
        """To be started when what they would read is placed."""
        self._left_to_start: list[tuple[tuple[Seat, ...], float]] = []
        """By `resume`, with the seconds until then."""
        self._stopping = False
        self._changes = Changes()
        self.upkeep = Upkeep(self._posts, self.placed, plans, self._changes, params.stage_deadline)
        self._watch = Watch(self._posts.processes, params.start_deadline, params.stage_deadline)
        self._watch.begin()

    # Life.

    @property
    def groups(self) -> list[tuple[Seat, ...]]:
        """The seats of each process."""
        return self._posts.groups

    def start(self, seats: tuple[Seat, ...]) -> None:
        """Spawn the process of these seats, now or when there is what it is made from and a sibling has placed their
        weights; a report or `handle_lost` follows. ValueError, at once, for more than a process can be told."""
        self._pending.pop(seats, None)
        if self._stopping:
            return
        for post in self._posts.of(seats):
            post.state, post.error = "starting", None
        if not self._takeover.has(seats):
            self._forks.keep(settled=False)
        if self._must_wait_for_forks(seats) or self._starts.must_wait(seats):
            self._order(seats)
            self._held_back.append(seats)
        else:
            self._spawn(seats)

    def _must_wait_for_forks(self, seats: tuple[Seat, ...]) -> bool:
        """There will soon be a process to fork it from, and until then none that is further: no successor, no spare."""
        return not self._takeover.has(seats) and self._forks.is_loading and self._spare.pid is None

    def _order(self, seats: tuple[Seat, ...]) -> tuple[bytes, list[int]]:
        """What the process of these seats is to be told now, and the descriptors that go with it."""
        fds = self._starts.fds(seats)
        return encode_start(self._starts.message(seats, self._epoch), fds), fds

    def _spawn(self, seats: tuple[Seat, ...]) -> None:
        self._epoch += 1
        start, fds = self._order(seats)
        try:
            successor = self._takeover.successor_of(seats)
            body = successor or self._spare.take() or self._forks.body()
            process = StageProcess(body, seats, self._epoch, start, fds, self._on_report, self._on_exit)
        except OSError as error:
            log.error("the process for %s could not be started: %s", ", ".join(seats), why_not_started(error))
            for seat in seats:
                self._owner.handle_lost(self._epoch, seat, False, False)
            return
        device = self._posts.device_of(seats)
        if device in self.plans.held:
            home, process.memory = self.plans.home(device), self.plans.at_start(device)
            process.knows = {(version.component, version.content, home) for version, _ in self._starts.placed(seats)}
        for post in self._posts.of(seats):
            post.process = process
            post.restarts += successor is None

    def _start_held_back(self) -> None:
        held_back, self._held_back = self._held_back, []
        for seats in held_back:
            self.start(seats)

    def _forks_settled(self) -> None:
        """What waited for a process to fork from goes on: stages, then the spare."""
        self._start_held_back()
        self._keep_spare()

    def restart(self, seat: Seat, delay: float) -> None:
        """Start this seat's process again after `delay` seconds; stages that share it come with it."""
        group = self._posts.group_of(seat)
        if group not in self._pending and not self._stopping:
            for post in self._posts.of(group):
                post.state = "restarting"
            if self._takeover.moving_to is not None:
                return  # when all have left
            self._pending[group] = self._loop.call_later(delay, self.start, group)

    def declare_failed(self, seat: Seat, error: Failure) -> None:
        log.error("%s is not started again: %s", seat, error.message)
        self._posts[seat].state = "failed"
        self._posts[seat].error = error
        self._keep_ready()
        self._changes.notify()

    async def ready(self, on_loading: OnLoading) -> None:
        """Wait until every seat is up, but for FAILED ones whose stage is up elsewhere; raises what keeps a stage from
        being up."""
        while True:
            changed = self._changes.next
            on_loading(list(self._loading.values()))
            waited_for = self._posts.waited_for()
            for post in waited_for:
                if post.error is not None and post.process is None:  # what is said before the end may be answered yet
                    raise from_failure(post.error)
            if all(post.state == "up" for post in waited_for):
                return
            if self._stopping:
                raise StageFailed("the engine was stopped before its stages were up")
            await changed.wait()

    async def stop(self) -> None:
        """End every process: ask, wait, kill, reap."""
        self._stopping = self.upkeep.ended = True
        self._watch.end()
        self._spare.end()
        self._forks.end()
        self._takeover.end()
        for handle in self._pending.values():
            handle.cancel()
        processes = self._posts.processes()
        for process in processes:
            if process.ready:
                process.send(Stop())
            else:
                process.kill()  # it is loading, has no request in hand, and would read no message for seconds
        await _wait_exited(processes, STOP_GRACE)
        for process in processes:
            process.kill()
        await _wait_exited(processes, STOP_GRACE)
        self.placed.close()
        self._changes.notify()

    def kill(self) -> None:
        """End every process now, whatever it is doing; `stop` then has only to reap."""
        self._stopping = self.upkeep.ended = self._takeover.ended = True
        for process in self._posts.processes():
            process.kill()
        self._spare.kill()
        self._forks.kill()

    # From one program to the next.

    @property
    def is_replacing(self) -> bool:
        """A process is taking the place of another."""
        return self._takeover.is_busy

    def state(self, fds: Descriptors) -> CrewState:
        """All processes and what is known of them."""
        now = self._loop.time()
        return CrewState(
            posts=self._posts.state(), processes=[process.state(fds) for process in self._posts.processes()],
            placed=self.placed.state(fds), weights=self.weights.state(), source=self._source, versions=self.versions,
            loading=list(self._loading.values()), epoch=self._epoch, forks=self._forks.state(fds),
            spare=self._spare.state(fds),
            pending=[(seats, handle.when() - now) for seats, handle in self._pending.items()],
            held_back=self._held_back, chosen=self._starts.chosen, vae_chosen=self._starts.vae_chosen,
            plans=self.plans.state(), settings=self._starts.settings,
        )  # fmt: skip

    def put_back(self, state: CrewState, fds: Descriptors) -> None:
        """Have the processes of the program before this one; they are not touched before `resume`. ValueError if they
        do not fit the seats that there are."""
        self._watch.end()
        self._posts.put_back(state.posts)
        self.plans.put_back(state.plans)
        for each in state.processes:
            body = Body.restored(each.body, fds)
            process = StageProcess(body, each.seats, each.epoch, None, (), self._on_report, self._on_exit)
            process.put_back(each, fds)
            for post in self._posts.of(each.seats):
                post.process = process
        self.placed.put_back(state.placed, fds)
        self.weights.put_back(state.weights)
        self._source = state.source
        self.versions.update(state.versions)
        self._loading.update({progress.component: progress for progress in state.loading})
        self._epoch = state.epoch
        self._forks.put_back(state.forks, fds)
        self._spare.put_back(state.spare, fds)
        self._held_back = list(state.held_back)
        self._starts.chosen, self._starts.vae_chosen = state.chosen, state.vae_chosen
        self._starts.settings = state.settings
        self._left_to_start = list(state.pending)

    def resume(self) -> None:
        """Go on: listen to the processes, start those that were to be started."""
        for process in self._posts.processes():
            process.resume()
        for seats, delay in self._left_to_start:
            self._pending[seats] = self._loop.call_later(max(0.0, delay), self.start, seats)
        self._left_to_start = []
        self._start_held_back()
        self._keep_ready()
        self._watch.begin()

    @property
    def spare_pid(self) -> int | None:
        return self._spare.pid

    @property
    def forks_pid(self) -> int | None:
        return self._forks.pid

    def pids(self) -> list[int]:
        """Of all its processes that may use a device."""
        spare = [] if self.spare_pid is None else [self.spare_pid]
        return [process.pid for process in self._posts.processes()] + spare

    def origins(self) -> list[Origin]:
        """Of the weights that its processes begin with: what is to be read, for which device."""
        return [
            Origin(self._model.name, device, self.dtype, component)
            for component in self._checkpoint.components.values()
            for device in self.upkeep.places_of(component.name)
        ]

    def device_of(self, seat: Seat) -> str | None:
        """Where the seat computes; None: nowhere."""
        return self._posts[seat].device

    def level_of(self, seat: Seat) -> int:
        """The memory level that the seat keeps; 0 for one that computes nowhere."""
        device = self._posts[seat].device
        return 0 if device is None else self.plans.held[device].level

    def seats_on(self, device: str) -> list[Seat]:
        """The seats that compute there."""
        return [post.name for post in self._posts.on(device)]

    def _keep_ready(self) -> None:
        """Once no process is starting, so that it takes no time from one: first a process to fork from, then the
        spare."""
        if self._is_at_rest():
            self._forks.keep(settled=True)
        self._keep_spare()

    def _keep_spare(self) -> None:
        if self._is_at_rest() and not self._forks.is_loading:
            self._spare.keep()

    def _is_at_rest(self) -> bool:
        """No process is starting, and none is to come but for one that dies."""
        return self._posts.settled() and not self._stopping and not self._takeover.is_busy

    # Talk.

    def send(self, seat: Seat, message: AnyStageProcessMessage, fds: Sequence[int] = ()) -> None:
        """To a seat whose process is gone, nothing is sent: its end is being reported. `fds` stay the caller's."""
        process = self._posts[seat].process
        if process is not None:
            process.send(message, fds)

    def run(self, seat: Seat, run: Run) -> None:
        if (process := self._posts[seat].process) is not None:
            process.send_run(run)

    async def replace(self, asked: Change) -> Replaced:
        """New processes in the places of those that serve, as `Takeover.replace`; and a new spare. Later ones, too,
        have the code that is on disk now, whether or not all were replaced."""
        try:
            replaced = await self._takeover.replace(asked)
        except BadConfig:
            raise  # nothing was tried: what there is to fork from goes on
        except BaseException:
            self._forks.renew()
            self._keep_ready()
            raise
        self._spare.end()
        self._forks.renew()
        self._keep_ready()
        return replaced

    def computes(self, seat: Seat) -> dict[str, str]:
        """What the results of the process at a seat depend on."""
        return self._posts[seat].computes

    def status(self) -> list[StageStatus]:
        return [post.status() for post in self._posts]

    def _on_report(self, process: StageProcess, report: AnyStageReport, fds: list[int]) -> None:
        """`fds` came with the report and are ours now."""
        match report:
            case Placed(version=version, device=device):
                self.placed.keep(device, version, fds.pop())
                process.knows.add((version.component, version.content, device))
            case Unlocked(component=component, content=content, why=why):
                process.unlocked[component, content] = why
            case MemorySet():
                self.upkeep.handle_memory_set(process, report)
            case Adopted():
                self.upkeep.handle_adopted(process, report)
            case Chosen():
                self._starts.handle_chosen(report)
                self._start_held_back()
            case VaeChosen():
                self._starts.handle_vae_chosen(report)
            case Loading(component=component, done=done, total=total):
                progress = LoadProgress(component=component, done=done, total=total)
                seat = process.seat(STAGE_OF_COMPONENT[component])
                self._loading[component] = self._posts[seat].loading = progress
                self._changes.notify()
            case Ready(weights=weights, versions=versions, threads=threads):
                process.ready = True
                process.computes = computed_with([stage_of(seat) for seat in process.seats], versions, threads)
                self.placed.proven(process.knows)
                self.upkeep.bring_up_to_date(process)
                self.weights.loaded(weights, self._source, self._checkpoint.components)
                self.versions.update(versions)
                for post in self._posts.of(process.seats):
                    post.state, post.loading, post.was_up = "up", None, True
                    self._owner.handle_report(process.epoch, post.name, report)
                self._start_held_back()
                self._keep_ready()
                self._changes.notify()
            case StartFailed(error=error):
                for post in self._posts.of(process.seats):
                    post.error = error
            case Dropped(stage=stage):
                self._owner.handle_report(process.epoch, process.seat(stage), report)
            case PlacingFile():
                self._owner.handle_report(process.epoch, process.seat("writer"), report)
            case QuantumDone(phase=phase) | QuantumFailed(phase=phase) | QuantumDropped(phase=phase):
                process.outstanding -= 1
                post = self._posts[process.seat(STAGE_OF_PHASE[phase])]
                if isinstance(report, QuantumDone):
                    post.quanta += 1
                    post.busy_seconds += report.seconds
                self._owner.handle_report(process.epoch, post.name, report)
        close_fds(fds)

    def _on_exit(self, process: StageProcess, status: int) -> None:
        posts = self._posts.of(process.seats)
        for post in posts:
            post.process, post.state, post.loading = None, "stopped", None
        self._memory.reclaim([stage_of(seat) for seat in process.seats], process.epoch)
        if self._stopping:
            return
        if not process.leaving and all(post.error is None for post in posts):
            log.warning("process %d of %s died: %s", process.pid, ", ".join(process.seats), process.ended_by)
        unfit = not process.ready and self.placed.refuted(process.knows)
        if unfit:
            log.warning("%s could not use the weights of an earlier run and reads them", ", ".join(process.seats))
            for post in posts:
                post.error = None
        if self._can_wait(posts, process.seats):
            for post in posts:
                post.error = None
        for post in posts:
            if post.error is not None:
                post.state = "failed"
                self._owner.handle_gone(post.name, post.error)
            else:
                self._owner.handle_lost(process.epoch, post.name, process.outside, process.leaving)
        if self._takeover.moving_to is not None and not self._posts.processes():
            self._move(self._takeover.moving_to)
        self._start_held_back()
        self._changes.notify()

    def _move(self, placement: Placement) -> None:
        """The last process has left: start those of another placement."""
        self._takeover.moving_to = None
        log.info("the stages are %s from now on", placement)
        self._params = msgspec.structs.replace(self._params, placement=placement)
        self._posts.groups = groups_of([post.name for post in self._posts], placement)
        self.tokens = compute_tokens(self._params, {post.name: post.device for post in self._posts})
        self._owner.handle_moved(placement)
        for seats in self.groups:
            self.start(seats)

    def _can_wait(self, posts: Sequence[Post], seats: tuple[Seat, ...]) -> bool:
        """It did not come up for lack of memory, threads or processes, and was up before, or others with its weights
        were: somebody has taken them, and may give them back. It is tried again as often as a stage that dies."""
        lack = next((post.error for post in posts if post.error is not None and post.error.code in PASSING), None)
        if lack is None or not (any(post.was_up for post in posts) or self._starts.placed(seats)):
            return False
        what = "memory" if lack.code == OutOfMemory.code else "threads or processes"
        log.warning("%s could not start for lack of %s (%s); it is tried again", ", ".join(seats), what, lack.message)
        return True


async def _wait_exited(processes: list[StageProcess], timeout: float) -> None:
    if processes:
        await asyncio.wait([asyncio.ensure_future(p.exited.wait()) for p in processes], timeout=timeout)
