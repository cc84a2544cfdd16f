"""Slots for the state of tasks in the middle of denoising; they outlive the process that computes.

Each slot has two halves. A commit writes the half that is not in use and then switches with one aligned 8-byte store, so a
process that is killed at any instruction leaves one whole state: the old or the new.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ipc.layout import (
    DTYPE_BYTES, MAX_DIMS, MAX_U64, pack_name, pack_task, tensor_bytes, unpack_name,
)  # fmt: skip
from ipc.memory import PAGE_BYTES, SharedMemory, fence, round_up
from ipc.messages import StateSpec
from ipc.payload import HostPayload, Payload

FDS_PER_STATE = 2
"""Header memfd, payload memfd."""

MAX_TENSORS = 8
"""Named tensors in one state."""

StateTensor = tuple[str, tuple[int, ...], memoryview]
"""dtype, shape and the bytes, C-contiguous."""

_MAGIC = int.from_bytes(b"states-1", "little")
_FREE, _TAKEN = 0, 1
_ALIGNMENT = 64
_NAME_BYTES = 32
_DTYPE_BYTES = 16

# Words of the file's header (its own page), of a slot (its own page), of a half and of a tensor in it.
_MAGIC_WORD, _SLOTS, _SLOT_BYTES, _EPOCH, _COMMITS, _PEAK = range(6)
_STATE, _COMMITTED, _TASK = range(3)
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
    """The stage's end, or the supervisor's handle.

    One process at a time claims, commits and releases; the supervisor only writes (`release_except`) after that process
    is dead and reaped, or for tasks that it has dropped.

    Resource handling: owns 2 descriptors; `attach` duplicates the ones it is given. Memory under a view from
    `StateSlot.load` stays mapped until the view is gone.

    Error handling: ValueError for a state that does not fit; RuntimeError when every slot is taken.
    """

    def __init__(self, spec: StateSpec, headers: SharedMemory, payload: Payload) -> None:
        """Take over the parts; use `create` or `attach`."""
        self._spec = spec
        self._headers = headers
        self._payload = payload
        self._bytes = headers.view
        self._words = headers.view.cast("Q")

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Self:
        """Room for `slots` tasks whose state takes at most `slot_bytes` bytes; twice that is allocated."""
        if slots < 1 or slot_bytes < 1:
            raise ValueError(f"state slots: got {slots} of {slot_bytes} bytes, expected at least 1 of 1")
        with contextlib.ExitStack() as undo:
            headers = SharedMemory.create("state-headers", (slots + 1) * PAGE_BYTES)
            undo.callback(headers.close)
            payload = HostPayload.create("state", 2 * slots, _half_bytes(slot_bytes))
            undo.pop_all()
        states = cls(StateSpec(slots=slots, slot_bytes=slot_bytes), headers, payload)
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
            payload = HostPayload.attach(2 * spec.slots, _half_bytes(spec.slot_bytes), [fds[1]])
            undo.callback(payload.close)
            states = cls(spec, headers, payload)
            undo.callback(states.close)
            if problem := states._header_problem():
                raise ValueError(problem)
            undo.pop_all()
        states._words[_EPOCH] = epoch
        return states

    @property
    def spec(self) -> StateSpec:
        return self._spec

    @property
    def fds(self) -> list[int]:
        """FDS_PER_STATE descriptors, in the order that `attach` wants; they stay owned by this object."""
        return [self._headers.fd, *self._payload.fds]

    def claim(self, task: str) -> StateSlot:
        """The task's slot: its own, with what was committed, if it has one; else a free one. RuntimeError if none is free."""
        if (own := self.find(task)) is not None:
            return own
        taken = self._taken()
        free = next((slot for slot in range(self._spec.slots) if slot not in taken), None)
        if free is None:
            raise RuntimeError(f"state slots: got task {task}, expected a free slot; all {self._spec.slots} are taken")
        self._bytes[_byte(free, _TASK) :][:16] = pack_task(task)
        self._words[_word(free, _COMMITTED)] = 0
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
            commits=self._words[_COMMITS],
            tasks=tuple(owner.hex() for owner in taken.values()),
        )

    def check_integrity(self) -> list[str]:
        """Broken rules, one sentence each; empty when all is well. Call it while no commit or claim is under way."""
        header = self._header_problem()
        found = [header] if header else []
        owners: dict[bytes, int] = {}
        for slot in range(self._spec.slots):
            if (state := self._words[_word(slot, _STATE)]) not in (_FREE, _TAKEN):
                found.append(f"state slot {slot}: state {state} is neither free nor taken")
        for slot, owner in self._taken().items():
            if owner in owners:
                found.append(f"state slot {slot}: task {owner.hex()} also has slot {owners[owner]}")
            owners[owner] = slot
            found += self._half_problems(slot)
        return found

    def close(self) -> None:
        self._words.release()
        self._bytes.release()
        self._headers.close()
        self._payload.close()

    # --- for StateSlot -------------------------------------------------------------------------------------------------

    def _committed(self, slot: int) -> int:
        committed = self._words[_word(slot, _COMMITTED)]
        fence()
        return committed

    def _publish(self, slot: int, committed: int) -> None:
        fence()
        self._words[_word(slot, _COMMITTED)] = committed
        self._words[_COMMITS] += 1

    def _half(self, slot: int, committed: int) -> _Half:
        side = committed % 2
        first = _word(slot, _FIRST_HALF + side * _HALF_WORDS)
        return _Half(self._words, self._bytes, first, self._payload.view(2 * slot + side))

    # --- inside --------------------------------------------------------------------------------------------------------

    def _taken(self) -> dict[int, bytes]:
        slots = [slot for slot in range(self._spec.slots) if self._words[_word(slot, _STATE)] == _TAKEN]
        fence()
        return {slot: bytes(self._bytes[_byte(slot, _TASK) :][:16]) for slot in slots}

    def _header_problem(self) -> str | None:
        got = (self._words[_MAGIC_WORD], self._words[_SLOTS], self._words[_SLOT_BYTES])
        if got == (_MAGIC, self._spec.slots, self._spec.slot_bytes):
            return None
        return f"state header: got {got[1]} slots of {got[2]} bytes, expected {self._spec.slots} of {self._spec.slot_bytes}"

    def _half_problems(self, slot: int) -> list[str]:
        committed = self._committed(slot)
        if committed == 0:
            return []
        first = _word(slot, _FIRST_HALF + committed % 2 * _HALF_WORDS)
        return [f"state slot {slot}: {p}" for p in _table_problems(self._words, self._bytes, first, self._spec.slot_bytes)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
