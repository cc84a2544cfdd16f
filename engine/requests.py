"""The unfinished requests of an engine, from when one is asked for to its end: none is accepted that is not in the
journal, of none the end is told before the journal has it, and no two write to the same file.

How they are computed is for the scheduler to say, how far they are for `engine/running.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from engine.admission import resolved_params
from engine.journal import Ended, Ending, Entry, Journal
from engine.left import Left
from engine.loras import Loras
from engine.params import ModelParams, SystemParams, UserParams
from engine.scheduler import Scheduler
from engine.tasks import Task, TaskPool, log_level, task_spec
from ipc.errors import BadRequest, Busy, OutputError, ServerUnavailable, StageFailed, to_failure
from ipc.messages.job import Job
from ipc.messages.server import Accepted, Done, Failed

LONGEST_WRITE = 4.0
"""Seconds for which the end of a request waits for the journal's disk before it is told all the same: less than a
client waits for the answer to a cancel."""

log = logging.getLogger(__name__)


class Host(Protocol):
    """What the requests need of the supervisor."""

    @property
    def is_serving(self) -> bool:
        """It accepts requests."""

    def check_serving(self) -> None:
        """`ServerUnavailable` if it does not."""

    def check(self, user: UserParams) -> Job:
        """Everything that can be wrong with a request; blocks. `BadRequest`."""

    def handle_accepted(self, task: Task) -> None:
        """A task may be computed from now on."""

    def handle_idle(self) -> None:
        """The last unfinished request has ended."""


class Requests:
    """Accepts requests, writes them down, and ends them.

    Resource handling: between an admission and `close`, requests may be on their way into the journal or out of it.
    Error handling: `submit` raises why a request is not accepted, and leaves nothing of it then; what ends an accepted
    one is its last event.
    """

    def __init__(
        self,
        host: Host,
        params: SystemParams,
        model: ModelParams,
        pool: TaskPool,
        scheduler: Scheduler,
        journal: Journal | None,
        loras: Loras,
        on_gpu: bool,
    ) -> None:
        """`pool`: with the tasks of the program before this one, if there was one."""
        self._host, self._params, self._model = host, params, model
        self._pool, self._scheduler, self._journal, self._loras = pool, scheduler, journal, loras
        self._on_gpu = on_gpu
        self._loop = asyncio.get_running_loop()
        self._outputs = {task.job.output for task in (*pool.unfinished(), *pool.ending())}
        """That are being written, or will be, or were by a request whose end the journal does not have yet."""
        self.idle = asyncio.Event()
        """Set while no request is unfinished."""
        if not pool.unfinished():
            self.idle.set()
        self._admitting = 0
        self._no_admissions = asyncio.Event()
        self._no_admissions.set()
        self._background: set[asyncio.Task[None]] = set()

    async def submit(self, user: UserParams) -> Accepted:
        """Check a request completely, journal it, queue it. Raises `BadRequest`, `Busy`, or `ServerUnavailable` if the
        engine stops meanwhile."""
        self._check_room()
        self._admitting += 1
        self._no_admissions.clear()
        try:
            if user.lora:
                await self._loras.taken_back()
            job = await asyncio.to_thread(self._host.check, user)
            self._check_output(user, job)
            with self._loras.adapters.lend(job):
                self._outputs.add(job.output)
                try:
                    return await self._accept(user, job)
                except BaseException:
                    self._outputs.discard(job.output)
                    raise
        finally:
            self._admitting -= 1
            if not self._admitting:
                self._no_admissions.set()

    def _check_room(self) -> None:
        unfinished = len(self._pool.unfinished()) + self._admitting
        if unfinished >= self._params.max_queue:
            wait = self._scheduler.retry_after()
            raise Busy(f"{unfinished} requests are waiting or running, which is the limit; try again", wait)

    def _check_output(self, user: UserParams, job: Job) -> None:
        if job.output in self._outputs:
            raise BadRequest(f"another unfinished request already writes to {user.output!r}; choose another name")

    async def _accept(self, user: UserParams, job: Job) -> Accepted:
        entry = self._entry(user, job, user.deadline)
        self._host.check_serving()
        if self._journal is not None:
            await self._write_down(self._journal, entry)
        self._host.check_serving()
        position = len(self._pool.unfinished())
        self._take_up(entry)
        return Accepted(id=job.id, position=position, params=entry.params)

    def _entry(self, user: UserParams, job: Job, deadline: float | None) -> Entry:
        """`deadline`: seconds from now."""
        now = time.time()
        return Entry(
            model=self._model.name, job=job, params=resolved_params(user, job, self._model), submitted_at=now,
            priority=user.priority, deadline_at=None if deadline is None else now + deadline,
        )  # fmt: skip

    async def _write_down(self, journal: Journal, entry: Entry) -> None:
        """Journal a request; if it will not be accepted after all, take it out again."""
        adding = self._loop.create_task(journal.add(entry))
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            self._in_background(journal.withdraw(entry.job.id, adding))
            raise
        if not self._host.is_serving:
            await journal.withdraw(entry.job.id, adding)

    def take_trial(self, user: UserParams, job: Job, weights: dict[str, str]) -> None:
        """Accept a request that is not journalled and has no deadline, to be computed with these versions. Raises
        `BadRequest` or `ServerUnavailable`."""
        self._check_output(user, job)
        entry = self._entry(user, job, None)
        self._host.check_serving()
        self._take_up(entry, weights)

    def take_back(self, left: Left) -> None:
        """Take up what an earlier run has left in the journal; what needs an adapter waits until it is read again."""
        for ended in left.ended:
            if ended.entry.model == self._model.name:
                self._know(ended)
        mine = [entry for entry in left.entries if entry.model == self._model.name]
        if mine:
            log.info("taking up %d unfinished requests of the journal", len(mine))
        self._loras.take_back(left.adapters, [entry.job for entry in mine], self._schedule_waiting)
        for entry in left.entries:
            if entry.model == self._model.name:
                self._take_up(entry)
            else:
                log.warning("request %s in the journal is for %s and waits for it", entry.job.id, entry.model)

    def _take_up(self, entry: Entry, weights: dict[str, str] | None = None) -> None:
        """A new task, or one from the journal; to be computed with these `weights`, or those that are served when it
        begins."""
        self._outputs.add(entry.job.output)
        self.idle.clear()
        task = self._task(entry)
        task.weights = weights or {}
        self._pool.add(task)
        if not (self._loras.is_taking_back and self._loras.adapters.missing(entry.job)):
            self._schedule(task)

    def _know(self, ended: Ended) -> None:
        """A task that had ended when the engine was killed; who followed it may not have heard."""
        task = self._task(ended.entry)
        task.progress = ended.ending.progress
        self._pool.know(task, ended.ending.event)

    def _task(self, entry: Entry) -> Task:
        deadline = None
        if entry.deadline_at is not None:
            deadline = self._loop.time() + entry.deadline_at - time.time()
        spec = task_spec(entry.job, self._model, entry.priority, deadline, self._on_gpu)
        return Task(entry.job, spec, entry.params, entry.submitted_at)

    def _schedule(self, task: Task) -> None:
        """To be run from now on; or it fails, if its adapters are lost."""
        if gone := self._loras.adapters.missing(task.job):
            self.end(task, Failed(id=task.id, error=to_failure(self._loras.lost(gone[0]))))
        else:
            self._host.handle_accepted(task)

    def _schedule_waiting(self) -> None:
        """The adapters are there that an earlier run has kept, or are lost."""
        for task in self._pool.unfinished():
            if task.id not in self._scheduler:
                self._schedule(task)
        self._loras.let_go()

    def end(self, task: Task, event: Done | Failed) -> None:
        """Let go of all that a task had; tell those who follow it how it ended, once the journal has that. If the
        engine is killed before, it has not ended, and they have heard nothing else."""
        self._pool.end(task, event)
        if isinstance(event, Failed):
            _unlink(task.job)
        if self._journal is not None and not _is_ours(event):
            self._in_background(self._write_end(self._journal, task, event))
        else:
            self._tell(task, event)
        self._loras.let_go()
        if not self._pool.unfinished():
            self.idle.set()
            self._host.handle_idle()

    async def _write_end(self, journal: Journal, task: Task, event: Done | Failed) -> None:
        try:
            async with asyncio.timeout(LONGEST_WRITE):
                await journal.end(task.id, Ending(event=event, progress=task.progress))
        except (OutputError, TimeoutError) as error:
            why = str(error) or f"the journal's disk has not answered for {LONGEST_WRITE:g} s"
            log.error("%s; tried again with the next request", why)
        finally:
            self._tell(task, event)

    def _tell(self, task: Task, event: Done | Failed) -> None:
        self._pool.tell(task)
        why = f": {event.error.message}" if isinstance(event, Failed) else ""
        log.log(log_level(event), "%s %s after %.1f s%s", task.id, task.state, time.time() - task.submitted_at, why)
        self._outputs.discard(task.job.output)

    def resume(self) -> None:
        """Under the next program: go on telling how tasks have ended."""
        for task in self._pool.ending():
            assert self._journal is not None and task.ended is not None, "only the journal is waited for"
            self._in_background(self._write_end(self._journal, task, task.ended))

    def abandon(self) -> None:
        """The engine stops: for those who follow them, all tasks end. The journal keeps them."""
        kept = "submit it again" if self._journal is None else "it stays in the journal and continues at the next start"
        for task in self._pool.unfinished():
            error = ServerUnavailable(f"the engine stopped before this request was finished; {kept}")
            self._pool.end(task, Failed(id=task.id, error=to_failure(error)))
            self._pool.tell(task)
        self.idle.set()

    async def close(self) -> None:
        """No stage lives any more. Remove what they have left of files; return when nobody waits for an answer to
        `submit`, the journal is up to date, and every end is told."""
        for task in self._pool:
            _unlink(task.job)
        await self._no_admissions.wait()
        if self._background:
            await asyncio.wait(self._background)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_ended)

    def _background_ended(self, task: asyncio.Task[None]) -> None:
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
