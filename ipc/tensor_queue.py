"""A bounded queue of tensors between two stage processes: the data path.

A fixed number of slots of a fixed size. A slot goes FREE -> WRITING -> READY -> READING -> FREE. The producer writes
the tensor into the slot itself and the consumer reads it there, so handing over costs one copy. The supervisor's
descriptors keep the bytes alive when either side dies, so a restarted consumer finds its slots again.

Several processes may be at one side. Each producer fills its own part of the slots; a task is with one consumer at a
time. What a dead process had in hand is told from what its siblings have by its epoch, which is on every slot.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from ipc.layout import MAX_U64, tensor_bytes
from ipc.messages.memory import QueueSpec
from ipc.messages.status import Holding, QueueStatistics
from ipc.payload import DeviceFd, Payload, Room, adopt_payload, attach_payload, make_payload, place_name
from ipc.slot_table import MAX_PROCESSES, Key, Side, SlotState, SlotTable

FDS_PER_QUEUE = 4
"""Header memfd, payload memfd (or GPU memory's descriptor), eventfd "ready" (producer to consumer), eventfd "free"
(consumer to producer)."""

LOOK_AGAIN = 0.1
"""Seconds after which one who waits looks again unasked: a sibling, which waits for something else, may have heard the
signal that was meant for it."""

AWAKE = 200e-6
"""Seconds for which one who waits looks again and again before it sleeps: waking it takes 60 to 130 us."""

Role = Literal["producer", "consumer", "supervisor"]

_HELD = (SlotState.READY, SlotState.READING)


class QueueTimeout(TimeoutError):
    """The other side did not come in time: no slot was freed, or the tensor was not put."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A tensor that the consumer has taken.

    `view`: its bytes, in shared memory or on a GPU. They must not be written to: after a crash the next process reads
    them again. They are the consumer's until `release`, or `TensorQueue.release` of the task; then they may change.
    """

    dtype: str
    shape: tuple[int, ...]
    view: Room
    release: Callable[[], None]
    """Give the slot back. Does nothing if that was already done."""


class TensorQueue:
    """One end of a queue, or the supervisor's handle on it.

    `create` makes the supervisor's handle, which holds everything; `attach` makes a producer's or consumer's end from
    its `spec` and `fds`. A queue has at most one living process of each number at each side, and each end is used by
    one thread at a time. When a process is dead **and reaped**, the supervisor calls `reclaim` before a new one of its
    number attaches, and before a task that it had goes to a sibling.

    Resource handling: owns 4 descriptors; `attach` duplicates the ones it is given, so the caller still closes those.
    Memory under a `Slot.view` stays mapped until the view is gone, even after `close`.

    Error handling: QueueTimeout at a deadline; ValueError for a tensor that does not fit or is put twice;
    AssertionError for a state or role that the rules exclude.
    """

    def __init__(
        self,
        spec: QueueSpec,
        role: Role,
        table: SlotTable,
        payload: Payload,
        ready_fd: int,
        free_fd: int,
        *,
        epoch: int = 0,
        number: int = 0,
    ) -> None:
        """Take over the parts; use `create` or `attach`."""
        self._spec = spec
        self._role = role
        self._epoch = epoch
        self._number = number
        self._table = table
        self._payload = payload
        self._ready_fd = ready_fd
        self._free_fd = free_fd

    @classmethod
    def create(
        cls,
        name: str,
        slots: int,
        slot_bytes: int,
        producers: int = 1,
        consumers: int = 1,
        on: DeviceFd | None = None,
    ) -> Self:
        """Allocate `slots` slots for tensors of at most `slot_bytes` bytes; OSError when the memory is not there.

        Of several producers, each has its part of the slots: as many as there may be of all tensors together, if none
        is to wait while another has slots to spare. `on`: GPU memory of `payload_bytes` bytes for the slots, whose
        descriptor is taken over; None: host memory.
        """
        if slots < 1 or slot_bytes < 1:
            raise ValueError(f"queue {name!r}: got {slots} slots of {slot_bytes} bytes, expected at least 1 of 1")
        if not (1 <= producers <= min(slots, MAX_PROCESSES) and 1 <= consumers <= MAX_PROCESSES):
            raise ValueError(
                f"queue {name!r}: got {producers} producers and {consumers} consumers of {slots} slots, expected 1 to "
                f"{MAX_PROCESSES} of each, and a slot for each producer"
            )
        spec = QueueSpec(
            name=name, slots=slots, slot_bytes=slot_bytes, producers=producers, consumers=consumers,
            device=None if on is None else on.device,
        )  # fmt: skip
        with contextlib.ExitStack() as undo:
            table = SlotTable.create(f"{name}-headers", slots, slot_bytes)
            undo.callback(table.close)
            payload = make_payload(name, slots, slot_bytes, on)
            undo.callback(payload.close)
            ready_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, ready_fd)
            free_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.pop_all()
        return cls(spec, "supervisor", table, payload, ready_fd, free_fd)

    @classmethod
    def attach(cls, spec: QueueSpec, fds: list[int], role: Side, epoch: int, number: int = 0) -> Self:
        """The end of a process of this epoch (at least 1), the `number`th of its side. ValueError if the descriptors or
        the number do not fit the spec."""
        if len(fds) != FDS_PER_QUEUE:
            raise ValueError(f"queue {spec.name!r}: got {len(fds)} descriptors, expected {FDS_PER_QUEUE}")
        if not 0 <= number < (count := spec.producers if role == "producer" else spec.consumers):
            raise ValueError(f"queue {spec.name!r}: got {role} {number}, expected 0 to {count - 1}")
        header, payload_fd, ready, free = fds
        with contextlib.ExitStack() as undo:
            table = SlotTable.attach(header, spec.slots, spec.slot_bytes)
            undo.callback(table.close)
            payload = attach_payload(spec.slots, spec.slot_bytes, [payload_fd], spec.device)
            undo.callback(payload.close)
            ready_fd = os.dup(ready)
            undo.callback(os.close, ready_fd)
            free_fd = os.dup(free)
            undo.pop_all()
        table.enter(role, number, epoch)
        return cls(spec, role, table, payload, ready_fd, free_fd, epoch=epoch, number=number)

    @classmethod
    def adopt(cls, spec: QueueSpec, fds: Sequence[int]) -> Self:
        """The supervisor's handle, made again by the program that takes the place of the one that had it: takes over
        the descriptors. ValueError if they do not fit the spec."""
        header, payload_fd, ready_fd, free_fd = fds
        table = SlotTable.attach(header, spec.slots, spec.slot_bytes)
        os.close(header)
        payload = adopt_payload(spec.slots, spec.slot_bytes, payload_fd, spec.device)
        return cls(spec, "supervisor", table, payload, ready_fd, free_fd)

    @property
    def spec(self) -> QueueSpec:
        return self._spec

    @property
    def fds(self) -> list[int]:
        """FDS_PER_QUEUE descriptors, in the order that `attach` wants; they stay owned by this object."""
        return [self._table.fd, *self._payload.fds, self._ready_fd, self._free_fd]

    # Producer.

    @contextlib.contextmanager
    def put(self, task: str, sequence: int, dtype: str, shape: tuple[int, ...], timeout: float) -> Iterator[Room]:
        """A free slot to write a tensor into, C-contiguous; leaving the block publishes it, an exception gives it back.
        On a GPU the writing must be done, not only queued, when the block is left.

        Waits up to `timeout` seconds for a free slot of this producer's part. A key that is already there is a
        ValueError: ask `holds` first.
        """
        assert self._role == "producer", f"put by the {self._role}"
        key = self._key(task, sequence)
        nbytes = tensor_bytes(dtype, shape)
        if nbytes > self._spec.slot_bytes:
            raise ValueError(f"queue {self._spec.name!r}: got {nbytes} bytes, expected at most {self._spec.slot_bytes}")
        if self._table.find(key, (*_HELD, SlotState.WRITING)) is not None:
            raise ValueError(f"queue {self._spec.name!r}: task {task} sequence {sequence} is already there")
        slot = self._await(self._free_fd, self._free_slot, timeout, "free slot")
        self._table.describe(slot, key, dtype, shape, self._epoch)
        self._table.transition(slot, SlotState.FREE, SlotState.WRITING)
        self._table.count_depth(slot)
        try:
            yield self._payload.view(slot)[:nbytes]
        except BaseException:
            self._table.transition(slot, SlotState.WRITING, SlotState.FREE)
            raise
        self._table.count_put(slot, nbytes)
        self._table.transition(slot, SlotState.WRITING, SlotState.READY)
        os.eventfd_write(self._ready_fd, 1)

    def holds(self, task: str, sequence: int) -> bool:
        """Whether this tensor is already there: a quantum that is run again after a crash need not put it again."""
        return self._table.find(self._key(task, sequence), _HELD) is not None

    def _free_slot(self) -> int | None:
        return self._table.free(self._number, self._spec.producers)

    # Consumer.

    def take(self, task: str, sequence: int, timeout: float) -> Slot:
        """Wait up to `timeout` seconds for this tensor, whatever was put before it. It may be taken again."""
        assert self._role == "consumer", f"take by the {self._role}"
        key = self._key(task, sequence)
        what = f"task {task} sequence {sequence}"
        slot = self._await(self._ready_fd, lambda: self._table.find(key, _HELD), timeout, what)
        if self._table.states()[slot] == SlotState.READY:
            self._table.stamp_reader(slot, self._epoch)
            self._table.transition(slot, SlotState.READY, SlotState.READING)
        contents = self._table.contents(slot)
        return Slot(
            dtype=contents.dtype,
            shape=contents.shape,
            view=self._payload.view(slot)[: contents.nbytes],
            release=lambda: self._release_slot(slot, contents.ticket),
        )

    def release(self, task: str) -> int:
        """Free every slot of this task, which is with this consumer, that is READY or READING; how many there were.

        A slot that the producer is still writing is not among them: make the producer drop the task first.
        """
        assert self._role == "consumer", f"release by the {self._role}"
        return self._free(task)

    def _release_slot(self, slot: int, ticket: int) -> None:
        if self._table.is_held(slot, ticket):
            self._table.transition(slot, SlotState.READING, SlotState.FREE)
            os.eventfd_write(self._free_fd, 1)

    # Supervisor.

    def reclaim(self, dead: Side, epoch: int) -> int:
        """Give back what the process of this epoch, dead and reaped, had in hand at this side; how many slots.

        A producer's half-written slots become FREE; what a consumer was reading becomes READY for whoever is next.
        """
        assert self._role == "supervisor", f"reclaim by the {self._role}"
        had, becomes = {
            "producer": (SlotState.WRITING, SlotState.FREE),
            "consumer": (SlotState.READING, SlotState.READY),
        }[dead]
        slots = self._table.in_hand(dead, epoch)
        for slot in slots:
            self._table.transition(slot, had, becomes)
        return len(slots)  # nobody to wake: a successor looks before it waits

    def purge(self, task: str) -> int:
        """Free every slot of this task that is READY or READING; how many there were.

        Done in the place of a consumer that is dead and reaped, or has dropped the task.
        A slot that a living producer is still writing is not among them, and will be READY: purge when the producer has
        no quantum of this task in hand.
        """
        assert self._role == "supervisor", f"purge by the {self._role}"
        return self._free(task)

    def statistics(self) -> QueueStatistics:
        """Counted since `create`, across restarts of either side."""
        counts = self._table.counts()
        return QueueStatistics(
            name=self._spec.name,
            slots=self._spec.slots,
            slot_bytes=self._spec.slot_bytes,
            depth=self._table.depth(),
            peak=counts.peak,
            puts=counts.puts,
            bytes=counts.bytes,
        )

    def holdings(self) -> list[Holding]:
        """What is in the slots, and who has it."""
        return self._table.holdings(self._spec.name, place_name(self._spec.device))

    def check_integrity(self) -> list[str]:
        """Broken rules, one sentence each; empty when all is well. Call it while neither side moves a slot."""
        return [f"queue {self._spec.name!r}: {problem}" for problem in self._table.problems(self._spec.slot_bytes)]

    # All.

    def close(self) -> None:
        if self._ready_fd < 0:
            return
        self._table.close()
        self._payload.close()
        os.close(self._ready_fd)
        os.close(self._free_fd)
        self._ready_fd = self._free_fd = -1

    def _free(self, task: str) -> int:
        slots = self._table.of_task(task, _HELD)
        for slot in slots:
            self._table.transition(slot, SlotState(self._table.states()[slot]), SlotState.FREE)
        if slots:
            os.eventfd_write(self._free_fd, 1)
        return len(slots)

    def _await(self, eventfd: int, look: Callable[[], int | None], timeout: float, what: str) -> int:
        """What `look` finds, looking again each time the other side signals `eventfd`."""
        now = time.monotonic()
        deadline, asleep = now + timeout, now + AWAKE
        poller = None
        while (found := look()) is None:
            if (now := time.monotonic()) < asleep:
                continue
            left = deadline - now
            if left <= 0:
                depth = f"depth {self._table.depth()} of {self._spec.slots} slots"
                raise QueueTimeout(f"queue {self._spec.name!r}: no {what} in {timeout:g} s ({depth})")
            if poller is None:
                poller = select.poll()
                poller.register(eventfd, select.POLLIN)
            if poller.poll(math.ceil(min(left, LOOK_AGAIN) * 1000)):
                with contextlib.suppress(BlockingIOError):  # a sibling was faster
                    os.eventfd_read(eventfd)  # before the next look: what changes after the look sets it again
        return found

    def _key(self, task: str, sequence: int) -> Key:
        if not 0 <= sequence <= MAX_U64:
            raise ValueError(f"queue {self._spec.name!r}: got sequence {sequence}, expected 0 to 2**64 - 1")
        return Key(task, sequence)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
