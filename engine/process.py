"""A stage process as the supervisor sees it: spawn it, talk to it, notice its end, reap it.

The child is forked from one that has torch loaded (`engine/forks.py`), or a fresh interpreter (`python -m
stages.worker FD`); it has nothing of ours but its end of the control channel. Death is seen by its pidfd, which cannot
name a recycled pid; a hang by its progress counter.

Resource handling: a `Body` has every descriptor that its process will need, a pidfd, a channel, the counter's memfd and
/proc/vmstat, so that nothing is lacking when it becomes a stage, or dies; a `StageProcess` lets go of them at its end.
Error handling: `on_exit` is called exactly once, after the child is reaped.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from engine.child import AdoptedChild, Child, how_it_ended, python_path
from engine.resident import Resident
from engine.states import Descriptors, State
from ipc.channel import Channel, ChannelClosed, close_fds
from ipc.counters import ProgressCounter
from ipc.errors import ProtocolError
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import Seat, StageName, stage_of
from ipc.messages.reports import AnyStageReport
from ipc.messages.stage import AnyStageProcessMessage, Prepare, Run, Start, Stop

log = logging.getLogger(__name__)

WORKER = "stages.worker"

MAX_OUTBOX = 4096
"""Messages waiting for a process that is in a long quantum; the scheduler's bounds keep it far below this."""


class BodyState(State, frozen=True, kw_only=True):
    """A `Body`; what is no pid is the place of a descriptor."""

    pid: int
    pidfd: int
    counter: int
    channel: int


class ProcessState(State, frozen=True, kw_only=True):
    """A `StageProcess`."""

    body: BodyState
    seats: tuple[Seat, ...]
    epoch: int
    ready: bool
    outstanding: int
    knows: list[tuple[str, str, str]]
    asked: list[tuple[str, str, str]]
    unlocked: list[tuple[str, str, str]]
    memory: MemoryPlan
    computes: dict[StageName, dict[str, str]]
    outbox: list[tuple[bytes, list[int]]]
    """Packets that it has not read the ones before of, and the places of the descriptors that go with each."""
    killed: bool
    leaving: bool
    oom_kills: int


class Body:
    """A process that is no stage yet, and what it is spoken to through.

    Raises OSError, and leaves nothing behind, when the system has no process or descriptor to spare.
    """

    def __init__(self, spawned: Callable[[socket.socket], Child] | None = None) -> None:
        """`spawned`: makes the process that holds this end of the channel. None: a fresh interpreter."""
        with contextlib.ExitStack() as undo:
            self.counter = ProgressCounter.create()
            undo.callback(self.counter.close)
            ours, theirs = Channel.pair()
            undo.callback(ours.close)
            with theirs:
                self.popen = (spawned or fresh_worker)(theirs)
            undo.callback(self._reap)
            # Now, not when it becomes a stage or dies: there may be no descriptor to spare by then.
            self.pidfd = os.pidfd_open(self.popen.pid)
            undo.callback(os.close, self.pidfd)
            self.vmstat = io.FileIO("/proc/vmstat")
            undo.pop_all()
        self.channel: Channel[AnyStageReport] = Channel(ours, AnyStageReport)

    @classmethod
    def restored(cls, state: BodyState, fds: Descriptors) -> Body:
        """A process that the program before this one has spawned."""
        made = cls.__new__(cls)
        made.popen = AdoptedChild(state.pid)
        made.pidfd = fds.take(state.pidfd)
        made.counter = ProgressCounter.adopt(fds.take(state.counter))
        made.channel = Channel(socket.socket(fileno=fds.take(state.channel)), AnyStageReport)
        made.vmstat = io.FileIO("/proc/vmstat")
        return made

    def state(self, fds: Descriptors) -> BodyState:
        return BodyState(
            pid=self.popen.pid, pidfd=fds.put(self.pidfd), counter=fds.put(self.counter.fd),
            channel=fds.put(self.channel.fileno()),
        )  # fmt: skip

    def prepare(self, device: str) -> None:
        """Make a spare of it: have it load what every stage needs."""
        with contextlib.suppress(ChannelClosed):
            self.channel.try_send(Prepare(supervisor_pid=os.getpid(), device=device))

    def lives(self) -> bool:
        """Reaps it if it has ended."""
        return self.popen.poll() is None

    def end(self) -> None:
        """Kill and reap a process that has nothing in hand and will not be needed. Waits for milliseconds."""
        self._reap()
        self.close()

    def close(self) -> None:
        """Let go of what belongs to a process that has been reaped."""
        os.close(self.pidfd)
        self.vmstat.close()
        self.channel.close()
        self.counter.close()

    def _reap(self) -> None:
        self.popen.kill()
        self.popen.wait()


class StageProcess:
    """One process that carries one stage (`split`) or all of them (`fused`), and the seats it has."""

    def __init__(
        self,
        body: Body,
        seats: tuple[Seat, ...],
        epoch: int,
        start: bytes | None,
        fds: Sequence[int],
        on_report: Callable[[StageProcess, AnyStageReport, list[int]], None],
        on_exit: Callable[[StageProcess, int], None],
    ) -> None:
        """Take over a process, new or spare, and send `start`, the packet that `encode_start` has made. `fds` are the
        descriptors of the queues, the state slots and the placed weights, in order. None: the program before this
        one has sent it; `put_back` comes next.

        Raises OSError, and ends the process, when the system does not let it be told or watched."""
        self.seats = seats
        """Of its stages, in the same order as in `Start`."""
        self.epoch = epoch
        self.ready = False
        self.outstanding = 0
        """Runs granted and not answered; a process with none may be silent for as long as it likes."""
        self.knows: set[tuple[str, str, str]] = set()
        """(component, content hash, device) of the versions of weights that it has mapped, or was started with."""
        self.asked: set[tuple[str, str, str]] = set()
        """Those that it is to map and has not answered about."""
        self.unlocked: dict[tuple[str, str], str] = {}
        """(component, content hash) of versions in host memory whose pages it could not lock -> why."""
        self.memory = MemoryPlan()
        """What it keeps to, as it was started with, or has said."""
        self.computes: dict[StageName, dict[str, str]] = {}
        """What the results of each stage depend on, once it is ready (`engine/settings.py`)."""
        self._on_report = on_report
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._outbox: collections.deque[tuple[bytes, list[int]]] = collections.deque()
        """Packets, and the descriptors that go with each, which are ours until it is sent."""
        self._writing = False
        self._body = body
        self.counter, self._popen, self._channel = body.counter, body.popen, body.channel
        self._pidfd = body.pidfd
        self.pid = self._popen.pid
        self.resident = Resident(self.pid)
        self.leaving = False
        """It was asked to leave, for another to take its place."""
        self.outside = False
        """Once it has ended: somebody else killed it, and not for lack of memory."""
        self.ended_by = ""
        """Once it has ended: by a signal, with an exit code, for people."""
        self._killed = False
        self.exited = asyncio.Event()
        self._seen = (self.counter.value, self._loop.time())
        self._oom_kills = 0
        if start is not None:
            self._begin(start, fds)

    def _begin(self, start: bytes, fds: Sequence[int]) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self._body.end)
            self._oom_kills = oom_kills(self._body.vmstat)
            with contextlib.suppress(ChannelClosed):  # dead already: the pidfd tells
                self._channel.try_send_packet(start, [self.counter.fd, *fds])
            self._loop.add_reader(self._channel.fileno(), self._readable)
            undo.callback(self._loop.remove_reader, self._channel.fileno())
            self._loop.add_reader(self._pidfd, self._died)
            undo.pop_all()

    # From one program to the next.

    def state(self, fds: Descriptors) -> ProcessState:
        return ProcessState(
            body=self._body.state(fds), seats=self.seats, epoch=self.epoch, ready=self.ready,
            outstanding=self.outstanding, knows=sorted(self.knows), asked=sorted(self.asked),
            unlocked=[(*version, why) for version, why in self.unlocked.items()], memory=self.memory,
            computes=self.computes,
            killed=self._killed, leaving=self.leaving, oom_kills=self._oom_kills,
            outbox=[(packet, fds.put_all(with_it)) for packet, with_it in self._outbox],
        )  # fmt: skip

    def put_back(self, state: ProcessState, fds: Descriptors) -> None:
        """Be what it was under the program before this one; it is not touched before `resume`."""
        self.ready, self.outstanding, self.knows = state.ready, state.outstanding, set(state.knows)
        self.asked, self.memory = set(state.asked), state.memory
        self.unlocked = {(component, content): why for component, content, why in state.unlocked}
        self.computes = state.computes
        self._killed, self.leaving, self._oom_kills = state.killed, state.leaving, state.oom_kills
        self._outbox.extend((packet, fds.take_all(with_it)) for packet, with_it in state.outbox)

    def resume(self) -> None:
        """Listen, and say what was left unsaid."""
        self._loop.add_reader(self._channel.fileno(), self._readable)
        self._loop.add_reader(self._pidfd, self._died)
        self._flush()

    def seat(self, stage: StageName) -> Seat:
        """Where it is this stage."""
        return next(seat for seat in self.seats if stage_of(seat) == stage)

    def send(self, message: AnyStageProcessMessage, fds: Sequence[int] = ()) -> None:
        """Queue a message; it goes out at once unless the process has not read the earlier ones. `fds` stay the
        caller's.

        ValueError for a message that cannot be sent; the others are not held up by it.
        """
        if self._pidfd < 0:
            return
        if len(self._outbox) >= MAX_OUTBOX:
            self.kill()
            return
        packet = self._channel.encode(message, len(fds))
        self._outbox.append((packet, [os.dup(fd) for fd in fds]))
        self._flush()

    def send_run(self, run: Run) -> None:
        """Grant a quantum. From now on the process is expected to make progress."""
        if not self.outstanding:
            self._seen = (self.counter.value, self._loop.time())
        self.outstanding += 1
        self.send(run)

    def leave(self) -> None:
        """Have it end after the quantum in hand. From now on it is expected to make progress."""
        if not self.outstanding:
            self._seen = (self.counter.value, self._loop.time())
        self.leaving = True
        self.send(Stop())

    def kill(self) -> None:
        """SIGKILL; `on_exit` follows when it is reaped. One that somebody has stopped did nothing to deserve it."""
        if self._pidfd >= 0:
            self._killed = not is_stopped(self.pid)
            with contextlib.suppress(ProcessLookupError):  # gone, and reaped by someone else
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def silent_for(self, now: float) -> float:
        """Seconds since the progress counter last moved; `now` is the loop's time."""
        value = self.counter.value
        if value != self._seen[0]:
            self._seen = (value, now)
        return now - self._seen[1]

    def _flush(self) -> None:
        try:
            while self._outbox and self._channel.try_send_packet(*self._outbox[0]):
                close_fds(self._outbox.popleft()[1])
        except OSError:
            # The peer is gone: its end is reported by the pidfd, and what was to be said no longer matters.
            self._clear_outbox()
        if bool(self._outbox) == self._writing:
            return
        self._writing = not self._writing
        if self._writing:
            self._loop.add_writer(self._channel.fileno(), self._flush)
        else:
            self._loop.remove_writer(self._channel.fileno())

    def _clear_outbox(self) -> None:
        while self._outbox:
            close_fds(self._outbox.popleft()[1])

    def _readable(self) -> None:
        try:
            while (received := self._channel.try_receive()) is not None:
                self._on_report(self, received.message, received.fds)
        except ChannelClosed:
            self._loop.remove_reader(self._channel.fileno())
        except (OSError, ProtocolError):
            # Undecodable words from a stage: it cannot be trusted any more.
            self._loop.remove_reader(self._channel.fileno())
            self.kill()

    def _died(self) -> None:
        """The pidfd is readable: the child has ended. Read its last words, reap it, tell."""
        status = -1
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            if result is None:
                return
            status = -result.si_status if result.si_code != os.CLD_EXITED else result.si_status
            self.ended_by = how_it_ended(status)
        except ChildProcessError:
            # Reaped by someone else: SIGCHLD is ignored, or the host waits for any child. How it ended is not known.
            log.warning("process %d of %s was reaped by another part of this process", self.pid, self.seats)
            self.ended_by = "nobody knows of what"
        self._readable_to_the_end()
        self._popen.returncode = status
        self.outside = (
            status == -signal.SIGKILL and not self._killed and oom_kills(self._body.vmstat) == self._oom_kills
        )
        self._release()
        self.exited.set()
        self._on_exit(self, status)

    def _readable_to_the_end(self) -> None:
        if self._channel.fileno() >= 0:
            self._readable()

    def _release(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        self._body.close()
        self._pidfd = -1
        self._clear_outbox()


def encode_start(start: Start, fds: Sequence[int]) -> bytes:
    """The packet of `start`, with room for the progress counter's descriptor before `fds`. ValueError if it cannot be
    sent: found out before there is a process."""
    return Channel.encode(start, 1 + len(fds))


def fresh_worker(channel_end: socket.socket) -> Child:
    """A stage process, with the code that is on disk now. OSError as `spawn`."""
    return spawn(WORKER, channel_end)


def spawn(module: str, channel_end: socket.socket) -> subprocess.Popen[bytes]:
    """`python -m module FD`: a new interpreter that holds `channel_end` and nothing else of ours. `-P`: nothing is
    imported from the cwd. OSError when the system has no process to spare."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(channel_end.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=(channel_end.fileno(),),
        env={**os.environ, "PYTHONPATH": python_path()},
    )


def is_stopped(pid: int) -> bool:
    """The process was stopped by a signal or a debugger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


def oom_kills(vmstat: io.FileIO) -> int:
    """Processes that the kernel has killed for lack of memory since it was started, in any container, as the open
    /proc/vmstat says."""
    vmstat.seek(0)
    return next((int(line.split()[1]) for line in vmstat.readall().splitlines() if line.startswith(b"oom_kill ")), 0)
