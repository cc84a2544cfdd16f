"""The stage processes of one engine: which stages share a process, starting, restarting, watching and ending them.

Restart policy is the scheduler's; this only carries it out. Every second the crew looks for processes that stopped
making progress and kills them; their end then arrives like any other.

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
from engine.params import STAGES, ModelParams, SystemParams
from engine.process import Body, StageProcess, resident_bytes
from engine.weights import WeightStore
from hotreload.checkpoint import Checkpoint
from ipc.channel import close_fds
from ipc.errors import BadConfig, Failure, StageFailed, from_failure
from ipc.messages import (
    STAGE_OF_PHASE,
    AnyStageProcessMessage,
    AnyStageReport,
    Component,
    Dropped,
    Loading,
    LoadProgress,
    Placed,
    QuantumDone,
    QuantumDropped,
    QuantumFailed,
    Ready,
    Run,
    StageName,
    StageStatus,
    Start,
    StartFailed,
    Stop,
    WeightVersion,
)  # fmt: skip

log = logging.getLogger(__name__)

WATCH_INTERVAL = 1.0
"""Seconds between looks at the progress counters."""

STOP_GRACE = 5.0
"""Seconds a process gets to finish the quantum in hand before it is killed."""


STAGE_OF_COMPONENT: dict[str, StageName] = {
    "text_encoder": "text", "image_encoder": "vae", "transformer": "dit", "transformer_2": "dit", "vae": "vae",
}  # fmt: skip

StageState = Literal["starting", "up", "restarting", "failed", "stopped"]

OnLoading = Callable[[Sequence[LoadProgress]], None]
"""Hears of all components whenever more of one of them is loaded."""


class Owner(Protocol):
    """Who hears of the crew: the supervisor."""

    def handle_report(self, epoch: int, stage: StageName, report: AnyStageReport) -> None: ...
    def handle_lost(self, epoch: int, stage: StageName, outside: bool) -> None: ...
    def handle_gone(self, stage: StageName, error: Failure) -> None: ...


class _Post(msgspec.Struct):
    """What the crew knows of one stage."""

    name: StageName
    device: str | None
    state: StageState = "stopped"
    process: StageProcess | None = None
    restarts: int = -1
    quanta: int = 0
    busy_seconds: float = 0.0
    error: Failure | None = None
    loading: LoadProgress | None = None
    """What its process reads, until it is up."""


class Crew:
    """All stage processes."""

    def __init__(
        self,
        params: SystemParams,
        model: ModelParams,
        checkpoint: Checkpoint,
        device: str,
        memory: EngineMemory,
        owner: Owner,
    ) -> None:
        """`device`: of all stages but the writer, from `resolve_device`."""
        self._params, self._model, self._checkpoint = params, model, checkpoint
        self._memory = memory
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.device = device
        self.on_gpu = self.device.startswith("cuda")
        self.groups: list[tuple[StageName, ...]] = [STAGES] if params.placement == "fused" else [(s,) for s in STAGES]
        self._posts = {name: _Post(name, None if name == "writer" else self.device) for name in STAGES}
        self.placed = WeightStore()
        self.weights: dict[str, str] = {}
        """Component -> content hash, of what is loaded."""
        self.versions: dict[str, str] = {}
        self._loading = {
            c.name: LoadProgress(component=c.name, done=0, total=file_bytes(c)) for c in self._components()
        }
        self._epoch = 0
        self._spare: Body | None = None
        self._pending: dict[tuple[StageName, ...], asyncio.TimerHandle] = {}
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
    def tokens(self) -> dict[StageName, str | None]:
        """The compute token each stage needs, for the scheduler.

        On a GPU all model stages take turns: two processes computing at once gain nothing. On a CPU the text encoder,
        small and on one thread, runs beside the others, and so do dit and vae where there are threads for both. One
        fused process is one token.
        """
        if self._params.placement == "fused":
            return dict.fromkeys(STAGES, "process")
        if self.on_gpu:
            return {"text": self.device, "dit": self.device, "vae": self.device, "writer": None}
        vae = "cpu:vae" if 2 * self.threads <= _cores() else "cpu"
        return {"text": None, "dit": "cpu", "vae": vae, "writer": None}

    @property
    def threads(self) -> int:
        """Compute threads of the dit and of the vae stage."""
        return self._params.threads or max(1, _cores() // 2)

    # Life.

    def start(self, stages: tuple[StageName, ...]) -> None:
        """Spawn the process of these stages; a report or `handle_lost` follows."""
        self._pending.pop(stages, None)
        if self._stopping:
            return
        self._epoch += 1
        try:
            body = self._take_spare() or Body()
        except OSError as error:
            log.error("the process for %s could not be started: %s", ", ".join(stages), error)
            for name in stages:
                self._owner.handle_lost(self._epoch, name, False)
            return
        process = StageProcess(body, self._start_message(stages), self._fds(stages), self._on_report, self._on_exit)
        for post in self._of(stages):
            post.process, post.state, post.error = process, "starting", None
            post.restarts += 1

    def restart(self, stage: StageName, delay: float) -> None:
        """Start this stage's process again after `delay` seconds; stages that share it come with it."""
        group = next(g for g in self.groups if stage in g)
        if group not in self._pending and not self._stopping:
            for post in self._of(group):
                post.state = "restarting"
            self._pending[group] = self._loop.call_later(delay, self.start, group)

    def declare_failed(self, stage: StageName, error: Failure) -> None:
        self._posts[stage].state = "failed"
        self._posts[stage].error = error
        self._notify()

    async def ready(self, on_loading: OnLoading) -> None:
        """Wait until every stage is up; raises what keeps one from it."""
        while True:
            changed = self._changed
            on_loading(list(self._loading.values()))
            for post in self._posts.values():
                if post.error is not None:
                    raise from_failure(post.error)
            if all(post.state == "up" for post in self._posts.values()):
                return
            if self._stopping:
                raise StageFailed("the engine was stopped before its stages were up")
            await changed.wait()

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

    def send(self, stage: StageName, message: AnyStageProcessMessage) -> None:
        """To a stage whose process is gone, nothing is sent: its end is being reported."""
        process = self._posts[stage].process
        if process is not None:
            process.send(message)

    def run(self, stage: StageName, run: Run) -> None:
        post = self._posts[stage]
        if post.process is not None:
            post.process.send_run(run)

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
            case Placed(version=version):
                self.placed.keep(version, fds.pop())
            case Loading(component=component, done=done, total=total):
                progress = LoadProgress(component=component, done=done, total=total)
                self._loading[component] = self._posts[STAGE_OF_COMPONENT[component]].loading = progress
                self._notify()
            case Ready(weights=weights, versions=versions):
                process.ready = True
                self.weights.update(weights)
                self.versions.update(versions)
                for post in self._of(process.stages):
                    post.state, post.loading = "up", None
                    self._owner.handle_report(process.epoch, post.name, report)
                self._keep_spare()
                self._notify()
            case StartFailed(error=error):
                for post in self._of(process.stages):
                    post.error = error
            case Dropped(stage=stage):
                self._owner.handle_report(process.epoch, stage, report)
            case QuantumDone(phase=phase) | QuantumFailed(phase=phase) | QuantumDropped(phase=phase):
                process.outstanding -= 1
                post = self._posts[STAGE_OF_PHASE[phase]]
                if isinstance(report, QuantumDone):
                    post.quanta += 1
                    post.busy_seconds += report.seconds
                self._owner.handle_report(process.epoch, post.name, report)
        close_fds(fds)

    def _on_exit(self, process: StageProcess, status: int) -> None:
        posts = self._of(process.stages)
        for post in posts:
            post.process, post.state, post.loading = None, "stopped", None
        self._memory.reclaim(process.stages)
        if self._stopping:
            return
        for post in posts:
            if post.error is not None:
                post.state = "failed"
                self._owner.handle_gone(post.name, post.error)
            else:
                self._owner.handle_lost(process.epoch, post.name, process.outside)
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

    def _fds(self, stages: tuple[StageName, ...]) -> list[int]:
        """What goes with `_start_message`, in its order."""
        return self._memory.fds(stages) + [fd for _, fd in self._placed_for(stages)]

    def _placed_for(self, stages: tuple[StageName, ...]) -> list[tuple[WeightVersion, int]]:
        return self.placed.of([name for name, stage in STAGE_OF_COMPONENT.items() if stage in stages])

    def _start_message(self, stages: tuple[StageName, ...]) -> Start:
        dtype = self._params.dtype if self._params.dtype != "auto" else "bfloat16" if self.on_gpu else "float32"
        return Start(
            stages=list(stages), epoch=self._epoch, supervisor_pid=os.getpid(), model=self._model.name,
            transformer=self._model.transformer, vae=self._model.vae, text_encoder=self._model.text_encoder,
            image_encoder=self._model.image_encoder, conditioning=self._model.conditioning,
            boundary=self._model.boundary, components=self._components(), tokenizer=str(self._checkpoint.tokenizer),
            devices={s: self.device for s in stages if s != "writer"},
            threads={s: self.threads if s in ("dit", "vae") else 1 for s in stages}, dtype=dtype,
            decode_latents=DECODE_LATENTS, queues=self._memory.specs(stages), state=self._memory.state_spec(stages),
            placed=[version for version, _ in self._placed_for(stages)],
            outliving=self.outliving != "no",
        )  # fmt: skip

    def _components(self) -> list[Component]:
        return list(self._checkpoint.components.values())

    def _of(self, stages: tuple[StageName, ...]) -> list[_Post]:
        return [self._posts[name] for name in stages]

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
