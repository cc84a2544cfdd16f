from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import pytest

from ipc.memory import PAGE_BYTES, SharedMemory
from ipc.messages.memory import StateSpec
from ipc.state import FDS_PER_STATE, StateSlots, StateStatistics, StateTensor
from tests.ipc.conftest import PeerProcess
from tests.ipc.peer import WAIT, CommitForEver, DieAt, state_tensors

A, B, C = "a" * 32, "b" * 32, "c" * 32
Peers = Callable[[], PeerProcess]


@contextmanager
def both(slots: int = 2, slot_bytes: int = 1000) -> Iterator[tuple[StateSlots, StateSlots]]:
    """The supervisor's handle and a stage's end; sound when the test is over."""
    with (
        StateSlots.create(slots, slot_bytes) as supervisor,
        StateSlots.attach(supervisor.spec, supervisor.fds, 1) as stage,
    ):
        yield supervisor, stage
        assert supervisor.check_integrity() == []


def plain(loaded: tuple[int, dict[str, StateTensor]] | None) -> tuple[int, dict[str, bytes]] | None:
    """A loaded state with the bytes copied out."""
    return None if loaded is None else (loaded[0], {name: bytes(view) for name, (_, _, view) in loaded[1].items()})


def whole(step: int, nbytes: int) -> tuple[int, dict[str, bytes]] | None:
    """What a committed step loads as; None for step 0."""
    return plain((step, state_tensors(step, nbytes))) if step else None


def floats(*values: float) -> StateTensor:
    return "float32", (len(values),), memoryview(bytearray(4 * len(values)))


def test_a_state_is_loaded_as_it_was_committed() -> None:
    """Names, dtypes, shapes and bytes of three tensors of odd sizes, in order; a later commit replaces all of it."""
    with both() as (_, stage):
        slot = stage.claim(A)
        assert slot.load() is None
        tensors: dict[str, StateTensor] = {
            "latents": ("float32", (2, 3), memoryview(bytes(range(24)))),
            "scalar": ("int64", (), memoryview(b"12345678")),
            "odd": ("uint8", (5, 1), memoryview(b"abcde")),
        }
        slot.commit(3, tensors)
        loaded = slot.load()
        assert loaded is not None
        step, got = loaded
        assert step == 3
        assert {n: (d, s, bytes(v)) for n, (d, s, v) in got.items()} == {
            n: (d, s, bytes(v)) for n, (d, s, v) in tensors.items()
        }
        assert list(got) == list(tensors)
        slot.commit(4, {"only": ("uint8", (1,), memoryview(b"x"))})
        assert plain(slot.load()) == (4, {"only": b"x"})


def test_a_successor_finds_the_state() -> None:
    """The stage's end is closed and another one attached: it finds the task's state, and others find none."""
    with both() as (supervisor, stage):
        stage.claim(A).commit(7, state_tensors(7, 100))
        with StateSlots.attach(supervisor.spec, supervisor.fds, 2) as successor:
            found = successor.find(A)
            assert found is not None
            assert plain(found.load()) == whole(7, 100)
            assert plain(successor.claim(A).load()) == whole(7, 100)
            assert successor.find(B) is None
            assert successor.claim(B).load() is None


def test_only_the_supervisor_hands_out_slots_that_several_share() -> None:
    """A stage gets the slot that was claimed for the task, and none for a task without one."""
    with (
        StateSlots.create(2, 1000, shared=True) as supervisor,
        StateSlots.attach(supervisor.spec, supervisor.fds, 1) as stage,
    ):
        with pytest.raises(RuntimeError, match="expected one that the supervisor has claimed a slot for"):
            stage.claim(A)
        slot = supervisor.claim(A)
        assert stage.claim(A).index == slot.index
        assert supervisor.statistics().depth == 1


def test_a_task_that_moves_has_one_owner() -> None:
    """Another process claims the slot: it goes on from what the first committed, which may not commit any more."""
    with both() as (supervisor, first), StateSlots.attach(supervisor.spec, supervisor.fds, 2) as second:
        old = first.claim(A)
        old.commit(3, state_tensors(3, 100))
        new = second.claim(A)
        assert plain(new.load()) == whole(3, 100)
        with pytest.raises(AssertionError, match="commit by epoch 1, but epoch 2 owns it"):
            old.commit(4, state_tensors(4, 100))
        new.commit(4, state_tensors(4, 100))
        assert plain(new.load()) == whole(4, 100)


def test_claiming_a_used_slot_starts_empty() -> None:
    """The state of a released task is not the next owner's."""
    with both(slots=1) as (_, stage):
        stage.claim(A).commit(1, state_tensors(1, 100))
        assert stage.release(A)
        assert not stage.release(A)
        assert stage.find(A) is None
        assert stage.claim(B).load() is None


def test_no_free_slot_is_an_error() -> None:
    with both(slots=2) as (_, stage):
        stage.claim(A)
        stage.claim(B)
        stage.claim(A)
        with pytest.raises(RuntimeError, match="expected a free slot; all 2 are taken"):
            stage.claim(C)


def test_the_supervisor_releases_all_but_some() -> None:
    with both(slots=3) as (supervisor, stage):
        for task in (A, B, C):
            stage.claim(task)
        assert supervisor.release_except([B]) == 2
        assert supervisor.release_except([B]) == 0
        assert supervisor.statistics() == StateStatistics(
            slots=3, slot_bytes=1000, depth=1, peak=3, commits=0, tasks=(B,)
        )
        assert supervisor.release_except([]) == 1


def test_views_stay_until_the_second_commit() -> None:
    """A loaded view is not touched by the next commit, which writes the other half."""
    with both() as (_, stage):
        slot = stage.claim(A)
        slot.commit(1, state_tensors(1, 100))
        loaded = slot.load()
        slot.commit(2, state_tensors(2, 100))
        assert plain(loaded) == whole(1, 100)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": ("uint8", (1001,), memoryview(bytes(1001)))}, "got 1001 bytes, expected at most 1000"),
        ({f"t{i}": floats(1.0) for i in range(9)}, "got 9 tensors, expected at most 8"),
        ({"x": ("uint8", (3,), memoryview(bytes(4)))}, r"got 4 bytes, expected contiguous uint8 \(3,\)"),
        ({"x": ("uint8", (2,), memoryview(bytes(4))[::2])}, "expected contiguous"),
        ({"x" * 33: floats(1.0)}, "expected 1 to 32 ASCII characters"),
        ({"": floats(1.0)}, "expected 1 to 32 ASCII characters"),
        ({"x": ("complex64", (1,), memoryview(bytes(8)))}, "got dtype 'complex64'"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tensors: dict[str, StateTensor], message: str) -> None:
    with both() as (_, stage):
        slot = stage.claim(A)
        slot.commit(1, state_tensors(1, 100))
        with pytest.raises(ValueError, match=message):
            slot.commit(2, tensors)
        with pytest.raises(ValueError, match="got step -1"):
            slot.commit(-1, {})
        assert plain(slot.load()) == whole(1, 100)


def test_eight_tensors_fill_the_slot_to_the_last_byte() -> None:
    """slot_bytes is what the tensors take; the alignment of each comes on top."""
    with both(slots=1, slot_bytes=1000) as (_, stage):
        tensors: dict[str, StateTensor] = {f"t{i}": ("uint8", (125,), memoryview(bytes([i]) * 125)) for i in range(8)}
        slot = stage.claim(A)
        for step in (1, 2):
            slot.commit(step, tensors)
            assert plain(slot.load()) == (step, {name: bytes(view) for name, (_, _, view) in tensors.items()})


def test_descriptors_that_do_not_fit_are_refused() -> None:
    with StateSlots.create(2, 1000) as made, SharedMemory.create("other", 3 * PAGE_BYTES) as other:
        assert len(made.fds) == FDS_PER_STATE
        with pytest.raises(ValueError, match="got 1 descriptors, expected 2"):
            StateSlots.attach(made.spec, made.fds[:1], 1)
        with pytest.raises(ValueError, match="expected 16384"):
            StateSlots.attach(StateSpec(slots=3, slot_bytes=1000), made.fds, 1)
        with pytest.raises(ValueError, match="got 2 slots of 1000 bytes, expected 2 of 1001"):
            StateSlots.attach(StateSpec(slots=2, slot_bytes=1001), made.fds, 1)
        with pytest.raises(ValueError, match="got 0 slots of 0 bytes"):
            StateSlots.attach(made.spec, [other.fd, made.fds[1]], 1)
    with pytest.raises(ValueError, match="expected at least 1 of 1"):
        StateSlots.create(0, 1000)


@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (0, 9, "header"),
        (PAGE_BYTES, 2, "state 2 is neither free nor taken"),
        (2 * PAGE_BYTES + 16, 0xAA, f"task {A} also has slot 0"),
        (PAGE_BYTES + 8 * (8 + 138 + 1), 9, "9 tensors, expected at most 8"),
        (PAGE_BYTES + 8 * (8 + 138 + 2 + 16), 7, "is no tensor of this slot"),
    ],
)
def test_integrity_check_finds_what_is_broken(offset: int, value: int, problem: str) -> None:
    """Control: broken bytes in sound states, and the check names them."""
    with both() as (supervisor, stage):
        stage.claim(A).commit(1, state_tensors(1, 100))
        stage.claim(B)
        assert supervisor.check_integrity() == []
        with SharedMemory.attach(supervisor.fds[0], os.fstat(supervisor.fds[0]).st_size) as raw:
            before = bytes(raw.view)
            raw.view[offset : offset + (16 if value == 0xAA else 1)] = bytes([value]) * (16 if value == 0xAA else 1)
            assert any(problem in found for found in supervisor.check_integrity())
            raw.view[:] = before


@pytest.mark.parametrize("action", ["claim", "commit", "release"])
def test_a_kill_at_every_line(peers: Peers, action: Literal["claim", "commit", "release"]) -> None:
    """A process is killed before the first line, the second, ... of a claim, commit or release, until it comes through.
    What is found after each kill is what was there before, or what should be there after, whole; and both occur."""
    peer = peers()
    with both(slots=1) as (supervisor, stage):
        peer.attach_states(supervisor, 1)
        outcomes = set()
        for line in range(1, 1000):
            stage.release(A)
            if action != "claim":
                stage.claim(A).commit(1, state_tensors(1, 100))
            result = peer.ask(DieAt(action=action, line=line, task=A, nbytes=100))
            found = supervisor.find(A)
            outcomes.add((result, "absent" if found is None else describe(plain(found.load()))))
            assert supervisor.check_integrity() == [], line
            if result == "finished":
                break
        before, after = {"claim": ("absent", "empty"), "commit": ("1", "2"), "release": ("1", "absent")}[action]
        assert outcomes == {("killed", before), ("killed", after), ("finished", after)}


def describe(loaded: tuple[int, dict[str, bytes]] | None) -> str:
    if loaded is None:
        return "empty"
    assert loaded == whole(loaded[0], 100)
    return str(loaded[0])


def test_a_stage_killed_at_any_time_leaves_a_whole_state(peers: Peers) -> None:
    """12 processes are killed at random places in a stream of 1 MB commits. Each successor, and the supervisor, find
    one whole state, never older than the step that was seen before the kill. Seed 0."""
    rng = random.Random(0)
    with both(slots=1, slot_bytes=1_000_000) as (supervisor, _):
        last = 0
        for epoch in range(1, 13):
            peer = peers()
            peer.attach_states(supervisor, epoch)
            assert peer.ask(CommitForEver(task=A, nbytes=500_000)) == "started"
            target = supervisor.statistics().commits + rng.randint(1, 20)
            wait_until(partial(commits_reach, supervisor, target))
            peer.kill()
            found = supervisor.find(A)
            assert found is not None
            loaded = plain(found.load())
            assert loaded is not None
            assert loaded == whole(loaded[0], 500_000)
            assert last < loaded[0] <= supervisor.statistics().commits + 1
            last = loaded[0]
            assert supervisor.check_integrity() == []


def test_one_of_two_stages_is_killed_and_a_third_takes_over(peers: Peers) -> None:
    """Two processes commit, each the state of its task, into slots that they share. One is killed; another goes on with
    its task from a whole state, while its sibling goes on committing, whose state is whole as well."""
    first, second = peers(), peers()
    with StateSlots.create(2, 200_000, shared=True) as supervisor:
        for epoch, task, peer in ((1, A, first), (2, B, second)):
            supervisor.claim(task)
            peer.attach_states(supervisor, epoch)
            assert peer.ask(CommitForEver(task=task, nbytes=100_000)) == "started"
            wait_until(partial(has_committed, supervisor, task))
        first.kill()
        with StateSlots.attach(supervisor.spec, supervisor.fds, 3) as third:
            slot = third.claim(A)
            loaded = slot.load()
            assert loaded is not None and plain(loaded) == whole(loaded[0], 100_000)
            for step in range(loaded[0] + 1, loaded[0] + 20):
                slot.commit(step, state_tensors(step, 100_000))
                assert plain(slot.load()) == whole(step, 100_000)
            wait_until(partial(commits_reach, supervisor, supervisor.statistics().commits + 10))
            second.kill()
            loaded = third.claim(B).load()
            assert loaded is not None and plain(loaded) == whole(loaded[0], 100_000)
        assert supervisor.check_integrity() == []


def has_committed(states: StateSlots, task: str) -> bool:
    slot = states.find(task)
    return slot is not None and slot.load() is not None


def commits_reach(states: StateSlots, count: int) -> bool:
    return states.statistics().commits >= count


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()
