"""Slots for the state of tasks in the middle of denoising; they outlive the process that computes.

Each slot has two halves. A commit writes the half that is not in use and then switches with one aligned 8-byte store,
so a process that is killed at any instruction leaves one whole state: the old or the new.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ipc.layout import DTYPE_BYTES, MAX_DIMS, MAX_U64, pack_name, pack_task, tensor_bytes, unpack_name
from ipc.memory import PAGE_BYTES, SharedMemory, fence, round_up
from ipc.messages.memory import StateSpec
from ipc.messages.status import Holding
from ipc.payload import (
    DeviceFd,
    Payload,
    Room,
    adopt_payload,
    attach_payload,
    make_payload,
    payload_bytes,
    place_name,
)

FDS_PER_STATE = 2
"""Header memfd, payload memfd (or GPU memory's descriptor)."""

MAX_TENSORS = 8
"""Named tensors in one state."""

StateTensor = tuple[str, tuple[int, ...], Room]
"""dtype, shape and the bytes, C-contiguous."""

_MAGIC = int.from_bytes(b"states-1", "little")
_FREE, _TAKEN = 0, 1
_ALIGNMENT = 64
_NAME_BYTES = 32
_DTYPE_BYTES = 16
_TASK_BYTES = 16

# Words of the file's header (its own page), of a slot (its own page), of a half and of a tensor in it.
_MAGIC_WORD, _SLOTS, _SLOT_BYTES, _PEAK = range(4)
_STATE, _COMMITTED, _TASK, _, _OWNER, _COMMITS = range(6)
_FIRST_HALF = 8
_STEP, _TENSORS, _FIRST_TENSOR = range(3)
_NAME, _DTYPE, _NDIM, _SHAPE, _OFFSET, _NBYTES = 0, 4, 6, 7, 15, 16
_TENSOR_WORDS = 17
_HALF_WORDS = _FIRST_TENSOR + MAX_TENSORS * _TENSOR_WORDS
_PAGE_WORDS = PAGE_BYTES // 8


@dataclass(frozen=True)
class StateStatistics:
    """Of one `StateSlots` since it was made."""

    slots: int
    slot_bytes: int
    depth: int
    """Slots that a task has."""
    peak: int
    commits: int
    tasks: tuple[str, ...]


class StateSlots:
    """A stage's end, or the supervisor's handle.

    One process hands out free slots: where several compute (`StateSpec.shared`), the supervisor claims one for a task
    before any of them hears of it. The process that has the task claims it, which makes it the slot's owner, commits
    and releases. The next one claims it after the owner is dead and reaped; only then, or for tasks that the owner has
    dropped, does the supervisor release. So a word never has two writers at a time.

    Resource handling: owns 2 descriptors; `attach` duplicates the ones it is given. Memory under a view from
    `StateSlot.load` stays mapped until the view is gone.

    Error handling: ValueError for a state that does not fit; RuntimeError when every slot is taken.
    """

    def __init__(self, spec: StateSpec, headers: SharedMemory, payload: Payload, epoch: int = 0) -> None:
        """Take over the parts; use `create` or `attach`."""
        self._spec = spec
        self.epoch = epoch
        """Of the process whose end this is; 0: the supervisor."""
        self._headers = headers
        self._payload = payload
        self._bytes = headers.view
        self._words = headers.view.cast("Q")

    @classmethod
    def create(cls, slots: int, slot_bytes: int, shared: bool = False, on: DeviceFd | None = None) -> Self:
        """Room for `slots` tasks whose state takes at most `slot_bytes` bytes; twice that is allocated.

        `on`: GPU memory of `state_payload_bytes` bytes for them, whose descriptor is taken over; None: host memory.
        """
        if slots < 1 or slot_bytes < 1:
            raise ValueError(f"state slots: got {slots} of {slot_bytes} bytes, expected at least 1 of 1")
        spec = StateSpec(slots=slots, slot_bytes=slot_bytes, shared=shared, device=None if on is None else on.device)
        with contextlib.ExitStack() as undo:
            headers = SharedMemory.create("state-headers", (slots + 1) * PAGE_BYTES)
            undo.callback(headers.close)
            payload = make_payload("state", 2 * slots, _half_bytes(slot_bytes), on)
            undo.callback(payload.close)
            states = cls(spec, headers, payload)
            undo.pop_all()
        states._words[_SLOTS] = slots
        states._words[_SLOT_BYTES] = slot_bytes
        states._words[_MAGIC_WORD] = _MAGIC
        return states

    @classmethod
    def attach(cls, spec: StateSpec, fds: list[int], epoch: int) -> Self:
        """The end of a process of this epoch (at least 1). ValueError if the descriptors do not fit the spec."""
        if len(fds) != FDS_PER_STATE:
            raise ValueError(f"state slots: got {len(fds)} descriptors, expected {FDS_PER_STATE}")
        with contextlib.ExitStack() as undo:
            headers = SharedMemory.attach(fds[0], (spec.slots + 1) * PAGE_BYTES)
            undo.callback(headers.close)
            payload = attach_payload(2 * spec.slots, _half_bytes(spec.slot_bytes), [fds[1]], spec.device)
            undo.callback(payload.close)
            states = cls(spec, headers, payload, epoch)
            undo.callback(states.close)
            if problem := states._header_problem():
                raise ValueError(problem)
            undo.pop_all()
        return states

    @classmethod
    def adopt(cls, spec: StateSpec, fds: Sequence[int]) -> Self:
        """The supervisor's handle, made again by the program that takes the place of the one that had it: takes over
        the descriptors. ValueError if they do not fit the spec."""
        header, payload_fd = fds
        headers = SharedMemory.adopt(header, (spec.slots + 1) * PAGE_BYTES)
        payload = adopt_payload(2 * spec.slots, _half_bytes(spec.slot_bytes), payload_fd, spec.device)
        states = cls(spec, headers, payload)
        if problem := states._header_problem():
            raise ValueError(problem)
        return states

    @property
    def spec(self) -> StateSpec:
        return self._spec

    @property
    def fds(self) -> list[int]:
        """FDS_PER_STATE descriptors, in the order that `attach` wants; they stay owned by this object."""
        return [self._headers.fd, *self._payload.fds]

    def claim(self, task: str) -> StateSlot:
        """The task's own slot, with its state, if it has one; else a free one. From now on this process owns it.

        RuntimeError if none is free, or if it is not for this process to hand one out."""
        if (own := self.find(task)) is not None:
            self._words[_word(own.index, _OWNER)] = self.epoch
            return own
        if self._spec.shared and self.epoch:
            raise RuntimeError(f"state slots: got task {task}, expected one that the supervisor has claimed a slot for")
        taken = self._taken()
        free = next((slot for slot in range(self._spec.slots) if slot not in taken), None)
        if free is None:
            raise RuntimeError(f"state slots: got task {task}, expected a free slot; all {self._spec.slots} are taken")
        self._bytes[_byte(free, _TASK) :][:_TASK_BYTES] = pack_task(task)
        self._words[_word(free, _COMMITTED)] = 0
        self._words[_word(free, _OWNER)] = self.epoch
        fence()
        self._words[_word(free, _STATE)] = _TAKEN
        self._words[_PEAK] = max(self._words[_PEAK], len(taken) + 1)
        return StateSlot(self, free, task)

    def find(self, task: str) -> StateSlot | None:
        """The slot that this task has."""
        raw = pack_task(task)
        slot = next((slot for slot, owner in self._taken().items() if owner == raw), None)
        return None if slot is None else StateSlot(self, slot, task)

    def release(self, task: str) -> bool:
        """Forget the task's state; False if it has none."""
        if (own := self.find(task)) is None:
            return False
        self._words[_word(own.index, _STATE)] = _FREE
        return True

    def release_except(self, tasks: Collection[str]) -> int:
        """Forget the states of all other tasks; how many there were. For the supervisor."""
        kept = {pack_task(task) for task in tasks}
        forgotten = [slot for slot, owner in self._taken().items() if owner not in kept]
        for slot in forgotten:
            self._words[_word(slot, _STATE)] = _FREE
        return len(forgotten)

    def statistics(self) -> StateStatistics:
        taken = self._taken()
        return StateStatistics(
            slots=self._spec.slots,
            slot_bytes=self._spec.slot_bytes,
            depth=len(taken),
            peak=self._words[_PEAK],
            commits=sum(self._words[_word(slot, _COMMITS)] for slot in range(self._spec.slots)),
            tasks=tuple(owner.hex() for owner in taken.values()),
        )

    def holdings(self) -> list[Holding]:
        """The states that there are, and whose they are."""
        return [self._holding(slot, owner) for slot, owner in self._taken().items()]

    def _holding(self, slot: int, owner: bytes) -> Holding:
        number = self._committed(slot)
        return Holding(
            name="states", where=place_name(self._spec.device), state="taken", slot=slot, task=owner.hex(),
            bytes=self._half(slot, number).nbytes() if number else 0, writer=self._owner(slot),
            generation=str(number),
        )  # fmt: skip

    def check_integrity(self) -> list[str]:
        """Broken rules, one sentence each; empty when all is well. Call it while no commit or claim is under way."""
        header = self._header_problem()
        found = [header] if header else []
        owners: dict[bytes, int] = {}
        capacity = _half_bytes(self._spec.slot_bytes)
        for slot in range(self._spec.slots):
            if (state := self._words[_word(slot, _STATE)]) not in (_FREE, _TAKEN):
                found.append(f"state slot {slot}: state {state} is neither free nor taken")
        for slot, owner in self._taken().items():
            if owner in owners:
                found.append(f"state slot {slot}: task {owner.hex()} also has slot {owners[owner]}")
            owners[owner] = slot
            if number := self._committed(slot):
                found += [f"state slot {slot}: {problem}" for problem in self._half(slot, number).problems(capacity)]
        return found

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._headers.close()
        self._payload.close()

    # For StateSlot.

    def _committed(self, slot: int) -> int:
        committed = self._words[_word(slot, _COMMITTED)]
        fence()
        return committed

    def _publish(self, slot: int, committed: int) -> None:
        fence()
        self._words[_word(slot, _COMMITTED)] = committed
        self._words[_word(slot, _COMMITS)] += 1

    def _owner(self, slot: int) -> int:
        return self._words[_word(slot, _OWNER)]

    def _half(self, slot: int, committed: int) -> _Half:
        """The half that the commit of this number is in, or goes into."""
        side = committed % 2
        first = _word(slot, _FIRST_HALF + side * _HALF_WORDS)
        return _Half(self._words, self._bytes, first, self._payload, 2 * slot + side)

    # Inside.

    def _taken(self) -> dict[int, bytes]:
        slots = [slot for slot in range(self._spec.slots) if self._words[_word(slot, _STATE)] == _TAKEN]
        fence()
        return {slot: bytes(self._bytes[_byte(slot, _TASK) :][:_TASK_BYTES]) for slot in slots}

    def _header_problem(self) -> str | None:
        got = (self._words[_MAGIC_WORD], self._words[_SLOTS], self._words[_SLOT_BYTES])
        if got == (_MAGIC, self._spec.slots, self._spec.slot_bytes):
            return None
        return f"header: got {got[1]} slots of {got[2]} bytes, expected {self._spec.slots} of {self._spec.slot_bytes}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class StateSlot:
    """The state of one task: valid until the task is released."""

    def __init__(self, states: StateSlots, index: int, task: str) -> None:
        """Made by `StateSlots.claim` and `find`."""
        self._states = states
        self.index = index
        self.task = task

    @property
    def device(self) -> int | None:
        """Number of the GPU that states are kept on; None: in host memory."""
        return self._states.spec.device

    def commit(self, step: int, tensors: Mapping[str, StateTensor]) -> None:
        """Copy a whole state in and make it the committed one. On an error the committed one stays what it was."""
        owner = self._states._owner(self.index)
        assert owner == self._states.epoch, f"state: commit by epoch {self._states.epoch}, but epoch {owner} owns it"
        self._check(step, tensors)
        number = self._states._committed(self.index) + 1
        self._states._half(self.index, number).write(step, tensors)
        self._states._publish(self.index, number)

    def load(self) -> tuple[int, dict[str, StateTensor]] | None:
        """Step and tensors of the committed state; None before the first commit. The views may be read until the second
        commit from now, and must not be written to."""
        number = self._states._committed(self.index)
        return None if number == 0 else self._states._half(self.index, number).read()

    def _check(self, step: int, tensors: Mapping[str, StateTensor]) -> None:
        if not 0 <= step <= MAX_U64:
            raise ValueError(f"state: got step {step}, expected 0 to 2**64 - 1")
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"state: got {len(tensors)} tensors, expected at most {MAX_TENSORS}")
        total = 0
        for name, (dtype, shape, view) in tensors.items():
            pack_name(name, _NAME_BYTES)
            if view.nbytes != tensor_bytes(dtype, shape) or not view.c_contiguous:
                raise ValueError(f"state tensor {name!r}: got {view.nbytes} bytes, expected contiguous {dtype} {shape}")
            total += view.nbytes
        if total > self._states.spec.slot_bytes:
            raise ValueError(f"state: got {total} bytes, expected at most {self._states.spec.slot_bytes}")


class _Half:
    """One of the two states in a slot: its part of the header page and its room in the payload."""

    def __init__(self, words: memoryview, header: memoryview, first: int, payload: Payload, number: int) -> None:
        self._words = words
        self._bytes = header
        self._first = first
        self._payload = payload
        self._number = number

    def write(self, step: int, tensors: Mapping[str, StateTensor]) -> None:
        words, room = self._words, self._payload.view(self._number)
        words[self._first + _STEP] = step
        words[self._first + _TENSORS] = len(tensors)
        offset = 0
        for index, (name, (dtype, shape, view)) in enumerate(tensors.items()):
            base = self._tensor(index)
            self._bytes[8 * (base + _NAME) :][:_NAME_BYTES] = pack_name(name, _NAME_BYTES)
            self._bytes[8 * (base + _DTYPE) :][:_DTYPE_BYTES] = pack_name(dtype, _DTYPE_BYTES)
            words[base + _NDIM] = len(shape)
            for axis, size in enumerate(shape):
                words[base + _SHAPE + axis] = size
            words[base + _OFFSET] = offset
            words[base + _NBYTES] = view.nbytes
            room[offset : offset + view.nbytes] = view.cast("B")  # type: ignore[assignment]
            offset = round_up(offset + view.nbytes, _ALIGNMENT)

    def read(self) -> tuple[int, dict[str, StateTensor]]:
        count = self._words[self._first + _TENSORS]
        return self._words[self._first + _STEP], dict(self._read_tensor(index) for index in range(count))

    def nbytes(self) -> int:
        """Of all tensors together."""
        count = min(self._words[self._first + _TENSORS], MAX_TENSORS)
        return sum(self._words[self._tensor(index) + _NBYTES] for index in range(count))

    def problems(self, capacity: int) -> list[str]:
        """Broken rules in the header of a half with room for `capacity` bytes."""
        count = self._words[self._first + _TENSORS]
        if count > MAX_TENSORS:
            return [f"{count} tensors, expected at most {MAX_TENSORS}"]
        found = []
        for index in range(count):
            base = self._tensor(index)
            dtype = unpack_name(self._bytes[8 * (base + _DTYPE) :][:_DTYPE_BYTES])
            ndim, nbytes = self._words[base + _NDIM], self._words[base + _NBYTES]
            shape = tuple(self._words[base + _SHAPE : base + _SHAPE + min(ndim, MAX_DIMS)])
            is_tensor = dtype in DTYPE_BYTES and ndim <= MAX_DIMS and 0 not in shape
            fits = self._words[base + _OFFSET] + nbytes <= capacity
            if not is_tensor or not fits or nbytes != tensor_bytes(dtype, shape):
                found.append(f"tensor {index}: {dtype!r} {shape} in {nbytes} bytes is no tensor of this slot")
        return found

    def _read_tensor(self, index: int) -> tuple[str, StateTensor]:
        base = self._tensor(index)
        name = unpack_name(self._bytes[8 * (base + _NAME) :][:_NAME_BYTES])
        dtype = unpack_name(self._bytes[8 * (base + _DTYPE) :][:_DTYPE_BYTES])
        shape = tuple(self._words[base + _SHAPE : base + _SHAPE + self._words[base + _NDIM]])
        start = self._words[base + _OFFSET]
        room = self._payload.view(self._number)
        return name, (dtype, shape, room[start : start + self._words[base + _NBYTES]])

    def _tensor(self, index: int) -> int:
        return self._first + _FIRST_TENSOR + index * _TENSOR_WORDS


def state_payload_bytes(slots: int, slot_bytes: int) -> int:
    """What the payload of so many slots takes."""
    return payload_bytes(2 * slots, _half_bytes(slot_bytes))


def _half_bytes(slot_bytes: int) -> int:
    """Room for `slot_bytes` bytes in MAX_TENSORS tensors, each of which starts aligned."""
    return slot_bytes + MAX_TENSORS * _ALIGNMENT


def _word(slot: int, field: int) -> int:
    return (slot + 1) * _PAGE_WORDS + field


def _byte(slot: int, field: int) -> int:
    return 8 * _word(slot, field)
