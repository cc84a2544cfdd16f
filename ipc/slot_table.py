"""The header memfd of a `TensorQueue`: what each slot holds and in which state it is.

Every number is a u64 at an aligned offset. Assumed of the machine: an aligned 8-byte store is atomic (x86-64,
AArch64), and CPython's assignment to an element of a "Q" memoryview is one such store. A state is stored after a
`fence`, and read before one, so whoever sees READY sees the header and payload that belong to it.

Who writes what: the producer writes everything about a FREE slot and the transitions FREE -> WRITING -> READY (or back
to FREE); the consumer writes READY -> READING -> FREE (or READY -> FREE). The supervisor writes in the place of a
process that is dead and reaped. So a word never has two writers at a time, and no lock is needed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Self

from ipc.layout import DTYPE_BYTES, MAX_DIMS, MAX_U64, pack_name, pack_task, tensor_bytes, unpack_name
from ipc.memory import SharedMemory, fence

_MAGIC = int.from_bytes(b"tensorq1", "little")

# Words of the table's own header.
_SLOTS, _SLOT_BYTES, PRODUCER_EPOCH, CONSUMER_EPOCH, PUTS, BYTES, PEAK = range(1, 8)
_HEADER_WORDS = 32

# Words of a slot.
_STATE, _TICKET, _WRITER_EPOCH, _READER_EPOCH, _SEQUENCE, _NBYTES, _TASK, _, _DTYPE, _, _NDIM, _SHAPE = range(12)
_SLOT_WORDS = 32
_DTYPE_BYTES = 16
_TASK_BYTES = 16


class SlotState(IntEnum):
    FREE = 0
    WRITING = 1
    READY = 2
    READING = 3


class Key(NamedTuple):
    """What a slot is found by."""

    task: str
    sequence: int


class Contents(NamedTuple):
    """What a slot holds; `ticket` is different for every put."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    ticket: int


class SlotTable:
    """The mapped table. Resource handling: owns the memory; `attach` duplicates the descriptor it is given."""

    def __init__(self, memory: SharedMemory, slots: int) -> None:
        """Take over `memory`; use `create` or `attach`."""
        self._memory = memory
        self._bytes = memory.view
        self._words = memory.view.cast("Q")
        self.slots = slots

    @classmethod
    def create(cls, name: str, slots: int, slot_bytes: int) -> Self:
        """A table of FREE slots."""
        table = cls(SharedMemory.create(name, _table_bytes(slots)), slots)
        table._words[_SLOTS] = slots
        table._words[_SLOT_BYTES] = slot_bytes
        table._words[0] = _MAGIC
        return table

    @classmethod
    def attach(cls, fd: int, slots: int, slot_bytes: int) -> Self:
        """ValueError if the descriptor is no table of that many slots of that size."""
        table = cls(SharedMemory.attach(fd, _table_bytes(slots)), slots)
        if problem := table.header_problem(slot_bytes):
            table.close()
            raise ValueError(problem)
        return table

    @property
    def fd(self) -> int:
        return self._memory.fd

    def count(self, word: int) -> int:
        """One of the counters: PRODUCER_EPOCH, CONSUMER_EPOCH, PUTS, BYTES, PEAK."""
        return self._words[word]

    def set_count(self, word: int, value: int) -> None:
        self._words[word] = value

    def states(self) -> list[int]:
        return [self._words[_word(slot, _STATE)] for slot in range(self.slots)]

    def depth(self) -> int:
        """Slots that are not FREE."""
        return sum(state != SlotState.FREE for state in self.states())

    def first(self, state: SlotState) -> int | None:
        """The lowest slot in this state."""
        return next((slot for slot, got in enumerate(self.states()) if got == state), None)

    def find(self, key: Key, states: tuple[SlotState, ...]) -> int | None:
        """The slot with this key in one of these states."""
        return next((slot for slot in self.of_task(key.task, states) if self._sequence(slot) == key.sequence), None)

    def of_task(self, task: str, states: tuple[SlotState, ...]) -> list[int]:
        """All slots of this task in one of these states."""
        wanted = [slot for slot, state in enumerate(self.states()) if state in states]
        fence()
        raw = pack_task(task)
        return [slot for slot in wanted if self._task(slot) == raw]

    def transition(self, slot: int, expected: SlotState, state: SlotState) -> None:
        """Publish a state: everything stored before is visible to whoever sees it."""
        got = self._words[_word(slot, _STATE)]
        assert got == expected, f"slot {slot}: got state {got}, expected {expected.name} before {state.name}"
        fence()
        self._words[_word(slot, _STATE)] = state

    def describe(self, slot: int, key: Key, dtype: str, shape: tuple[int, ...]) -> None:
        """Write what the FREE `slot` is going to hold."""
        base = _word(slot, 0)
        words = self._words
        words[base + _TICKET] = (words[base + _TICKET] + 1) & MAX_U64
        words[base + _WRITER_EPOCH] = words[PRODUCER_EPOCH]
        words[base + _READER_EPOCH] = 0
        words[base + _SEQUENCE] = key.sequence
        words[base + _NBYTES] = tensor_bytes(dtype, shape)
        words[base + _NDIM] = len(shape)
        for axis, size in enumerate(shape):
            words[base + _SHAPE + axis] = size
        self._bytes[_byte(slot, _TASK) :][:_TASK_BYTES] = pack_task(key.task)
        self._bytes[_byte(slot, _DTYPE) :][:_DTYPE_BYTES] = pack_name(dtype, _DTYPE_BYTES)

    def stamp_reader(self, slot: int) -> None:
        """Note that the present consumer has this slot."""
        self._words[_word(slot, _READER_EPOCH)] = self._words[CONSUMER_EPOCH]

    def contents(self, slot: int) -> Contents:
        base = _word(slot, 0)
        ndim = min(self._words[base + _NDIM], MAX_DIMS)
        return Contents(
            dtype=unpack_name(self._bytes[_byte(slot, _DTYPE) :][:_DTYPE_BYTES]),
            shape=tuple(self._words[base + _SHAPE : base + _SHAPE + ndim]),
            nbytes=self._words[base + _NBYTES],
            ticket=self._words[base + _TICKET],
        )

    def is_held(self, slot: int, ticket: int) -> bool:
        """Whether the consumer still has what was put with this ticket."""
        held = self._words[_word(slot, _STATE)] == SlotState.READING
        return held and self._words[_word(slot, _TICKET)] == ticket

    def header_problem(self, slot_bytes: int) -> str | None:
        """What is wrong with the table's own header, if anything."""
        got = (self._words[0], self._words[_SLOTS], self._words[_SLOT_BYTES])
        if got == (_MAGIC, self.slots, slot_bytes):
            return None
        return f"table header: got {got[1]} slots of {got[2]} bytes, expected {self.slots} of {slot_bytes}"

    def problems(self, slot_bytes: int) -> list[str]:
        """Everything that breaks a rule of this module; empty when the table is sound.

        To be called while neither side moves a slot, or again before believing a problem.
        """
        header = self.header_problem(slot_bytes)
        found = [header] if header else []
        holders: dict[Key, int] = {}
        for slot, state in enumerate(self.states()):
            if state == SlotState.FREE:
                continue
            if state > SlotState.READING:
                found.append(f"slot {slot}: state {state} is none of {', '.join(SlotState.__members__)}")
                continue
            found += self._slot_problems(slot, SlotState(state), slot_bytes)
            key = Key(self._task(slot).hex(), self._sequence(slot))
            if key in holders:
                found.append(f"slot {slot}: task {key.task} sequence {key.sequence} is also in slot {holders[key]}")
            holders[key] = slot
        return found

    def _slot_problems(self, slot: int, state: SlotState, slot_bytes: int) -> list[str]:
        found = []
        contents = self.contents(slot)
        if contents.dtype not in DTYPE_BYTES or 0 in contents.shape:
            found.append(f"slot {slot}: {contents.dtype!r} {contents.shape} is no tensor")
        elif contents.nbytes != tensor_bytes(contents.dtype, contents.shape) or contents.nbytes > slot_bytes:
            found.append(f"slot {slot}: {contents.nbytes} bytes for {contents.dtype} {contents.shape} of {slot_bytes}")
        side = {SlotState.WRITING: (_WRITER_EPOCH, PRODUCER_EPOCH), SlotState.READING: (_READER_EPOCH, CONSUMER_EPOCH)}
        if state in side:
            stamped, present = (self._words[_word(slot, side[state][0])], self._words[side[state][1]])
            if stamped != present:
                found.append(f"slot {slot}: {state.name} since epoch {stamped}, but the process is of epoch {present}")
        return found

    def _sequence(self, slot: int) -> int:
        return self._words[_word(slot, _SEQUENCE)]

    def _task(self, slot: int) -> bytes:
        return bytes(self._bytes[_byte(slot, _TASK) :][:_TASK_BYTES])

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._memory.close()


def _table_bytes(slots: int) -> int:
    return 8 * (_HEADER_WORDS + slots * _SLOT_WORDS)


def _word(slot: int, field: int) -> int:
    return _HEADER_WORDS + slot * _SLOT_WORDS + field


def _byte(slot: int, field: int) -> int:
    return 8 * _word(slot, field)
