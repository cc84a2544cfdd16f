"""Accepted requests, from submission until some time after their end."""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal

from engine.events import TaskSpec
from engine.footprint import RequestSize
from engine.listing import Row, row_of
from engine.memory import DECODE_LATENTS
from engine.params import ModelParams
from engine.states import State
from ipc.errors import BadRequest, Cancelled, DeadlineExceeded, EngineError, Failure, NotFound, from_failure
from ipc.messages.job import Computed, Job
from ipc.messages.names import STAGE_OF_PHASE, Phase
from ipc.messages.server import Done, Failed, Progress, TaskEvent
from ipc.messages.status import TaskInfo
from ipc.messages.weights import WeightChange

KEPT_FINISHED = 256
"""Finished tasks that `list`, `result` and `events` still know."""

USERS = {error.code for error in (BadRequest, Cancelled, DeadlineExceeded)}
"""How a request ends by what its user has asked for."""


def log_level(end: Done | Failed) -> int:
    """Of the line that says how a request ended, by who must act: INFO, nobody, or its user; ERROR, who maintains the
    engine, as an `internal` error is a defect; WARNING for all else, which is for the operator: a full disk, too little
    memory, weights that compute NaN, a stage that cannot be kept alive."""
    if isinstance(end, Done) or end.error.code in USERS:
        return logging.INFO
    return logging.ERROR if end.error.code == EngineError.code else logging.WARNING


class Task:
    """One request: its job, how far it is, and who listens."""

    def __init__(self, job: Job, spec: TaskSpec, params: dict[str, Any], submitted_at: float) -> None:
        self.job = job
        self.spec = spec
        self.params = params
        self.submitted_at = submitted_at
        self.progress = Progress(id=job.id, phase="queued", step=0, steps=0)
        self.seconds: collections.defaultdict[Phase, float] = collections.defaultdict(float)
        """Compute time per phase so far."""
        self.metadata: dict[str, Any] = {}
        self.weights: dict[str, str] = {}
        """Component -> content hash of the version it is computed with; from its first quantum on."""
        self.changes: list[WeightChange] = []
        """Of those versions, between two steps."""
        self.computed: dict[Phase, list[Computed]] = {}
        """What its quanta so far were computed with: at first, and from each on with which that changed."""
        self.ended: Done | Failed | None = None
        self.told = False
        """Those who follow it may know that it has ended: it will not be done again."""
        self._changed = asyncio.Event()
        self._row: Row | None = None
        """Its row in `list`, once that was asked for after its end."""

    def note_computed(self, phase: Phase, index: int, by: dict[str, str]) -> bool:
        """Quantum `index` of a phase was computed with these. Whether that is something else than the one before."""
        before = [each for each in self.computed.get(phase, ()) if each.step < index]  # others are done again
        differs = not before or before[-1].by != by
        self.computed[phase] = [*before, Computed(step=index, by=by)] if differs else before
        return differs and bool(before)

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def state(self) -> Literal["queued", "running", "done", "failed", "cancelled"]:
        """For those who follow it."""
        if self.ended is None or not self.told:
            return "queued" if self.progress.phase == "queued" else "running"
        if isinstance(self.ended, Done):
            return "done"
        return "cancelled" if self.ended.error.code == "cancelled" else "failed"

    @property
    def versions(self) -> frozenset[tuple[str, str]]:
        """(component, content hash) of every version that it is computed with."""
        return frozenset(self.weights.items()) | {(c.component, c.content) for c in self.changes}

    @property
    def last_versions(self) -> dict[str, str]:
        """Component -> content hash of what it ends with, as far as is known."""
        return self.weights | {change.component: change.content for change in self.changes}

    def report(self, progress: Progress) -> None:
        """Listeners see the newest progress; one that is slow misses some."""
        self.progress = progress
        self._notify()

    def end(self, event: Done | Failed) -> None:
        """Nothing becomes of it any more but this, of which nobody is told yet."""
        assert self.ended is None, "a task ends once"
        self.ended = event

    def tell(self) -> None:
        """Those who follow it hear how it has ended."""
        assert self.ended is not None, "a task has ended before anybody is told"
        self.told = True
        self._notify()

    async def until_told(self) -> None:
        """Return when they do."""
        while not self.told:
            await self._changed.wait()

    async def events(self) -> AsyncIterator[TaskEvent]:
        """Progress, coalesced to the newest, then `Done` or `Failed`. Memory per listener: one event."""
        seen: Progress | None = None
        while True:
            changed = self._changed
            if self.progress is not seen:
                seen = self.progress
                yield seen
            if self.told and self.ended is not None:
                yield self.ended
                return
            if self.progress is seen:
                await changed.wait()

    async def result(self) -> Done:
        """Wait for the end; raises its error if it did not end well."""
        async for event in self.events():
            if isinstance(event, Done):
                return event
            if isinstance(event, Failed):
                raise from_failure(event.error)
        raise AssertionError("a task's events end with Done or Failed")

    def info(self) -> TaskInfo:
        error: Failure | None = self.ended.error if self.told and isinstance(self.ended, Failed) else None
        return TaskInfo(
            id=self.id, state=self.state, phase=self.progress.phase, step=self.progress.step, steps=self.progress.steps,
            priority=self.params["priority"], submitted_at=self.submitted_at, prompt=self.job.prompt,
            path=self.job.output, error=error,
        )  # fmt: skip

    def row(self) -> Row:
        """`info` on the wire; once it was told that it has ended, always the same."""
        if self._row is not None:
            return self._row
        row = row_of(self.info())
        self._row = row if row.finished else None
        return row

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def computed_metadata(task: Task, versions: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of a result says of what computed it. `versions`: of the processes that there are now."""
    begun = dict(versions)
    threads: dict[str, int] = {}
    changes: list[dict[str, Any]] = []
    for phase, computed in task.computed.items():
        begun |= {name: value for name, value in computed[0].by.items() if name != "threads"}
        if "threads" in computed[0].by:
            threads[STAGE_OF_PHASE[phase]] = int(computed[0].by["threads"])
        for before, after in itertools.pairwise(computed):
            now = {name: value for name, value in after.by.items() if before.by.get(name) != value}
            changes.append({"stage": STAGE_OF_PHASE[phase], "step": after.step, "now": now})
    return {"versions": begun, "threads": threads} | ({"compute_changes": changes} if changes else {})


class PooledTask(State, frozen=True, kw_only=True):
    """A `Task`; the fields have its names."""

    job: Job
    spec: TaskSpec
    params: dict[str, Any]
    submitted_at: float
    progress: Progress
    seconds: dict[Phase, float]
    metadata: dict[str, Any]
    weights: dict[str, str]
    changes: list[WeightChange]
    computed: dict[Phase, list[Computed]]
    ended: Done | Failed | None
    told: bool


class PoolState(State, frozen=True, kw_only=True):
    """A `TaskPool`. `ended`: ids, in the order in which their ends were told."""

    tasks: list[PooledTask]
    ended: list[str]
    finished: int
    failed: int


class TaskPool:
    """All tasks this supervisor knows: those that have not ended, those whose end nobody was told yet, and the last
    `KEPT_FINISHED` others."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._unfinished: dict[str, Task] = {}
        self._ending: dict[str, Task] = {}
        self._ended: collections.deque[str] = collections.deque()
        self.finished = 0
        self.failed = 0

    def add(self, task: Task) -> None:
        self._tasks[task.id] = task
        if task.ended is None:
            self._unfinished[task.id] = task
        elif not task.told:
            self._ending[task.id] = task

    def get(self, identity: str) -> Task:
        """`NotFound` if no task has this id (any more)."""
        task = self._tasks.get(identity)
        if task is None:
            raise NotFound(f"no task has the id {identity!r}; `engine list` shows the known ones")
        return task

    def find(self, identity: str) -> Task | None:
        """The task if it is known and has not ended."""
        return self._unfinished.get(identity)

    def end(self, task: Task, event: Done | Failed) -> None:
        """A task has ended; nobody is told yet."""
        task.end(event)
        del self._unfinished[task.id]
        self._ending[task.id] = task

    def tell(self, task: Task) -> None:
        """Tell how a task has ended, and forget the oldest finished one beyond the bound."""
        task.tell()
        del self._ending[task.id]
        if isinstance(task.ended, Done):
            self.finished += 1
        else:
            self.failed += 1
        self._remember(task)

    def know(self, task: Task, event: Done | Failed) -> None:
        """A task that has ended under an engine before this one."""
        task.end(event)
        task.tell()
        self._tasks[task.id] = task
        self._remember(task)

    def _remember(self, task: Task) -> None:
        self._ended.append(task.id)
        if len(self._ended) > KEPT_FINISHED:
            del self._tasks[self._ended.popleft()]

    def ending(self) -> list[Task]:
        """Those that have ended, of which nobody is told yet."""
        return list(self._ending.values())

    def unfinished(self) -> list[Task]:
        return list(self._unfinished.values())

    def running_size(self) -> RequestSize | None:
        """Of the largest task that has begun; None: there is none."""
        jobs = [task.job for task in self.unfinished() if task.state == "running"]
        sizes = [
            RequestSize(j.width, j.height, j.num_frames, max(j.guidance_scale, j.guidance_scale_2) > 1) for j in jobs
        ]
        return max(sizes, key=lambda size: (size.width * size.height * size.frames, size.guided), default=None)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def state(self) -> PoolState:
        tasks = [
            PooledTask(
                job=t.job, spec=t.spec, params=t.params, submitted_at=t.submitted_at, progress=t.progress,
                seconds=dict(t.seconds), metadata=t.metadata, weights=t.weights, changes=t.changes, computed=t.computed,
                ended=t.ended, told=t.told,
            )
            for t in self
        ]  # fmt: skip
        return PoolState(tasks=tasks, ended=list(self._ended), finished=self.finished, failed=self.failed)

    def put_back(self, state: PoolState) -> None:
        """Know what the program before this one knew."""
        for known in state.tasks:
            task = Task(known.job, known.spec, known.params, known.submitted_at)
            task.progress, task.metadata = known.progress, known.metadata
            task.ended, task.told = known.ended, known.told
            task.seconds.update(known.seconds)
            task.weights, task.changes, task.computed = known.weights, known.changes, known.computed
            self.add(task)
        self._ended.extend(state.ended)
        self.finished, self.failed = state.finished, state.failed


def task_spec(job: Job, model: ModelParams, priority: int, deadline: float | None, on_gpu: bool) -> TaskSpec:
    """What the scheduler needs to know of a job; `deadline` is on its clock."""
    return TaskSpec(
        id=job.id,
        encode=job.init is not None,
        denoise=job.steps - job.start_step,
        chunks=chunks_of(job, model),
        priority=priority,
        deadline=deadline,
        cost=estimated_cost(job, model, on_gpu),
    )


def chunks_of(job: Job, model: ModelParams) -> int:
    """In which the video is decoded and written."""
    latent_frames = (job.num_frames - 1) // model.vae.temporal_stride + 1
    return -(-latent_frames // DECODE_LATENTS)


def estimated_cost(job: Job, model: ModelParams, on_gpu: bool) -> dict[Phase, float]:
    """Seconds per quantum of each phase before anything was measured; the scheduler corrects it as it measures.

    Arithmetic of facts known beforehand: 2 * parameters * tokens + 4 * tokens^2 * dim * layers per DiT forward, over a
    rate of 500 TFLOP/s on a GPU and 50 GFLOP/s on a CPU; the others as their usual share of a step.
    """
    t, v = model.transformer, model.vae
    frames = (job.num_frames - 1) // v.temporal_stride + 1
    tokens = frames * (job.height // v.spatial_stride // t.patch_size[1]) * (
        job.width // v.spatial_stride // t.patch_size[2]
    )  # fmt: skip
    parameters = t.num_layers * (8 * t.dim**2 + 2 * t.dim * t.ffn_dim)
    forward = 2 * parameters * tokens + 4 * tokens**2 * t.dim * t.num_layers
    branches = 2 if max(job.guidance_scale, job.guidance_scale_2) > 1 else 1
    rate = 5e14 if on_gpu else 5e10
    pixels = job.height * job.width
    encoded = 1 if job.init_as == "first_frame" else job.num_frames
    vae_rate = 1.2e8 if on_gpu else 5e5
    return {
        "text": 0.06 if on_gpu else 0.05,
        "encode": pixels * encoded / (2 * vae_rate),
        "denoise": forward * branches / rate,
        "decode": pixels * min(job.num_frames, DECODE_LATENTS * v.temporal_stride) / vae_rate,
        "write": pixels * DECODE_LATENTS * v.temporal_stride / 5e7,
    }
