"""The stage processes of one engine: which stages share a process, starting, restarting, watching and ending them.

Each has its seats: the names of its stages, or "dit:1", "dit:2", ... for further dits. Restart policy is the
scheduler's; this only carries it out. Every second the crew looks for processes that stopped making progress and kills
them; their end then arrives like any other.

Resource handling: owns the `StageProcess`es between `start` and `stop`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from engine.checkpoint import file_bytes
from engine.memory import DECODE_LATENTS, EngineMemory
from engine.models import checkpoint_directory
from engine.params import ModelParams, SystemParams
from engine.process import Body, StageProcess, encode_start, resident_bytes
from engine.weights import Versions, WeightStore
from hotreload.checkpoint import Checkpoint
from ipc.channel import close_fds
from ipc.errors import BadConfig, Failure, StageFailed, from_failure
from ipc.messages import (
    STAGE_OF_COMPONENT,
    STAGE_OF_PHASE,
    Adopt,
    Adopted,
    AnyStageProcessMessage,
    AnyStageReport,
    Component,
    Dropped,
    Forget,
    Loading,
    LoadProgress,
    Placed,
    QuantumDone,
    QuantumDropped,
    QuantumFailed,
    Ready,
    Run,
    Seat,
    StageName,
    StageStatus,
    Start,
    StartFailed,
    Stop,
    WeightVersion,
    number_of,
    stage_of,
)  # fmt: skip

log = logging.getLogger(__name__)

WATCH_INTERVAL = 1.0
"""Seconds between looks at the progress counters."""

STOP_GRACE = 5.0
"""Seconds a process gets to finish the quantum in hand before it is killed."""


StageState = Literal["starting", "up", "restarting", "failed", "stopped"]

OnLoading = Callable[[Sequence[LoadProgress]], None]
"""Hears of all components whenever more of one of them is loaded."""


class Owner(Protocol):
    """Who hears of the crew: the supervisor."""

    def handle_report(self, epoch: int, seat: Seat, report: AnyStageReport) -> None: ...
    def handle_lost(self, epoch: int, seat: Seat, outside: bool) -> None: ...
    def handle_gone(self, seat: Seat, error: Failure) -> None: ...


class _Post(msgspec.Struct):
    """What the crew knows of one seat."""

    name: Seat
    device: str | None
    state: StageState = "stopped"
    process: StageProcess | None = None
    restarts: int = -1
    quanta: int = 0
    busy_seconds: float = 0.0
    error: Failure | None = None
    loading: LoadProgress | None = None
    """What its process reads, until it is up."""

    def has(self, component: str, content: str) -> bool:
        """Its process has this version of weights, and is up."""
        return self.process is not None and self.state == "up" and (component, content) in self.process.knows


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
        owner: Owner,
    ) -> None:
        """`device`: of text and vae; `dit_devices`: of each dit; both from `resolve_devices`."""
        self._params, self._model, self._checkpoint = params, model, checkpoint
        self._memory = memory
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.device = device
        self.on_gpu = self.device.startswith("cuda")
        dits = {"dit" if number == 0 else f"dit:{number}": where for number, where in enumerate(dit_devices)}
        devices: dict[Seat, str | None] = {"text": device, **dits, "vae": device, "writer": None}
        self._posts = {seat: _Post(seat, where) for seat, where in devices.items()}
        fused = params.placement == "fused"
        self.groups: list[tuple[Seat, ...]] = [tuple(devices)] if fused else [(seat,) for seat in devices]
        self._dits = len(dits)
        self.placed = WeightStore()
        self.weights = Versions()
        self._source = checkpoint_directory(model, params.checkpoint).name
        self.versions: dict[str, str] = {}
        self._loading = {
            c.name: LoadProgress(component=c.name, done=0, total=file_bytes(c)) for c in self._components()
        }
        self._epoch = 0
        self._spare: Body | None = None
        self._pending: dict[tuple[Seat, ...], asyncio.TimerHandle] = {}
        self._refused: dict[tuple[str, str], Failure] = {}
        """Versions of weights that a process could not map, and why."""
        self._held_back: list[tuple[Seat, ...]] = []
        """To be started when what they would read is placed."""
        self._stopping = False
        self._changed = asyncio.Event()
        self._watcher = self._loop.call_later(WATCH_INTERVAL, self._watch)

    @property
    def outliving(self) -> Literal["host", "gpu", "no"]:
        """Where there is memory that outlives the stages."""
        if not self.on_gpu:
            return "host"
        return "gpu" if self._memory.on_device else "no"

    @property
    def tokens(self) -> dict[Seat, str | None]:
        """The compute token each seat needs, for the scheduler.

        On a GPU all model stages take turns: two processes computing at once gain nothing. On a CPU the text encoder,
        small and on one thread, runs beside the others, and so do the dits, each with its own token, and the vae where
        there are threads for all; else it takes turns with the first dit. One fused process is one token.
        """
        if self._params.placement == "fused":
            return dict.fromkeys(self._posts, "process")
        if self.on_gpu:
            return {seat: post.device for seat, post in self._posts.items()}
        threads = self.threads
        vae = "cpu:vae" if self._dits * threads["dit"] + threads["vae"] <= _cores() else "cpu:dit"
        dits: dict[Seat, str | None] = {seat: f"cpu:{seat}" for seat in self._posts if stage_of(seat) == "dit"}
        return {"text": None, **dits, "vae": vae, "writer": None}

    @property
    def threads(self) -> dict[StageName, int]:
        """Compute threads of each process; the same for every dit, as they are part of the result's identity."""
        given, half = self._params.threads, _cores() // 2
        return {"text": 1, "dit": given or max(1, half // self._dits), "vae": given or max(1, half), "writer": 1}

    # Life.

    def start(self, seats: tuple[Seat, ...]) -> None:
        """Spawn the process of these seats, now or when a sibling has placed their weights; a report or `handle_lost`
        follows."""
        self._pending.pop(seats, None)
        if self._stopping:
            return
        for post in self._of(seats):
            post.state, post.error = "starting", None
        if self._is_being_placed(seats):
            self._held_back.append(seats)
        else:
            self._spawn(seats)

    def _spawn(self, seats: tuple[Seat, ...]) -> None:
        self._epoch += 1
        fds = self._fds(seats)
        start = encode_start(self._start_message(seats), fds)
        try:
            body = self._take_spare() or Body()
        except OSError as error:
            log.error("the process for %s could not be started: %s", ", ".join(seats), error)
            for seat in seats:
                self._owner.handle_lost(self._epoch, seat, False)
            return
        process = StageProcess(body, seats, self._epoch, start, fds, self._on_report, self._on_exit)
        process.knows = {(version.component, version.content) for version, _ in self._placed_for(seats)}
        for post in self._of(seats):
            post.process = process
            post.restarts += 1

    def _is_being_placed(self, seats: tuple[Seat, ...]) -> bool:
        """A sibling on the same device is reading the weights of these seats."""
        siblings = [post for post in self._posts.values() if stage_of(post.name) == stage_of(seats[0])]
        placed = {version.component for version, _ in self._placed_for(seats)}
        return not placed.issuperset(self._components_of(seats)) and any(
            post.process is not None and not post.process.ready and post.device == self._device_of(seats)
            for post in siblings
        )

    def _start_held_back(self) -> None:
        held_back, self._held_back = self._held_back, []
        for seats in held_back:
            self.start(seats)

    def restart(self, seat: Seat, delay: float) -> None:
        """Start this seat's process again after `delay` seconds; stages that share it come with it."""
        group = next(g for g in self.groups if seat in g)
        if group not in self._pending and not self._stopping:
            for post in self._of(group):
                post.state = "restarting"
            self._pending[group] = self._loop.call_later(delay, self.start, group)

    def declare_failed(self, seat: Seat, error: Failure) -> None:
        log.error("%s is not started again: %s", seat, error.message)
        self._posts[seat].state = "failed"
        self._posts[seat].error = error
        self._notify()

    async def ready(self, on_loading: OnLoading) -> None:
        """Wait until every seat is up, but for FAILED ones whose stage is up elsewhere; raises what keeps a stage from
        being up."""
        while True:
            changed = self._changed
            on_loading(list(self._loading.values()))
            waited_for = [post for post in self._posts.values() if not self._is_done_without(post)]
            for post in waited_for:
                if post.error is not None:
                    raise from_failure(post.error)
            if all(post.state == "up" for post in waited_for):
                return
            if self._stopping:
                raise StageFailed("the engine was stopped before its stages were up")
            await changed.wait()

    def _is_done_without(self, post: _Post) -> bool:
        """It is FAILED, and a sibling is not."""
        siblings = [other for seat, other in self._posts.items() if stage_of(seat) == stage_of(post.name)]
        return post.error is not None and any(other.error is None for other in siblings)

    async def stop(self) -> None:
        """End every process: ask, wait, kill, reap."""
        self._stopping = True
        self._watcher.cancel()
        if self._spare is not None:
            self._spare.end()
            self._spare = None
        for handle in self._pending.values():
            handle.cancel()
        processes = self._processes()
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
        self._notify()

    def kill(self) -> None:
        """End every process now, whatever it is doing; `stop` then has only to reap."""
        self._stopping = True
        for process in self._processes():
            process.kill()
        if self._spare is not None:
            self._spare.popen.kill()

    @property
    def spare_pid(self) -> int | None:
        return None if self._spare is None else self._spare.popen.pid

    def _keep_spare(self) -> None:
        """Once all stages are up, so that it takes no time from one that starts."""
        if self._spare is not None or not self._params.warm_spare or any(p.state != "up" for p in self._posts.values()):
            return
        try:
            self._spare = Body()
        except OSError as error:
            log.warning("no spare process: %s", error)
            return
        self._spare.prepare(self.device)

    def _take_spare(self) -> Body | None:
        """The spare, loaded or still loading: it is further than a new process would be."""
        spare, self._spare = self._spare, None
        if spare is None or spare.lives():
            return spare
        log.warning("the spare process ended with status %s", spare.popen.returncode)
        spare.end()
        return None

    # Talk.

    def send(self, seat: Seat, message: AnyStageProcessMessage) -> None:
        """To a seat whose process is gone, nothing is sent: its end is being reported."""
        process = self._posts[seat].process
        if process is not None:
            process.send(message)

    def run(self, seat: Seat, run: Run) -> None:
        post = self._posts[seat]
        if post.process is not None:
            post.process.send_run(run)

    async def adopt(self, component: str, content: str) -> None:
        """Have every process that computes with this component map a version that is placed on its device.

        Returns when all have, those included that are restarted meanwhile; but for FAILED ones. Raises `StageFailed` if
        one refuses, or none is left.
        """
        told: set[int] = set()
        self._refused.pop((component, content), None)
        while True:
            changed = self._changed
            posts = [post for post in self._posts.values() if stage_of(post.name) == STAGE_OF_COMPONENT[component]]
            if (refused := self._refused.pop((component, content), None)) is not None:
                raise StageFailed(f"the new {component} cannot be used: {refused.message}")
            if self._stopping or all(post.error is not None for post in posts):
                raise StageFailed(f"no process is left that computes with the {component}")
            missing = [post for post in posts if post.error is None and not post.has(component, content)]
            if not missing:
                return
            for post in missing:
                if post.process is not None and post.state == "up" and post.process.epoch not in told:
                    told.add(post.process.epoch)
                    assert post.device is not None, f"{post.name} computes"
                    placed = self.placed.find(post.device, component, content)
                    assert placed is not None, f"{component} is placed on {post.device}"
                    post.process.send(Adopt(version=placed.version), [placed.fd])
            await changed.wait()

    def forget(self, component: str, content: str) -> None:
        """Unmap a version everywhere and let go of its memory."""
        for post in self._posts.values():
            if post.process is not None and post.has(component, content):
                post.process.knows.discard((component, content))
                post.process.send(Forget(component=component, content=content))
        self.placed.let_go(component, content)

    def devices_of(self, component: str) -> list[str]:
        """Where it is computed with."""
        posts = [post for post in self._posts.values() if stage_of(post.name) == STAGE_OF_COMPONENT[component]]
        return list(dict.fromkeys(post.device for post in posts if post.device is not None))

    def status(self) -> list[StageStatus]:
        return [
            StageStatus(
                name=post.name, state=post.state, pid=post.process.pid if post.process else None,
                device=post.device or "-", epoch=post.process.epoch if post.process else 0,
                restarts=max(0, post.restarts),
                resident_bytes=resident_bytes(post.process.pid) if post.process else 0,
                busy_seconds=post.busy_seconds, quanta=post.quanta, loading=post.loading,
            )
            for post in self._posts.values()
        ]  # fmt: skip

    def _on_report(self, process: StageProcess, report: AnyStageReport, fds: list[int]) -> None:
        """`fds` came with the report and are ours now."""
        match report:
            case Placed(version=version, device=device):
                self.placed.keep(device, version, fds.pop())
                process.knows.add((version.component, version.content))
            case Adopted(component=component, content=content, error=error):
                if error is None:
                    process.knows.add((component, content))
                else:
                    self._refused[component, content] = error
                self._notify()
            case Loading(component=component, done=done, total=total):
                progress = LoadProgress(component=component, done=done, total=total)
                seat = process.seat(STAGE_OF_COMPONENT[component])
                self._loading[component] = self._posts[seat].loading = progress
                self._notify()
            case Ready(weights=weights, versions=versions):
                process.ready = True
                self.weights.loaded(weights, self._source, self._checkpoint.components)
                self.versions.update(versions)
                for post in self._of(process.seats):
                    post.state, post.loading = "up", None
                    self._owner.handle_report(process.epoch, post.name, report)
                self._start_held_back()
                self._keep_spare()
                self._notify()
            case StartFailed(error=error):
                for post in self._of(process.seats):
                    post.error = error
            case Dropped(stage=stage):
                self._owner.handle_report(process.epoch, process.seat(stage), report)
            case QuantumDone(phase=phase) | QuantumFailed(phase=phase) | QuantumDropped(phase=phase):
                process.outstanding -= 1
                post = self._posts[process.seat(STAGE_OF_PHASE[phase])]
                if isinstance(report, QuantumDone):
                    post.quanta += 1
                    post.busy_seconds += report.seconds
                self._owner.handle_report(process.epoch, post.name, report)
        close_fds(fds)

    def _on_exit(self, process: StageProcess, status: int) -> None:
        posts = self._of(process.seats)
        for post in posts:
            post.process, post.state, post.loading = None, "stopped", None
        self._memory.reclaim([stage_of(seat) for seat in process.seats], process.epoch)
        if self._stopping:
            return
        for post in posts:
            if post.error is not None:
                post.state = "failed"
                self._owner.handle_gone(post.name, post.error)
            else:
                self._owner.handle_lost(process.epoch, post.name, process.outside)
        self._start_held_back()
        self._notify()

    def _watch(self) -> None:
        """Kill what has been silent past its deadline: a quantum that hangs, a process that does not come up."""
        now = self._loop.time()
        for process in self._processes():
            if process.ready:
                hung = process.outstanding > 0 and process.silent_for(now) > self._params.stage_deadline
            else:
                hung = process.silent_for(now) > self._params.start_deadline
            if hung:
                process.kill()
        self._watcher = self._loop.call_later(WATCH_INTERVAL, self._watch)

    def _fds(self, seats: tuple[Seat, ...]) -> list[int]:
        """What goes with `_start_message`, in its order."""
        return self._memory.fds([stage_of(seat) for seat in seats]) + [fd for _, fd in self._placed_for(seats)]

    def _placed_for(self, seats: tuple[Seat, ...]) -> list[tuple[WeightVersion, int]]:
        return self.placed.of(self._device_of(seats), self._components_of(seats))

    def _components_of(self, seats: tuple[Seat, ...]) -> list[str]:
        stages = [stage_of(seat) for seat in seats]
        return [name for name in self._checkpoint.components if STAGE_OF_COMPONENT[name] in stages]

    def _device_of(self, seats: tuple[Seat, ...]) -> str:
        """Where the process of these seats has its weights."""
        return next((post.device for post in self._of(seats) if post.device is not None), "-")

    @property
    def dtype(self) -> str:
        """That the engine computes in."""
        return self._params.dtype if self._params.dtype != "auto" else "bfloat16" if self.on_gpu else "float32"

    def _start_message(self, seats: tuple[Seat, ...]) -> Start:
        stages = [stage_of(seat) for seat in seats]
        return Start(
            stages=stages, number=max(map(number_of, seats)), epoch=self._epoch, supervisor_pid=os.getpid(),
            model=self._model.name,
            transformer=self._model.transformer, vae=self._model.vae, text_encoder=self._model.text_encoder,
            image_encoder=self._model.image_encoder, conditioning=self._model.conditioning,
            boundary=self._model.boundary, components=self._components(), tokenizer=str(self._checkpoint.tokenizer),
            devices={stage_of(p.name): p.device for p in self._of(seats) if p.device is not None},
            threads={stage: self.threads[stage] for stage in stages}, dtype=self.dtype,
            decode_latents=DECODE_LATENTS, queues=self._memory.specs(stages), state=self._memory.state_spec(stages),
            placed=[version for version, _ in self._placed_for(seats)], serving=self.weights.serving,
            outliving=self.outliving != "no",
        )  # fmt: skip

    def _components(self) -> list[Component]:
        return list(self._checkpoint.components.values())

    def _of(self, seats: tuple[Seat, ...]) -> list[_Post]:
        return [self._posts[seat] for seat in seats]

    def _processes(self) -> list[StageProcess]:
        return list({p.process.epoch: p.process for p in self._posts.values() if p.process is not None}.values())

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _wait_exited(processes: list[StageProcess], timeout: float) -> None:
    if processes:
        await asyncio.wait([asyncio.ensure_future(p.exited.wait()) for p in processes], timeout=timeout)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def resolve_devices(params: SystemParams) -> tuple[str, tuple[str, ...]]:
    """The device of text and vae, and that of each dit. `BadConfig` if they do not go together."""
    dits = tuple(resolve_device(device) for device in params.dit_devices)
    device = dits[0] if dits and params.device == "auto" else resolve_device(params.device)
    if params.placement == "fused" and dits not in ((), (device,)):
        raise BadConfig(
            f"placement fused is one process with one dit on {device}, but dit_devices are {', '.join(dits)}; use "
            "placement split, or leave dit_devices out"
        )
    if twice := [name for name in dits if name != "cpu" and dits.count(name) > 1]:
        raise BadConfig(f"dit_devices names {twice[0]} twice, where two would only take turns; name each GPU once")
    if len({name.partition(":")[0] for name in (device, *dits)}) > 1:
        raise BadConfig(
            f"device is {device} and dit_devices are {', '.join(dits)}; results differ between CPU and GPU, so name "
            "devices of one kind"
        )
    return device, dits or (device,)


def resolve_device(device: str) -> str:
    """`auto` becomes the first CUDA device, else the CPU. Asks the driver's management library, not torch."""
    if device == "cpu":
        return device
    count = _cuda_devices()
    if device == "auto":
        return "cuda:0" if count else "cpu"
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise BadConfig(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    if int(index or 0) >= count:
        raise BadConfig(f"device is {device!r}, but this machine has {count} CUDA devices; cpu always works")
    return f"cuda:{int(index or 0)}"


def _cuda_devices() -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
