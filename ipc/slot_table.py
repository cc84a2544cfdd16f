"""The header memfd of a `TensorQueue`: what each slot holds and in which state it is.

Every number is a u64 at an aligned offset. Assumed of the machine: an aligned 8-byte store is atomic (x86-64,
AArch64), and CPython's assignment to an element of a "Q" memoryview is one such store. A state is stored after a
`fence`, and read before one, so whoever sees READY sees the header and payload that belong to it.

Who writes what: a slot belongs to one of the producers, `slot % producers` being its number, which writes everything
about it while it is FREE and the transitions FREE -> WRITING -> READY (or back to FREE). A consumer writes READY ->
READING -> FREE (or READY -> FREE), and a task is with one consumer at a time. The supervisor writes in the place of a
process that is dead and reaped. So a word never has two writers at a time, and no lock is needed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple, Self

from ipc.layout import DTYPE_BYTES, MAX_DIMS, MAX_U64, pack_name, pack_task, tensor_bytes, unpack_name
from ipc.memory import SharedMemory, fence
from ipc.messages.status import Holding

_MAGIC = int.from_bytes(b"tensorq1", "little")

# Words of the table's own header.
_SLOTS, _SLOT_BYTES = 1, 2
_PRODUCER_EPOCHS, _CONSUMER_EPOCHS = 8, 20
MAX_PROCESSES = 12
"""At each side of one table."""
_HEADER_WORDS = 32

# Words of a slot.
_STATE, _TICKET, _WRITER_EPOCH, _READER_EPOCH, _SEQUENCE, _NBYTES, _TASK, _, _DTYPE, _, _NDIM, _SHAPE = range(12)
_PUTS, _BYTES, _PEAK = range(24, 27)
_SLOT_WORDS = 32
_DTYPE_BYTES = 16
_TASK_BYTES = 16


Side = Literal["producer", "consumer"]
_EPOCHS: dict[Side, int] = {"producer": _PRODUCER_EPOCHS, "consumer": _CONSUMER_EPOCHS}


class SlotState(IntEnum):
    FREE = 0
    WRITING = 1
    READY = 2
    READING = 3


_HELD_BY: dict[Side, tuple[SlotState, int]] = {
    "producer": (SlotState.WRITING, _WRITER_EPOCH), "consumer": (SlotState.READING, _READER_EPOCH),
}  # fmt: skip
"""The state of a slot that a side has in hand, and the word that says who has it."""


_STATE_NAMES: dict[SlotState, Literal["writing", "ready", "reading"]] = {
    SlotState.WRITING: "writing", SlotState.READY: "ready", SlotState.READING: "reading",
}  # fmt: skip


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


class Counts(NamedTuple):
    """Of all puts there were: how many, their bytes, and the most slots that were not FREE at once."""

    puts: int
    bytes: int
    peak: int


class SlotTable:
    """The mapped table. Resource handling: owns the memory; `attach` duplicates the descriptor it is given."""

    def __init__(self, memory: SharedMemory, slots: int) -> None:
        """Take over `memory`; use `create` or `attach`. OSError if it cannot be mapped, and the memory is closed."""
        self._memory = memory
        self._bytes = memory.map_or_close()
        self._words = self._bytes.cast("Q")
        self.slots = slots
        self._state_words = [_word(slot, _STATE) for slot in range(slots)]

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

    def enter(self, side: Side, number: int, epoch: int) -> None:
        """Note the epoch of the process that is this side's `number`th from now on."""
        self._words[_EPOCHS[side] + number] = epoch

    def counts(self) -> Counts:
        """Each slot counts for itself, so that no two producers write one word."""
        end = _word(self.slots, 0)
        puts, sent, peak = (self._words[_word(0, field) : end : _SLOT_WORDS] for field in (_PUTS, _BYTES, _PEAK))
        return Counts(puts=sum(puts), bytes=sum(sent), peak=max(peak))

    def count_depth(self, slot: int) -> None:
        """Note, at this slot, how many slots are not FREE."""
        base = _word(slot, 0)
        self._words[base + _PEAK] = max(self._words[base + _PEAK], self.depth())

    def count_put(self, slot: int, nbytes: int) -> None:
        base = _word(slot, 0)
        self._words[base + _PUTS] += 1
        self._words[base + _BYTES] += nbytes

    def states(self) -> list[int]:
        words = self._words
        return [words[word] for word in self._state_words]

    def depth(self) -> int:
        """Slots that are not FREE."""
        return sum(state != SlotState.FREE for state in self.states())

    def free(self, number: int, producers: int) -> int | None:
        """The lowest FREE slot of those that belong to the `number`th of so many producers."""
        states = self.states()
        return next((slot for slot in range(number, self.slots, producers) if states[slot] == SlotState.FREE), None)

    def in_hand(self, side: Side, epoch: int) -> list[int]:
        """Slots that the process of this epoch is writing, or reading."""
        held, stamp = _HELD_BY[side]
        wanted = [slot for slot, state in enumerate(self.states()) if state == held]
        fence()
        return [slot for slot in wanted if self._words[_word(slot, stamp)] == epoch]

    def find(self, key: Key, states: tuple[SlotState, ...]) -> int | None:
        """The slot with this key in one of these states."""
        wanted = [slot for slot, state in enumerate(self.states()) if state in states]
        if not wanted:
            return None
        fence()
        raw = pack_task(key.task)
        return next((s for s in wanted if self._sequence(s) == key.sequence and self._task(s) == raw), None)

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

    def describe(self, slot: int, key: Key, dtype: str, shape: tuple[int, ...], epoch: int) -> None:
        """Write what the FREE `slot` is going to hold, and who writes it."""
        base = _word(slot, 0)
        words = self._words
        words[base + _TICKET] = (words[base + _TICKET] + 1) & MAX_U64
        words[base + _WRITER_EPOCH] = epoch
        words[base + _READER_EPOCH] = 0
        words[base + _SEQUENCE] = key.sequence
        words[base + _NBYTES] = tensor_bytes(dtype, shape)
        words[base + _NDIM] = len(shape)
        for axis, size in enumerate(shape):
            words[base + _SHAPE + axis] = size
        self._bytes[_byte(slot, _TASK) :][:_TASK_BYTES] = pack_task(key.task)
        self._bytes[_byte(slot, _DTYPE) :][:_DTYPE_BYTES] = pack_name(dtype, _DTYPE_BYTES)

    def stamp_reader(self, slot: int, epoch: int) -> None:
        """Note that the consumer of this epoch has this slot."""
        self._words[_word(slot, _READER_EPOCH)] = epoch

    def contents(self, slot: int) -> Contents:
        base = _word(slot, 0)
        ndim = min(self._words[base + _NDIM], MAX_DIMS)
        return Contents(
            dtype=unpack_name(self._bytes[_byte(slot, _DTYPE) :][:_DTYPE_BYTES]),
            shape=tuple(self._words[base + _SHAPE : base + _SHAPE + ndim]),
            nbytes=self._words[base + _NBYTES],
            ticket=self._words[base + _TICKET],
        )

    def holdings(self, name: str, where: str) -> list[Holding]:
        """What is in the slots that are not FREE, and who has it."""
        taken = [(slot, SlotState(state)) for slot, state in enumerate(self.states()) if state != SlotState.FREE]
        fence()
        return [self._holding(name, where, slot, state) for slot, state in taken]

    def _holding(self, name: str, where: str, slot: int, state: SlotState) -> Holding:
        base, words = _word(slot, 0), self._words
        return Holding(
            name=name, where=where, state=_STATE_NAMES[state], bytes=words[base + _NBYTES], slot=slot,
            task=self._task(slot).hex(), sequence=self._sequence(slot), writer=words[base + _WRITER_EPOCH],
            reader=words[base + _READER_EPOCH] or None,
        )  # fmt: skip

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
        for side, (held, stamp) in _HELD_BY.items():
            stamped, present = self._words[_word(slot, stamp)], self._epochs(side)
            if state == held and stamped not in present:
                epochs = " or ".join(map(str, present)) or "0"
                found.append(f"slot {slot}: {state.name} since epoch {stamped}, but the process is of epoch {epochs}")
        return found

    def _epochs(self, side: Side) -> list[int]:
        """Of the newest processes that were at this side."""
        return [epoch for epoch in self._words[_EPOCHS[side] :][:MAX_PROCESSES] if epoch]

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
