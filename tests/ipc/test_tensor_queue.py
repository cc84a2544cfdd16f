from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from ipc.layout import tensor_bytes
from ipc.memory import SharedMemory
from ipc.messages.memory import QueueSpec
from ipc.messages.status import QueueStatistics
from ipc.tensor_queue import FDS_PER_QUEUE, QueueTimeout, TensorQueue
from tests.ipc.peer import LONGER, WAIT

A, B, C = "a" * 32, "b" * 32, "c" * 32


class Ends(NamedTuple):
    supervisor: TensorQueue
    producer: TensorQueue
    consumer: TensorQueue


@contextmanager
def queue(slots: int = 3, slot_bytes: int = 64) -> Iterator[Ends]:
    """A queue with all three ends in this process, sound when the test is over."""
    with (
        TensorQueue.create("test", slots, slot_bytes) as supervisor,
        TensorQueue.attach(supervisor.spec, supervisor.fds, "producer", 1) as producer,
        TensorQueue.attach(supervisor.spec, supervisor.fds, "consumer", 1) as consumer,
    ):
        yield Ends(supervisor, producer, consumer)
        assert supervisor.check_integrity() == []


def put(producer: TensorQueue, task: str, sequence: int, data: bytes) -> None:
    with producer.put(task, sequence, "uint8", (len(data),), LONGER) as view:
        view[:] = data


def test_a_tensor_arrives_with_its_dtype_and_shape() -> None:
    with queue() as (_, producer, consumer):
        with producer.put(A, 7, "bfloat16", (2, 3, 4), WAIT) as view:
            assert len(view) == 48
            view[:] = bytes(range(48))
        slot = consumer.take(A, 7, WAIT)
        assert (slot.dtype, slot.shape, bytes(slot.view)) == ("bfloat16", (2, 3, 4), bytes(range(48)))


def test_a_scalar_and_eight_dimensions_arrive() -> None:
    with queue() as (_, producer, consumer):
        for sequence, shape in enumerate([(), (1, 2, 1, 2, 1, 2, 1, 2)]):
            with producer.put(A, sequence, "float32", shape, WAIT):
                pass
            assert consumer.take(A, sequence, WAIT).shape == shape


def test_tensors_are_taken_in_any_order() -> None:
    """Three are put; the last, the first and the middle one are taken, each with its own bytes."""
    with queue() as (_, producer, consumer):
        for task, sequence in [(A, 0), (B, 0), (A, 1)]:
            put(producer, task, sequence, f"{task}{sequence}".encode())
        for task, sequence in [(A, 1), (A, 0), (B, 0)]:
            assert bytes(consumer.take(task, sequence, WAIT).view) == f"{task}{sequence}".encode()


def test_taking_again_gives_the_same_slot() -> None:
    """A stage that runs a quantum again takes an input that it has already: same bytes, no second slot."""
    with queue() as (supervisor, producer, consumer):
        put(producer, A, 0, b"once")
        first, second = consumer.take(A, 0, WAIT), consumer.take(A, 0, WAIT)
        assert bytes(first.view) == bytes(second.view) == b"once"
        first.release()
        second.release()
        assert supervisor.statistics().depth == 0


def test_a_full_queue_holds_the_producer_back() -> None:
    """Every slot is in use: a put waits and times out with the depth. A release during the next wait ends it."""
    with queue(slots=2) as (_, producer, consumer):
        put(producer, A, 0, b"0")
        put(producer, A, 1, b"1")
        message = r"'test': no free slot in 0\.02 s \(depth 2 of 2 slots\)"
        with pytest.raises(QueueTimeout, match=message), producer.put(A, 2, "uint8", (1,), 0.02):
            pytest.fail("got a slot")
        slot = consumer.take(A, 0, WAIT)
        waiting = threading.Thread(target=put, args=(producer, A, 2, b"2"), daemon=True)
        waiting.start()
        slot.release()
        waiting.join(WAIT)
        assert not waiting.is_alive()
        assert bytes(consumer.take(A, 2, WAIT).view) == b"2"


def test_taking_what_is_not_there_times_out() -> None:
    """Other tensors come meanwhile, which wake the consumer but are not what it waits for."""
    with queue() as (_, producer, consumer):
        put(producer, A, 0, b"0")
        with pytest.raises(QueueTimeout, match=f"no task {B} sequence 0 in 0.02 s"):
            consumer.take(B, 0, 0.02)


def test_a_consumer_that_waits_is_woken() -> None:
    with queue() as (_, producer, consumer):
        taken: list[bytes] = []

        def take() -> None:
            taken.append(bytes(consumer.take(A, 1, LONGER).view))

        waiting = threading.Thread(target=take, daemon=True)
        waiting.start()
        put(producer, A, 0, b"not this")
        put(producer, A, 1, b"this")
        waiting.join(WAIT)
        assert not waiting.is_alive()
        assert taken == [b"this"]


def test_an_exception_while_writing_gives_the_slot_back() -> None:
    with queue(slots=1) as (supervisor, producer, consumer):
        with pytest.raises(ZeroDivisionError), producer.put(A, 0, "uint8", (4,), WAIT):
            assert supervisor.statistics().depth == 1
            raise ZeroDivisionError
        assert supervisor.statistics() == QueueStatistics(
            name="test", slots=1, slot_bytes=64, depth=0, peak=1, puts=0, bytes=0
        )
        with pytest.raises(QueueTimeout):
            consumer.take(A, 0, 0)
        put(producer, A, 0, b"whole")


def test_what_is_being_written_cannot_be_taken() -> None:
    with queue() as (_, producer, consumer):
        with producer.put(A, 0, "uint8", (4,), WAIT), pytest.raises(QueueTimeout):
            consumer.take(A, 0, 0)
        consumer.take(A, 0, 0)


def test_each_of_several_producers_has_its_part() -> None:
    """Of four slots each of two producers has two: when its own are full it waits, though others are free, and what it
    put is held for its sibling, too."""
    with (
        TensorQueue.create("test", 4, 64, producers=2) as supervisor,
        TensorQueue.attach(supervisor.spec, supervisor.fds, "producer", 1, 0) as first,
        TensorQueue.attach(supervisor.spec, supervisor.fds, "producer", 2, 1) as second,
    ):
        put(first, A, 0, b"0")
        put(first, A, 1, b"1")
        with pytest.raises(QueueTimeout, match="depth 2 of 4 slots"), first.put(A, 2, "uint8", (1,), 0.02):
            pytest.fail("got a slot")
        put(second, B, 0, b"2")
        put(second, B, 1, b"3")
        assert second.holds(A, 0) and first.holds(B, 1)
        with pytest.raises(ValueError, match="already there"):
            put(second, A, 0, b"0")
        assert supervisor.statistics() == QueueStatistics(
            name="test", slots=4, slot_bytes=64, depth=4, peak=4, puts=4, bytes=4
        )
        assert supervisor.check_integrity() == []


def test_numbers_that_a_queue_does_not_have_are_refused() -> None:
    """More producers than slots, more processes than there is room for, and an end of another number: ValueError."""
    for producers, consumers in ((3, 1), (0, 1), (1, 0), (1, 13)):
        with pytest.raises(ValueError, match="expected 1 to 12 of each, and a slot for each producer"):
            TensorQueue.create("test", 2, 64, producers, consumers)
    with TensorQueue.create("test", 2, 64, producers=2) as made:
        with pytest.raises(ValueError, match="got producer 2, expected 0 to 1"):
            TensorQueue.attach(made.spec, made.fds, "producer", 1, 2)
        with pytest.raises(ValueError, match="got consumer 1, expected 0 to 0"):
            TensorQueue.attach(made.spec, made.fds, "consumer", 1, 1)


def test_holds_says_whether_a_put_is_needed() -> None:
    """Not before the put, not while writing, but while it waits and while it is read; not after the release."""
    with queue() as (_, producer, consumer):
        assert not producer.holds(A, 0)
        with producer.put(A, 0, "uint8", (1,), WAIT):
            assert not producer.holds(A, 0)
        assert producer.holds(A, 0)
        assert not producer.holds(A, 1)
        assert not producer.holds(B, 0)
        slot = consumer.take(A, 0, WAIT)
        assert producer.holds(A, 0)
        slot.release()
        assert not producer.holds(A, 0)


def test_putting_twice_is_an_error() -> None:
    with queue() as (_, producer, consumer):
        put(producer, A, 0, b"0")
        with pytest.raises(ValueError, match="already there"):
            put(producer, A, 0, b"0")
        consumer.take(A, 0, WAIT)
        with pytest.raises(ValueError, match="already there"):
            put(producer, A, 0, b"0")


@pytest.mark.parametrize(
    ("task", "sequence", "dtype", "shape", "message"),
    [
        (A, 0, "uint8", (65,), "got 65 bytes, expected at most 64"),
        (A, 0, "float32", (17,), "got 68 bytes, expected at most 64"),
        (A, 0, "complex64", (1,), "got dtype 'complex64', expected one of uint8"),
        (A, 0, "uint8", (0,), "each at least 1"),
        (A, 0, "uint8", (-1, -1), "each at least 1"),
        (A, 0, "uint8", (1,) * 9, "at most 8 dimensions"),
        (A, -1, "uint8", (1,), "got sequence -1"),
        (A, 2**64, "uint8", (1,), "got sequence 18446744073709551616"),
        ("A" * 32, 0, "uint8", (1,), "expected 32 lower-case hex digits"),
        ("a" * 31, 0, "uint8", (1,), "expected 32 lower-case hex digits"),
        ("", 0, "uint8", (1,), "expected 32 lower-case hex digits"),
        ("z" * 32, 0, "uint8", (1,), "expected 32 lower-case hex digits"),
    ],
)
def test_what_a_slot_cannot_hold_is_refused(
    task: str, sequence: int, dtype: str, shape: tuple[int, ...], message: str
) -> None:
    """A ValueError with got and expected, and no slot is used."""
    with queue() as (supervisor, producer, _):
        with pytest.raises(ValueError, match=message), producer.put(task, sequence, dtype, shape, WAIT):
            pytest.fail("got a slot")
        assert supervisor.statistics().depth == 0


def test_releasing_a_task_frees_what_waits_and_what_is_read() -> None:
    with queue() as (supervisor, producer, consumer):
        put(producer, A, 0, b"0")
        put(producer, A, 1, b"1")
        put(producer, B, 0, b"2")
        consumer.take(A, 1, WAIT)
        assert consumer.release(A) == 2
        assert consumer.release(A) == 0
        assert supervisor.statistics().depth == 1
        consumer.take(B, 0, WAIT)


def test_an_old_slot_does_not_free_its_successor() -> None:
    """A slot is freed by its task, put again with the same key and taken again: the old handle's release is ignored."""
    with queue(slots=1) as (supervisor, producer, consumer):
        put(producer, A, 0, b"first")
        old = consumer.take(A, 0, WAIT)
        consumer.release(A)
        put(producer, A, 0, b"second")
        new = consumer.take(A, 0, WAIT)
        old.release()
        assert supervisor.statistics().depth == 1
        new.release()
        assert supervisor.statistics().depth == 0


def test_statistics_count_across_restarts() -> None:
    """A second producer goes on counting where the first one stopped."""
    with queue() as (supervisor, producer, consumer):
        put(producer, A, 0, b"1234")
        put(producer, A, 1, b"56")
        consumer.release(A)
        with TensorQueue.attach(supervisor.spec, supervisor.fds, "producer", 2) as successor:
            put(successor, B, 0, b"7")
        assert supervisor.statistics() == QueueStatistics(
            name="test", slots=3, slot_bytes=64, depth=1, peak=2, puts=3, bytes=7
        )


def test_purge_frees_in_the_place_of_a_consumer() -> None:
    """The supervisor purges one task: its waiting and its read slots are free, the other task's stay."""
    with queue() as (supervisor, producer, consumer):
        put(producer, A, 0, b"0")
        put(producer, A, 1, b"1")
        put(producer, B, 0, b"2")
        consumer.take(A, 0, WAIT)
        assert supervisor.purge(A) == 2
        assert supervisor.statistics().depth == 1
        put(producer, A, 0, b"0 again")
        assert bytes(consumer.take(A, 0, WAIT).view) == b"0 again"


def test_purge_leaves_what_a_living_producer_is_writing() -> None:
    with queue() as (supervisor, producer, consumer):
        with producer.put(A, 0, "uint8", (1,), WAIT) as view:
            assert supervisor.purge(A) == 0
            view[:] = b"x"
        assert bytes(consumer.take(A, 0, WAIT).view) == b"x"


def test_purge_wakes_a_producer() -> None:
    with queue(slots=1) as (supervisor, producer, consumer):
        put(producer, A, 0, b"0")
        waiting = threading.Thread(target=put, args=(producer, B, 0, b"1"), daemon=True)
        waiting.start()
        supervisor.purge(A)
        waiting.join(WAIT)
        assert not waiting.is_alive()
        consumer.take(B, 0, WAIT)


@pytest.mark.parametrize("role", ["producer", "consumer"])
def test_each_role_only_does_its_own(role: str) -> None:
    """What another role may do is an AssertionError: no state has two writers."""
    with queue() as ends:
        end = ends.producer if role == "producer" else ends.consumer
        with pytest.raises(AssertionError, match=f"reclaim by the {role}"):
            end.reclaim("producer", 1)
        with pytest.raises(AssertionError, match=f"purge by the {role}"):
            end.purge(A)
        with pytest.raises(AssertionError, match="by the"):
            ends.producer.take(A, 0, 0)
        with pytest.raises(AssertionError, match="by the"):
            ends.consumer.release(A) if role == "x" else ends.producer.release(A)
        with pytest.raises(AssertionError, match="by the"), ends.supervisor.put(A, 0, "uint8", (1,), 0):
            pytest.fail("got a slot")


def test_a_view_outlives_the_queue() -> None:
    """Everything is closed while a slot is still being read: its bytes stay."""
    with queue() as (_, producer, consumer):
        put(producer, A, 0, b"kept")
        view = consumer.take(A, 0, WAIT).view
    assert bytes(view) == b"kept"


def test_descriptors_that_do_not_fit_are_refused() -> None:
    """A wrong number of descriptors, another size, or memory that is no queue: ValueError, and nothing is left open."""
    with TensorQueue.create("test", 3, 64) as made, SharedMemory.create("other", 8 * 32 * 4) as other:
        assert len(made.fds) == FDS_PER_QUEUE
        assert not any(os.get_inheritable(fd) for fd in made.fds)
        with pytest.raises(ValueError, match="got 3 descriptors, expected 4"):
            TensorQueue.attach(made.spec, made.fds[:3], "producer", 1)
        with pytest.raises(ValueError, match="bytes, expected"):
            TensorQueue.attach(QueueSpec(name="test", slots=4, slot_bytes=64), made.fds, "producer", 1)
        with pytest.raises(ValueError, match="got 3 slots of 64 bytes, expected 3 of 65"):
            TensorQueue.attach(QueueSpec(name="test", slots=3, slot_bytes=65), made.fds, "producer", 1)
        with pytest.raises(ValueError, match="got 0 slots of 0 bytes"):
            TensorQueue.attach(made.spec, [other.fd, *made.fds[1:]], "producer", 1)


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, 64), (1, 0), (-1, 64)])
def test_a_queue_without_room_is_refused(slots: int, slot_bytes: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 of 1"):
        TensorQueue.create("test", slots, slot_bytes)


@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (0, 9, "table header"),
        (32, 9, "state 9 is none of FREE"),
        (32, 1, "WRITING since epoch 1, but the process is of epoch 5"),
        (32, 3, "READING since epoch 0, but the process is of epoch 1"),
        (32 + 5, 63, "63 bytes for uint8"),
        (32 + 8, 0, "is no tensor"),
        (32 + 11, 0, "is no tensor"),
        (64, 2, "is also in slot 0"),
    ],
)
def test_integrity_check_finds_what_is_broken(offset: int, value: int, problem: str) -> None:
    """Control: one wrong word in a sound queue, and the check names it."""
    with queue() as (supervisor, producer, consumer):
        put(producer, A, 0, b"x" * 64)
        put(producer, A, 1, b"x" * 64)
        consumer.release(A)
        put(producer, A, 0, b"x" * 64)
        with SharedMemory.attach(supervisor.fds[0], os.fstat(supervisor.fds[0]).st_size) as raw:
            words = raw.view.cast("Q")
            before = bytes(words)
            words[8] = 5
            words[64 + 4] = 0
            assert supervisor.check_integrity() == []
            words[offset] = value
            assert any(problem in found for found in supervisor.check_integrity())
            words[:] = memoryview(before).cast("Q")
            words.release()


def test_tensor_bytes() -> None:
    assert [tensor_bytes(dtype, (2, 3)) for dtype in ("uint8", "bfloat16", "float32", "int64")] == [6, 12, 24, 48]
