"""The loop of a stage process: all messages that are here, then one quantum, then its answer; one that waits for a copy
is given while the next quantum computes.

Answers come in the order of the grants; a dropped task's quanta are answered in their turn without being run. An error
fails the quantum's request, and the process goes on.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType

import msgspec

from ipc.channel import Channel, ChannelClosed, Received, close_fds
from ipc.counters import ProgressCounter
from ipc.errors import Failure, StageFailed
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import STAGE_OF_COMPONENT, STAGE_OF_PHASE, StageName
from ipc.messages.reports import (
    Adopted,
    AnyStageReport,
    Dropped,
    MemorySet,
    Parts,
    QuantumDone,
    QuantumDropped,
    QuantumFailed,
)
from ipc.messages.stage import (
    Adopt,
    AnyStageProcessMessage,
    Begin,
    Drop,
    Forget,
    Fork,
    Prepare,
    Rehearse,
    Run,
    ServeForks,
    SetMemory,
    Start,
    Stop,
)
from ipc.messages.weights import WeightVersion
from stages.failures import describe, summary
from stages.outbox import Delivery, Outbox
from stages.stage import AnyNetwork, Left, Stage

SEND_TIMEOUT = 60.0
"""Seconds the supervisor may leave a report unread before this process gives up on it."""


@dataclass(slots=True)
class Entry:
    """Something to be done in its turn. `skip`: a quantum whose task was dropped meanwhile. `fd`: what came along; it
    is closed when that is done."""

    message: Run | Drop | Adopt | SetMemory
    skip: bool = False
    fd: int = -1


class Worker:
    """The loop of one stage process.

    Resource handling: uses the channel and the stages until `serve` returns; the process ends then, and the kernel
    frees everything.
    """

    def __init__(
        self,
        channel: Channel[AnyStageProcessMessage],
        counter: ProgressCounter,
        stages: Mapping[StageName, Stage],
        threads: Mapping[StageName, int],
        plan: MemoryPlan,
        device: str,
        rest: Callable[[], None],
        deliveries: list[Delivery],
    ) -> None:
        """`plan` is what the stages were loaded with. `rest` is called when there is nothing to do, before the
        supervisor hears that the last thing is done. `deliveries` is where a step leaves what its answer waits for."""
        self._channel = channel
        self._counter = counter
        self._stages = stages
        self._threads = threads
        self._plan = plan
        self._device = device
        self._rest = rest
        self._deliveries = deliveries
        self._outbox = Outbox(partial(channel.send, timeout=SEND_TIMEOUT))
        self._entries: collections.deque[Entry] = collections.deque()
        self._begun: set[tuple[StageName, str]] = set()
        self._stopping = False
        self._idle = False

    def serve(self) -> None:
        """Work until `Stop`, SIGTERM or the end of the channel."""
        while self._listen():
            if self._entries:
                self._do(self._entries.popleft())
        self._outbox.flush()

    def _do(self, entry: Entry) -> None:
        """Carry out, and answer: at once, or, if the answer waits for something, while the next quantum computes."""
        if not isinstance(entry.message, Run):
            self._outbox.flush()
        report = self._carry_out(entry)
        answer = partial(delivered, report, self._deliveries.copy())
        waits = bool(self._deliveries) or not self._outbox.is_empty
        self._deliveries.clear()
        self._take_in_waiting()
        if self._entries and waits:
            self._outbox.put(answer)
            return
        self._outbox.flush()
        report = answer()
        if not self._entries:
            self._rest()
        self._channel.send(report, timeout=SEND_TIMEOUT)

    def handle_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Leave after the quantum in hand; at once if there is none."""
        self._stopping = True
        if self._idle:
            raise SystemExit(0)

    def _listen(self) -> bool:
        """Take in all messages that are here; wait for one if there is nothing to do. False: leave."""
        try:
            if not self._entries:
                self._take_in(self._wait())
            self._take_in_waiting()
        except ChannelClosed:
            return False
        return not self._stopping

    def _take_in_waiting(self) -> None:
        """All messages that are here."""
        while not self._stopping and (received := self._channel.try_receive()) is not None:
            self._take_in(received)

    def _wait(self) -> Received[AnyStageProcessMessage]:
        self._idle = True
        if self._stopping:  # a SIGTERM that came just before
            raise SystemExit(0)
        received = self._channel.receive(None)
        self._idle = False
        return received

    def _take_in(self, received: Received[AnyStageProcessMessage]) -> None:
        self._counter.increment()
        match message := received.message:
            case Adopt():
                self._entries.append(Entry(message, fd=received.fds.pop()))
            case Begin(stage=stage, job=job, adapters=adapters):
                for version, fd in zip(adapters, received.fds, strict=True):
                    self._network(version.component).lend(version, fd)
                self._begun.add((stage, job.id))
                self._stages[stage].begin(job)
            case SetMemory():
                # Before the quantum that was granted ahead: memory may be short now.
                runs = (n for n, entry in enumerate(self._entries) if isinstance(entry.message, Run))
                self._entries.insert(next(runs, len(self._entries)), Entry(message))
            case Run():
                self._entries.append(Entry(message))
            case Drop(id=identity, stage=stage):
                for entry in self._entries:
                    run = entry.message
                    if isinstance(run, Run) and run.id == identity and STAGE_OF_PHASE[run.phase] == stage:
                        entry.skip = True
                self._entries.append(Entry(message))
            case Forget(component=component, content=content):
                self._network(component).forget(content)
            case Stop():
                self._stopping = True
            case ServeForks() | Fork() | Prepare() | Rehearse() | Start():
                raise AssertionError("a process is started once")
        close_fds(received.fds)

    def _carry_out(self, entry: Entry) -> AnyStageReport:
        """Do what is to be done; the answer to it."""
        match entry.message:
            case Adopt(version=version):
                return self._adopt(version, entry.fd)
            case Drop(id=identity, stage=stage):
                self._stages[stage].drop(identity)
                self._begun.discard((stage, identity))
                return Dropped(id=identity, stage=stage)
            case Run(id=identity, phase=phase, index=index) as run:
                if entry.skip or (STAGE_OF_PHASE[phase], identity) not in self._begun:
                    return QuantumDropped(id=identity, phase=phase, index=index)
                return self._run(run)
            case SetMemory(plan=plan, limits=limits):
                limit_memory(self._device, list(self._stages), limits)
                return self._set_memory(plan)

    def _set_memory(self, plan: MemoryPlan) -> MemorySet:
        """All stages, or, if one cannot, none."""
        left: Left = []
        done: list[Stage] = []
        begin, failure = time.monotonic(), None
        for name, stage in self._stages.items():
            self._counter.increment()
            try:
                stage.set_memory(plan, left)
                done.append(stage)
            except Exception as error:
                failure = describe(error, name)
                for changed in done:
                    changed.set_memory(self._plan, left)
                break
        self._plan = self._plan if failure is not None else plan
        self._rest()
        return MemorySet(plan=self._plan, left=left, seconds=time.monotonic() - begin, error=failure)

    def _adopt(self, version: WeightVersion, fd: int) -> Adopted:
        failure = None
        try:
            self._network(version.component).adopt(version, fd)
        except (OSError, ValueError) as error:
            failure = Failure(StageFailed.code, summary(error))
        finally:
            os.close(fd)
        self._counter.increment()
        return Adopted(
            component=version.component, content=version.content, device=version.device, error=failure
        )  # fmt: skip

    def _network(self, component: str) -> AnyNetwork:
        return self._stages[STAGE_OF_COMPONENT[component]].networks[component]

    def _run(self, run: Run) -> QuantumDone | QuantumFailed:
        name = STAGE_OF_PHASE[run.phase]
        use_threads(name, self._threads)
        self._counter.increment()
        result, failure = None, None
        begin = time.monotonic()
        try:
            result = self._stages[name].step(run)
        except Exception as error:
            failure = describe(error, name)
        seconds = time.monotonic() - begin
        self._counter.increment()
        if failure is not None:
            return QuantumFailed(
                id=run.id, phase=run.phase, index=run.index, begin=begin, seconds=seconds, error=failure
            )
        return QuantumDone(
            id=run.id, phase=run.phase, index=run.index, begin=begin, seconds=seconds,
            parts=result if isinstance(result, Parts) else None,
            metadata=result if isinstance(result, dict) else None, copied=self._stages[name].copied(),
        )  # fmt: skip


def delivered(report: AnyStageReport, deliveries: Sequence[Delivery]) -> AnyStageReport:
    """The answer to a quantum once what it made is where it is read; of one that failed, nothing is to be delivered."""
    assert len(deliveries) <= 1, "a quantum has one result"
    if not isinstance(report, QuantumDone):
        return report
    try:
        for delivery in deliveries:
            report = msgspec.structs.replace(report, delivered=delivery())
    except Exception as error:
        failure = describe(error, STAGE_OF_PHASE[report.phase])
        return QuantumFailed(
            id=report.id, phase=report.phase, index=report.index, begin=report.begin, seconds=report.seconds,
            error=failure,
        )  # fmt: skip
    return report


def use_threads(name: StageName, threads: Mapping[StageName, int]) -> None:
    """Compute this stage's quantum on its own number of threads, whoever shares the process: part of the result."""
    if name == "writer":
        return
    import torch

    if torch.get_num_threads() != threads[name]:
        torch.set_num_threads(threads[name])


def limit_memory(device: str, stages: Sequence[StageName], limits: Mapping[StageName, int]) -> None:
    """Have torch allocate no more of a GPU than the stages of this process may, and be out of memory instead."""
    allowed = [limits[stage] for stage in stages if stage in limits]
    if not allowed or not device.startswith("cuda"):
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(allowed) / total), device)
