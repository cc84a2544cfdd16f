"""A stage process: `python -m stages.worker FD`, FD being its end of the control channel.

`Start` makes it one stage (`split`) or all of them (`fused`); a spare process gets `Prepare` before. One that gets
`ServeForks` instead is what others are forked from (`stages/forks.py`). Then it works until it is told to stop
(`stages/loop.py`). A fresh interpreter imports torch when a stage needs it: the writer's never does.

Error handling (`stages/failures.py`): what goes wrong in a quantum fails its request, and the process goes on. After an
error that leaves the CUDA context dead it exits. It exits at once when the supervisor dies: a thread waits for that,
because the main one may be in a long quantum.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ipc.channel import Channel, ChannelClosed, close_fds
from ipc.counters import ProgressCounter
from ipc.errors import EngineError, Failure, StageFailed, to_failure
from ipc.messages.names import StageName
from ipc.messages.reports import (
    Chosen,
    Loading,
    Placed,
    PlacingFile,
    Ready,
    Rehearsed,
    StartFailed,
    Unlocked,
    VaeChosen,
)
from ipc.messages.stage import AnyStageProcessMessage, Prepare, Rehearse, ServeForks, Start
from ipc.messages.weights import WeightVersion
from stages.failures import start_failure, summary
from stages.forks import serve_forks
from stages.loop import SEND_TIMEOUT, Worker, limit_memory, use_threads
from stages.outbox import Delivery
from stages.stage import Links, Stage, attach_links

EXIT_START_FAILED = 3
EXIT_ORPHANED = 5
"""The supervisor is gone."""

START_TIMEOUT = 60.0
"""Seconds until `Start` must be here."""
LOADING_INTERVAL = 0.2
"""Seconds between two reports of how much is loaded."""


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


def tell_unlocked(channel: Channel[AnyStageProcessMessage], component: str, content: str, why: str) -> None:
    """Tell the supervisor of weights in host memory whose pages could not be locked. In any thread: if the supervisor
    is gone, others notice."""
    with contextlib.suppress(ChannelClosed):
        channel.send(Unlocked(component=component, content=content, why=why), timeout=SEND_TIMEOUT)


def tell_choice(channel: Channel[AnyStageProcessMessage], chosen: Chosen | VaeChosen) -> None:
    """Tell the supervisor what the dit, or the vae, computes with."""
    channel.send(chosen, timeout=SEND_TIMEOUT)


def tell_placing(channel: Channel[AnyStageProcessMessage], identity: str) -> None:
    """Tell the supervisor that the file of a task is given its name now."""
    channel.send(PlacingFile(id=identity), timeout=SEND_TIMEOUT)


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
            lambda component, content, why: None, lambda chosen: None, lambda identity: None, lambda delivery: None,
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
            start, fds[1:], counter.increment, loading, partial(hand_over, channel), partial(tell_unlocked, channel),
            partial(tell_choice, channel), partial(tell_placing, channel), deliveries.append,
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
