"""A second process for the tests: it attaches to queues and states by descriptor and does what it is told.

Run as a script with the number of its channel end. Without torch, so that it starts fast.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import types
from collections.abc import Callable
from typing import Literal

import msgspec

from ipc.channel import Channel, ChannelClosed, close_fds
from ipc.counters import ProgressCounter
from ipc.messages.memory import QueueSpec, StateSpec
from ipc.state import StateSlot, StateSlots
from ipc.tensor_queue import TensorQueue

WAIT = 20.0
"""Seconds after which a wait in a test means that something is broken."""

LONGER = 3 * WAIT
"""Of waits that must be ended by a wake-up before the one who watches them gives up after WAIT."""


BLOCK_BYTES = 1000


class Command(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    pass


class AttachQueue(Command, frozen=True, tag="attach_queue", kw_only=True):
    spec: QueueSpec
    role: Literal["producer", "consumer"]
    epoch: int
    number: int = 0


class AttachState(Command, frozen=True, tag="attach_state", kw_only=True):
    spec: StateSpec
    epoch: int


class AttachCounter(Command, frozen=True, tag="attach_counter", kw_only=True):
    times: int


class Put(Command, frozen=True, tag="put", kw_only=True):
    """`stuck`: write half of the tensor, say so, and stay in the block for ever."""

    task: str
    sequences: list[int]
    nbytes: int
    stuck: bool = False


class Take(Command, frozen=True, tag="take", kw_only=True):
    """Answer with the digest of what was taken; free it unless it is to be kept."""

    task: str
    sequences: list[int]
    keep: bool = False


class PutForEver(Command, frozen=True, tag="put_for_ever", kw_only=True):
    """Put sequence 0, 1, 2, ... of the task until killed, block by block, so that most of the time is spent writing."""

    task: str
    nbytes: int


class CommitForEver(Command, frozen=True, tag="commit_for_ever", kw_only=True):
    """Commit step 1, 2, 3, ... of the task until killed."""

    task: str
    nbytes: int


class DieAt(Command, frozen=True, tag="die_at", kw_only=True):
    """In a child process, do `action` and be killed at its `line`-th line inside `ipc`; say whether it was."""

    action: Literal["put", "take", "claim", "commit", "release"]
    line: int
    task: str
    nbytes: int


class Say(msgspec.Struct, frozen=True):
    text: str


AnyCommand = AttachQueue | AttachState | AttachCounter | Put | Take | PutForEver | CommitForEver | DieAt


def pattern(task: str, sequence: int, nbytes: int) -> bytes:
    """Bytes that belong to this key and no other; the same in every block of BLOCK_BYTES."""
    digest = hashlib.sha256(f"{task}/{sequence}".encode()).digest()
    block = (digest * (BLOCK_BYTES // len(digest) + 1))[:BLOCK_BYTES]
    return (block * (nbytes // BLOCK_BYTES + 1))[:nbytes]


def state_tensors(step: int, nbytes: int) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    """A state all of whose bytes depend on the step."""
    data = {name: pattern(name, step, nbytes) for name in ("latents", "history")}
    return {name: ("uint8", (nbytes,), memoryview(raw)) for name, raw in data.items()}


TraceFunction = Callable[[types.FrameType, str, object], "TraceFunction | None"]


class Peer:
    """What this process is attached to."""

    def __init__(self, channel: Channel[AnyCommand]) -> None:
        self.channel = channel
        self.queue_fds: list[int] = []
        self.attached: AttachQueue | None = None
        self.queue: TensorQueue | None = None
        self.states: StateSlots | None = None

    def say(self, text: str) -> None:
        self.channel.send(Say(text), timeout=WAIT)

    def serve(self) -> None:
        while True:
            command, fds = self.channel.receive(None)
            self.handle(command, fds)

    def handle(self, command: AnyCommand, fds: list[int]) -> None:
        match command:
            case AttachQueue():
                self.queue = TensorQueue.attach(command.spec, fds, command.role, command.epoch, command.number)
                self.say("attached")
            case AttachState():
                self.states = StateSlots.attach(command.spec, fds, command.epoch)
                self.say("attached")
            case AttachCounter():
                with ProgressCounter.attach(fds[0]) as counter:
                    for _ in range(command.times):
                        counter.increment()
                self.say("counted")
            case Put():
                self.put(command)
            case Take():
                self.take(command)
            case PutForEver():
                self.put_for_ever(command)
            case CommitForEver():
                self.commit_for_ever(command)
            case DieAt():
                self.die_at(command)
        close_fds(fds)

    def put(self, command: Put) -> None:
        assert self.queue is not None
        for sequence in command.sequences:
            data = pattern(command.task, sequence, command.nbytes)
            with self.queue.put(command.task, sequence, "uint8", (command.nbytes,), LONGER) as view:
                if command.stuck:
                    view[: command.nbytes // 2] = data[: command.nbytes // 2]
                    self.say("writing")
                    signal.pause()
                view[:] = data
        self.say("put")

    def take(self, command: Take) -> None:
        assert self.queue is not None
        digest = hashlib.sha256()
        for sequence in command.sequences:
            slot = self.queue.take(command.task, sequence, LONGER)
            digest.update(slot.view)
            if not command.keep:
                slot.release()
        self.say(digest.hexdigest())

    def put_for_ever(self, command: PutForEver) -> None:
        assert self.queue is not None
        self.say("started")
        sequence = 0
        while True:
            with self.queue.put(command.task, sequence, "uint8", (command.nbytes,), LONGER) as view:
                for start in range(0, command.nbytes, BLOCK_BYTES):
                    view[start : start + BLOCK_BYTES] = pattern(command.task, sequence, BLOCK_BYTES)
            sequence += 1

    def commit_for_ever(self, command: CommitForEver) -> None:
        assert self.states is not None
        self.say("started")
        slot = self.states.claim(command.task)
        loaded = slot.load()
        step = loaded[0] if loaded else 0
        while True:
            step += 1
            slot.commit(step, state_tensors(step, command.nbytes))

    def die_at(self, command: DieAt) -> None:
        action = self.prepare(command)
        child = os.fork()
        if child == 0:
            sys.settrace(_killer(command.line))
            action()
            sys.settrace(None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), status
        self.say("killed" if os.WIFSIGNALED(status) else "finished")

    def prepare(self, command: DieAt) -> Callable[[], object]:
        task, nbytes = command.task, command.nbytes
        queue, states = self.queue, self.states
        if command.action in ("put", "take"):
            assert queue is not None
            return (lambda: _put(queue, task, nbytes)) if command.action == "put" else lambda: queue.take(task, 0, WAIT)
        assert states is not None
        if command.action == "claim":
            return lambda: states.claim(task)
        if command.action == "release":
            return lambda: states.release(task)
        slot = states.find(task)
        assert slot is not None
        return lambda: _commit(slot, nbytes)


def _put(queue: TensorQueue, task: str, nbytes: int) -> None:
    with queue.put(task, 0, "uint8", (nbytes,), WAIT) as view:
        view[:] = pattern(task, 0, nbytes)


def _commit(slot: StateSlot, nbytes: int) -> None:
    loaded = slot.load()
    step = loaded[0] + 1 if loaded else 1
    slot.commit(step, state_tensors(step, nbytes))


def _killer(line: int) -> TraceFunction:
    """A trace function that kills its own process before the `line`-th line of the `ipc` package."""
    left = line

    def trace(frame: types.FrameType, event: str, _: object) -> TraceFunction | None:
        nonlocal left
        if not frame.f_globals["__name__"].startswith("ipc."):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    with Channel[AnyCommand](sock, AnyCommand) as channel:
        try:
            Peer(channel).serve()
        except ChannelClosed:
            return


if __name__ == "__main__":
    main()
