"""The tasks as the stages have them: what each stage is told of a task, which weights it is computed with, what has
computed it so far, and how far it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Literal

import msgspec

from engine.adapters import Adapters, adapter_metadata
from engine.checkpoint import EXPERTS, lora_metadata
from engine.crew import Crew
from engine.events import Report
from engine.params import ModelParams
from engine.records import PHASES_OF
from engine.scheduler import Scheduler
from engine.tasks import Task, TaskPool, computed_metadata
from engine.version import VERSION
from hotreload.checkpoint import Checkpoint
from ipc.messages.job import Job
from ipc.messages.names import STAGE_OF_COMPONENT, STAGE_OF_PHASE, Phase, Seat, stage_of
from ipc.messages.reports import QuantumDone
from ipc.messages.server import Progress
from ipc.messages.stage import Begin, Drop, Run
from ipc.messages.weights import WeightChange

log = logging.getLogger(__name__)


class RunningTasks:
    """Tells the stages of tasks, and their listeners how far they are.

    A task keeps the versions of weights that are served when its first stage hears of it, unless it is told to change.
    """

    def __init__(
        self,
        model: ModelParams,
        checkpoint: Checkpoint,
        pool: TaskPool,
        scheduler: Scheduler,
        crew: Crew,
        adapters: Adapters,
    ) -> None:
        self._model, self._checkpoint = model, checkpoint
        self._pool, self._scheduler, self._crew, self._adapters = pool, scheduler, crew, adapters

    # What the stages are told.

    def begin(self, seat: Seat, task: Task) -> None:
        """Tell a stage of a task that its process has not heard of."""
        # Later ones for what was not loaded yet: the first stages are up before the last.
        task.weights = {**self._crew.weights.serving, **task.weights}
        self._tell(seat, task)

    def run(self, seat: Seat, task: Task, phase: Phase, index: int) -> None:
        """Grant a stage a quantum; with the last, the writer hears how long all took."""
        last = phase == "write" and index == task.spec.chunks - 1
        seconds = dict(task.seconds) if last else None
        self._crew.run(seat, Run(id=task.id, phase=phase, index=index, seconds=seconds))

    def drop(self, seat: Seat, identity: str) -> None:
        """Have a stage forget a task."""
        self._crew.send(seat, Drop(id=identity, stage=stage_of(seat)))

    def _tell(self, seat: Seat, task: Task) -> None:
        """With what a stage needs for the task's adapters, if it is a dit."""
        stage = stage_of(seat)
        lent = self._adapters.of(task.job) if stage == "dit" else []
        begin = Begin(stage=stage, job=self._described(task), adapters=[version for version, _ in lent])
        self._crew.send(seat, begin, [fd for _, fd in lent])

    def _described(self, task: Task) -> Job:
        """The job with the metadata that goes into the file; the weights are known once their stage is up."""
        job = task.job
        metadata = {
            "engine": VERSION, "model": self._model.name, "task": task.id, "parameters": task.params, "seed": job.seed,
            "weights": task.weights, "device": self._crew.device, **computed_metadata(task, self._crew.versions),
        } | lora_metadata(self._checkpoint) | adapter_metadata(job)  # fmt: skip
        if task.changes:
            metadata["weight_changes"] = msgspec.to_builtins(task.changes)
        if job.init is not None:
            metadata["init"] = {"file": os.path.basename(job.init), "as": job.init_as}
        return msgspec.structs.replace(job, metadata=metadata, weights=task.weights, changes=task.changes)

    # The weights.

    def _known(self) -> list[Task]:
        """Those that a stage may still know."""
        return [task for task in self._pool if task.ended is None or task.id in self._scheduler]

    def jobs(self) -> list[Job]:
        """Of each task that a stage may still know."""
        return [task.job for task in self._known()]

    def weights_in_use(self) -> list[frozenset[tuple[str, str]]]:
        """Of each task that a stage may still know: (component, content hash)."""
        return [task.versions for task in self._known()]

    def ending_with_others(self, weights: Mapping[str, str]) -> int:
        """How many of the tasks that a stage may still know end with other versions of these components."""
        lasts = [task.last_versions for task in self._known()]
        return sum(any(last.get(name, content) != content for name, content in weights.items()) for last in lasts)

    def change_weights(self, weights: dict[str, str]) -> None:
        """Have running tasks change to these versions: a transformer between two steps, another component where nothing
        was computed with it yet."""
        for task in self._pool.unfinished():
            for component, content in weights.items():
                if task.last_versions.get(component) not in (None, content):
                    self._change(task, component, content)

    def _change(self, task: Task, component: str, content: str) -> None:
        stage = STAGE_OF_COMPONENT[component]
        step = max(self._scheduler.granted(task.id, phase) for phase in PHASES_OF[stage])
        if step and (component not in EXPERTS or step >= task.spec.denoise):
            return
        # What was to come with a step that is not granted yet, or not any more, does not come.
        task.changes = [c for c in task.changes if c.component != component or c.step < step]
        if not step:
            task.weights[component] = content
        elif task.last_versions[component] != content:
            task.changes.append(WeightChange(step=step, component=component, content=content))
        if (seat := self._scheduler.seat_of(task.id, stage)) is not None:
            self._tell(seat, task)

    # How far they are.

    def note_done(self, seat: Seat, done: QuantumDone) -> None:
        """A quantum is computed. The writer, if it knows the task already, hears of a change in what computes it."""
        if (task := self._pool.find(done.id)) is None:
            return
        task.seconds[done.phase] += done.seconds
        if task.note_computed(done.phase, done.index, self._crew.computes(seat)):
            log.info("%s is computed with other settings from %s %d on", task.id, done.phase, done.index)
            if task.id in self._scheduler and (writer := self._scheduler.seat_of(task.id, "writer")) is not None:
                self._tell(writer, task)
        if done.metadata is not None:
            task.metadata = done.metadata

    def report(self, view: Report) -> None:
        """Pass the scheduler's view of a task on to its listeners."""
        if (task := self._pool.find(view.id)) is None:
            return
        progress = Progress(
            id=view.id, phase=view.phase, step=view.step, steps=view.steps, seconds_left=view.seconds_left,
            memory_level=self._level_of(view.id, view.phase),
        )  # fmt: skip
        task.report(progress)

    def report_levels(self) -> None:
        """Tell the listeners of those tasks whose memory level is another now."""
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
