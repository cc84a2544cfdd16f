"""A stage process: `python -m stages.worker FD`, FD being its end of the control channel.

`Start` makes it one stage (`split`) or all of them (`fused`); a spare process gets `Prepare` before. One that gets
`ServeForks` instead is what others are forked from (`stages/forks.py`). Then, until it is told to stop: all messages
that are here, then one quantum, then its answer; one that waits for a copy is given while the next quantum computes.
Answers come in the order of the grants; a dropped task's quanta are answered in their turn without being run. A fresh
interpreter imports torch when a stage needs it: the writer's never does.

Error handling: an `EngineError` fails the quantum's request; so does any other exception, with a traceback on stderr;
the process goes on. After an error that leaves the CUDA context dead it exits. It exits at once when the supervisor
dies: a thread waits for that, because the main one may be in a long quantum.
"""

from __future__ import annotations

import collections
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import msgspec

from ipc.channel import Channel, ChannelClosed, Received, close_fds
from ipc.counters import ProgressCounter
from ipc.errors import EngineError, Failure, StageFailed, to_failure
from ipc.messages import (
    STAGE_OF_COMPONENT,
    STAGE_OF_PHASE,
    Adopt,
    Adopted,
    AnyStageProcessMessage,
    AnyStageReport,
    Begin,
    Chosen,
    Drop,
    Dropped,
    Forget,
    Fork,
    Loading,
    MemoryPlan,
    MemorySet,
    Parts,
    Placed,
    PlacingFile,
    Prepare,
    QuantumDone,
    QuantumDropped,
    QuantumFailed,
    Ready,
    Rehearse,
    Rehearsed,
    Run,
    ServeForks,
    SetMemory,
    StageName,
    Start,
    StartFailed,
    Stop,
    VaeChosen,
    WeightVersion,
)
from stages.failures import describe, start_failure, summary
from stages.forks import serve_forks
from stages.outbox import Delivery, Outbox
from stages.stage import AnyNetwork, Left, Links, Stage, attach_links

EXIT_START_FAILED = 3
EXIT_ORPHANED = 5
"""The supervisor is gone."""

START_TIMEOUT = 60.0
"""Seconds until `Start` must be here."""
SEND_TIMEOUT = 60.0
"""Seconds the supervisor may leave a report unread before this process gives up on it."""
LOADING_INTERVAL = 0.2
"""Seconds between two reports of how much is loaded."""


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


class LoadingReporter:
    """Tells the supervisor how much of a component is loaded: at first, every `LOADING_INTERVAL`, and at last.

    Each call is a sign of life. A report that does not fit into the channel is left out: others follow. Raises
    `ChannelClosed` when the supervisor is gone.
    """

    def __init__(self, channel: Channel[Any], beat: Callable[[], None]) -> None:
        self._channel = channel
        self._beat = beat
        self._component = ""
        self._due = 0.0

    def __call__(self, component: str, done: int, total: int) -> None:
        self._beat()
        now = time.monotonic()
        if component == self._component and done < total and now < self._due:
            return
        self._component, self._due = component, now + LOADING_INTERVAL
        self._channel.try_send(Loading(component=component, done=done, total=total))


def hand_over(channel: Channel[AnyStageProcessMessage], version: WeightVersion, device: str, fd: int) -> None:
    """Give the supervisor a component that was placed on a device."""
    channel.send(Placed(version=version, device=device), [fd], timeout=SEND_TIMEOUT)


def tell_choice(channel: Channel[AnyStageProcessMessage], chosen: Chosen | VaeChosen) -> None:
    """Tell the supervisor what the dit, or the vae, computes with."""
    channel.send(chosen, timeout=SEND_TIMEOUT)


def tell_placing(channel: Channel[AnyStageProcessMessage], identity: str) -> None:
    """Tell the supervisor that the file of a task is given its name now."""
    channel.send(PlacingFile(id=identity), timeout=SEND_TIMEOUT)


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


def rest_of(start: Start) -> Callable[[], None]:
    """What a process does when it has nothing to do: if other processes compute on its GPU, give back the memory that
    its allocator keeps for later. (20 GiB after a step of a 14B model at 720p.)"""
    if len(start.stages) > 1 or not any(device.startswith("cuda") for device in start.devices.values()):
        return lambda: None
    import torch

    return torch.cuda.empty_cache


def load_stage(name: StageName, start: Start, links: Links) -> Stage:
    """Import a stage's module, and only then torch, and load the stage."""
    use_threads(name, start.threads)
    match name:
        case "text":
            from stages.text import TextStage

            return TextStage.load(start, links)
        case "dit":
            from stages.dit import DitStage

            return DitStage.load(start, links)
        case "vae":
            from stages.vae import VaeStage

            return VaeStage.load(start, links)
        case "writer":
            from stages.writer import WriterStage

            return WriterStage.load(start, links)


def load_torch() -> None:
    """Import torch as stages want it; may be called again."""
    if "torch" in sys.modules:
        return
    # libgomp reads this when torch is loaded. By default its threads spin at every barrier. 2 threads on 2 cores, a
    # forward of the demo model: on free cores 20 ms (passive 39, 1 thread 26), on busy ones 650-3000 (passive 90).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Without it a GB and more can be reserved in pieces too small for the next activation.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch

    torch.set_num_interop_threads(1)


def load_libraries() -> None:
    """Import what any stage needs."""
    load_torch()
    import stages.dit
    import stages.text
    import stages.vae
    import stages.writer  # noqa: F401


def prepare(device: str) -> None:
    """Load what takes its time in any stage: the libraries, and on a GPU the context and the first matrix product."""
    load_libraries()
    import torch

    if device.startswith("cuda"):
        square = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(square, square).cpu()


def load_stages(start: Start, links: Links) -> dict[StageName, Stage]:
    """Become what `start` says."""
    if start.stages != ["writer"]:
        load_torch()
    return {name: load_stage(name, start, links) for name in start.stages}


def rehearse(start: Start, fds: list[int]) -> Failure | None:
    """Become what `start` says, compute something small as each stage, and forget it; why that cannot be."""
    try:
        links = attach_links(
            start, fds, lambda: None, lambda name, done, total: None, lambda version, device, fd: None,
            lambda chosen: None, lambda identity: None, lambda delivery: None,
        )  # fmt: skip
        for stage in load_stages(start, links).values():
            stage.rehearse()
    except Exception as error:
        if isinstance(error, EngineError):
            return to_failure(error)
        traceback.print_exception(error)
        return Failure(StageFailed.code, summary(error))
    finally:
        close_fds(fds)
    return None


def ready(start: Start, stages: Mapping[StageName, Stage], seconds: float) -> Ready:
    weights = {name: digest for stage in stages.values() for name, digest in stage.weights.items()}
    versions = {name: version for stage in stages.values() for name, version in stage.versions.items()}
    return Ready(epoch=start.epoch, seconds=seconds, weights=weights, versions=versions, threads=start.threads)


def watch_supervisor(pid: int) -> int:
    """End this process when the supervisor ends, whatever the main thread does. Also if it has ended already. The
    supervisor's pidfd, which a thread waits for."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(EXIT_ORPHANED)
    if os.getppid() != pid:
        os._exit(EXIT_ORPHANED)
    threading.Thread(target=_exit_with, args=(pidfd,), name="watch-supervisor", daemon=True).start()
    return pidfd


def _exit_with(pidfd: int) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll()
    # Not a return through the interpreter: unmapping memory that the main thread uses would crash it.
    os._exit(EXIT_ORPHANED)


def run(channel: Channel[AnyStageProcessMessage]) -> int:
    """The life of the process; returns its exit code."""
    start, fds = channel.receive(START_TIMEOUT)
    if isinstance(start, ServeForks):
        try:
            watched = watch_supervisor(start.supervisor_pid)
            load_libraries()
        except Exception as error:
            return fail_to_start(channel, error)
        channel = serve_forks(channel, SEND_TIMEOUT)
        os.close(watched)  # the thread that watches it is not in this process
        start, fds = channel.receive(START_TIMEOUT)
    assert isinstance(start, Prepare | Rehearse | Start), f"got {type(start).__name__} as the first message"
    if isinstance(start, Rehearse):
        watch_supervisor(start.start.supervisor_pid)
        channel.send(Rehearsed(error=rehearse(start.start, fds)), timeout=SEND_TIMEOUT)
    if isinstance(start, Prepare):
        watch_supervisor(start.supervisor_pid)
        prepare(start.device)
    is_watched = not isinstance(start, Start)
    if not isinstance(start, Start):
        start, fds = channel.receive(None)
        assert isinstance(start, Start), f"got {type(start).__name__}, expected Start"
    began = time.perf_counter()
    counter = ProgressCounter.attach(fds[0])
    device = next(iter(start.devices.values()), "cpu")
    try:
        if not is_watched:
            watch_supervisor(start.supervisor_pid)
        loading = LoadingReporter(channel, counter.increment)
        deliveries: list[Delivery] = []
        links = attach_links(
            start, fds[1:], counter.increment, loading, partial(hand_over, channel), partial(tell_choice, channel),
            partial(tell_placing, channel), deliveries.append,
        )  # fmt: skip
        limit_memory(device, start.stages, start.limits)
        stages = load_stages(start, links)
    except ChannelClosed:
        raise
    except Exception as error:
        return fail_to_start(channel, error)
    close_fds(fds)
    rest = rest_of(start)
    rest()
    worker = Worker(channel, counter, stages, start.threads, start.memory, device, rest, deliveries)
    signal.signal(signal.SIGTERM, worker.handle_sigterm)
    channel.send(ready(start, stages, time.perf_counter() - began), timeout=SEND_TIMEOUT)
    worker.serve()
    return 0


def fail_to_start(channel: Channel[AnyStageProcessMessage], error: Exception) -> int:
    """Say why the process cannot become what it was to be; its exit code."""
    channel.send(StartFailed(error=start_failure(error)), timeout=SEND_TIMEOUT)
    return EXIT_START_FAILED


def main() -> None:
    """Ctrl-C goes to the whole group: the supervisor decides what it means, so a stage ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    channel: Channel[AnyStageProcessMessage] = Channel(socket.socket(fileno=int(sys.argv[1])), AnyStageProcessMessage)
    try:
        code = run(channel)
    except ChannelClosed:
        code = EXIT_ORPHANED
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        traceback.print_exception(error)
        code = 1
    sys.stderr.flush()
    # Everything is the kernel's to free; taking the interpreter and torch apart would only take time.
    os._exit(code)


if __name__ == "__main__":
    main()
