"""`TensorQueue` between real processes, which are killed."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from typing import Literal

import pytest

from ipc.slot_table import Side
from ipc.tensor_queue import QueueTimeout, TensorQueue
from tests.ipc.conftest import PeerProcess
from tests.ipc.peer import WAIT, DieAt, Put, PutForEver, Take, pattern

A, B = "a" * 32, "b" * 32
Peers = Callable[[], PeerProcess]


def test_a_stream_of_tensors_passes_between_two_processes(peers: Peers) -> None:
    """500 tensors of 10 kB through 3 slots, put by one process and taken by another: every byte arrives, and the queue
    was never deeper than its slots."""
    producer, consumer = peers(), peers()
    with TensorQueue.create("stream", 3, 10_000) as queue:
        producer.attach(queue, "producer", 1)
        consumer.attach(queue, "consumer", 1)
        sequences = list(range(500))
        producer.tell(Put(task=A, sequences=sequences, nbytes=10_000))
        consumer.tell(Take(task=A, sequences=sequences))
        expected = hashlib.sha256(b"".join(pattern(A, sequence, 10_000) for sequence in sequences)).hexdigest()
        assert consumer.hear() == expected
        assert producer.hear() == "put"
        statistics = queue.statistics()
        assert (statistics.depth, statistics.puts, statistics.bytes) == (0, 500, 5_000_000)
        assert statistics.peak <= 3
        assert queue.check_integrity() == []


def test_a_producer_killed_while_writing(peers: Peers) -> None:
    """The producer is killed in the middle of a tensor. The consumer never sees it; after `reclaim` the slot is free
    and a new producer puts the tensor again, whole."""
    first, consumer = peers(), peers()
    with TensorQueue.create("killed", 1, 1000) as queue:
        first.attach(queue, "producer", 1)
        consumer.attach(queue, "consumer", 1)
        assert first.ask(Put(task=A, sequences=[0], nbytes=1000, stuck=True)) == "writing"
        first.kill()
        assert queue.statistics().depth == 1
        second = peers()
        assert queue.reclaim("producer", 1) == 1
        assert queue.statistics().depth == 0
        second.attach(queue, "producer", 2)
        consumer.tell(Take(task=A, sequences=[0]))
        assert second.ask(Put(task=A, sequences=[0], nbytes=1000)) == "put"
        assert consumer.hear() == hashlib.sha256(pattern(A, 0, 1000)).hexdigest()
        assert queue.check_integrity() == []


def test_integrity_tells_a_slot_that_was_not_reclaimed(peers: Peers) -> None:
    """Control: a new producer attaches although its killed predecessor's slot was not given back; the check says so."""
    first, second = peers(), peers()
    with TensorQueue.create("forgotten", 1, 1000) as queue:
        first.attach(queue, "producer", 1)
        assert first.ask(Put(task=A, sequences=[0], nbytes=1000, stuck=True)) == "writing"
        first.kill()
        second.attach(queue, "producer", 2)
        assert queue.check_integrity() == [
            "queue 'forgotten': slot 0: WRITING since epoch 1, but the process is of epoch 2"
        ]


def test_a_consumer_killed_while_reading(peers: Peers) -> None:
    """The consumer is killed with two tensors in hand. After `reclaim` its successor takes the same bytes."""
    producer, first = peers(), peers()
    with TensorQueue.create("killed", 2, 1000) as queue:
        producer.attach(queue, "producer", 1)
        first.attach(queue, "consumer", 1)
        assert producer.ask(Put(task=A, sequences=[0, 1], nbytes=1000)) == "put"
        digest = first.ask(Take(task=A, sequences=[0, 1], keep=True))
        first.kill()
        assert queue.reclaim("consumer", 1) == 2
        second = peers()
        second.attach(queue, "consumer", 2)
        assert second.ask(Take(task=A, sequences=[0, 1])) == digest
        assert queue.statistics().depth == 0
        assert queue.check_integrity() == []


def test_several_processes_at_each_side(peers: Peers) -> None:
    """Two producers and two consumers at work on one queue at once, 150 tensors from each producer to one consumer:
    every byte arrives, nothing is counted twice or lost."""
    producers, consumers = [peers(), peers()], [peers(), peers()]
    with TensorQueue.create("shared", 4, 10_000, producers=2, consumers=2) as queue:
        for number in range(2):
            producers[number].attach(queue, "producer", 1 + number, number)
            consumers[number].attach(queue, "consumer", 3 + number, number)
        sequences = list(range(150))
        for task, producer, consumer in zip((A, B), producers, consumers, strict=True):
            producer.tell(Put(task=task, sequences=sequences, nbytes=10_000))
            consumer.tell(Take(task=task, sequences=sequences))
        for task, producer, consumer in zip((A, B), producers, consumers, strict=True):
            expected = hashlib.sha256(b"".join(pattern(task, sequence, 10_000) for sequence in sequences)).hexdigest()
            assert consumer.hear() == expected
            assert producer.hear() == "put"
        statistics = queue.statistics()
        assert (statistics.depth, statistics.puts, statistics.bytes) == (0, 300, 3_000_000)
        assert statistics.peak <= 4
        assert queue.check_integrity() == []


def test_one_of_two_producers_is_killed_while_both_write(peers: Peers) -> None:
    """`reclaim` frees what the dead one was writing, and leaves what its sibling is writing; a successor puts the
    tensor again."""
    first, second, successor = peers(), peers(), peers()
    with (
        TensorQueue.create("siblings", 2, 1000, producers=2) as queue,
        TensorQueue.attach(queue.spec, queue.fds, "consumer", 9) as consumer,
    ):
        first.attach(queue, "producer", 1, 0)
        second.attach(queue, "producer", 2, 1)
        assert first.ask(Put(task=A, sequences=[0], nbytes=1000, stuck=True)) == "writing"
        assert second.ask(Put(task=B, sequences=[0], nbytes=1000, stuck=True)) == "writing"
        first.kill()
        assert queue.reclaim("producer", 1) == 1
        assert queue.statistics().depth == 1
        successor.attach(queue, "producer", 3, 0)
        assert successor.ask(Put(task=A, sequences=[0], nbytes=1000)) == "put"
        assert bytes(consumer.take(A, 0, WAIT).view) == pattern(A, 0, 1000)
        assert queue.check_integrity() == []
        second.kill()
        assert queue.reclaim("producer", 2) == 1


def test_one_of_two_consumers_is_killed_while_both_read(peers: Peers) -> None:
    """`reclaim` gives back what the dead one was reading, and leaves what its sibling has; the sibling takes up the
    dead one's task and finds the same bytes."""
    producer, first, second = peers(), peers(), peers()
    with TensorQueue.create("siblings", 2, 1000, consumers=2) as queue:
        producer.attach(queue, "producer", 1)
        first.attach(queue, "consumer", 2, 0)
        second.attach(queue, "consumer", 3, 1)
        for task in (A, B):
            assert producer.ask(Put(task=task, sequences=[0], nbytes=1000)) == "put"
        digest = first.ask(Take(task=A, sequences=[0], keep=True))
        second.ask(Take(task=B, sequences=[0], keep=True))
        first.kill()
        assert queue.reclaim("consumer", 2) == 1
        assert queue.check_integrity() == []
        assert second.ask(Take(task=A, sequences=[0], keep=True)) == digest
        second.kill()
        assert queue.check_integrity() == []
        assert queue.reclaim("consumer", 3) == 2


def test_purge_after_a_killed_consumer_wakes_the_producer(peers: Peers) -> None:
    """The consumer is killed with the only slot in hand while the producer waits for one: `purge` lets it go on."""
    producer, consumer = peers(), peers()
    with TensorQueue.create("purged", 1, 1000) as queue:
        producer.attach(queue, "producer", 1)
        consumer.attach(queue, "consumer", 1)
        assert producer.ask(Put(task=A, sequences=[0], nbytes=1000)) == "put"
        consumer.ask(Take(task=A, sequences=[0], keep=True))
        producer.tell(Put(task=B, sequences=[0], nbytes=1000))
        consumer.kill()
        assert queue.purge(A) == 1
        assert producer.hear() == "put"


def test_a_producer_killed_at_any_time(peers: Peers) -> None:
    """12 producers are killed at random places in a stream of 1 MB tensors. After each: what is READY is whole, the
    half-written one is gone, and all slots can be used. Seed 0."""
    rng = random.Random(0)
    with (
        TensorQueue.create("chaos", 2, 1_000_000) as queue,
        TensorQueue.attach(queue.spec, queue.fds, "consumer", 1) as consumer,
    ):
        reclaimed = 0
        for epoch in range(1, 13):
            producer = peers()
            producer.attach(queue, "producer", epoch)
            assert producer.ask(PutForEver(task=A, nbytes=1_000_000)) == "started"
            sequence = 0
            for sequence in range(rng.randint(1, 8)):
                assert take_and_check(consumer, sequence, WAIT)
            wait_until(lambda: queue.statistics().depth > 0)
            producer.kill()
            reclaimed += queue.reclaim("producer", epoch)
            while take_and_check(consumer, sequence + 1, 0):
                sequence += 1
            assert queue.statistics().depth == 0
            assert queue.check_integrity() == []
        assert reclaimed > 0, "no kill came while a slot was being written"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def take_and_check(consumer: TensorQueue, sequence: int, timeout: float) -> bool:
    """Take one tensor of A, if it comes; it must be whole."""
    try:
        slot = consumer.take(A, sequence, timeout)
    except QueueTimeout:
        return False
    assert bytes(slot.view) == pattern(A, sequence, 1_000_000)
    slot.release()
    return True


@pytest.mark.parametrize("action", ["put", "take"])
def test_a_kill_at_every_line(peers: Peers, action: Literal["put", "take"]) -> None:
    """A process is killed before the first line, the second line, ... of a put or take, until it comes through. After
    each kill `reclaim` leaves a sound queue: the tensor is not there or whole, and a successor can do its work."""
    peer = peers()
    role: Side = "producer" if action == "put" else "consumer"
    other: Side = "consumer" if action == "put" else "producer"
    with (
        TensorQueue.create("sweep", 1, 100) as queue,
        TensorQueue.attach(queue.spec, queue.fds, other, 1) as end,
    ):
        peer.attach(queue, role, 1)
        outcomes = set()
        for line in range(1, 1000):
            if action == "take":
                with end.put(A, 0, "uint8", (100,), 0) as view:
                    view[:] = pattern(A, 0, 100)
            result = peer.ask(DieAt(action=action, line=line, task=A, nbytes=100))
            outcomes.add((result, state_after(queue, end, action)))
            assert queue.statistics().depth == 0, (action, line)
            assert queue.check_integrity() == [], (action, line)
            if result == "finished":
                break
        assert result == "finished"
        expected = {("killed", "absent"), ("killed", "whole")} if action == "put" else {("killed", "whole")}
        assert outcomes == {*expected, ("finished", "whole")}


def state_after(queue: TensorQueue, end: TensorQueue, action: str) -> str:
    """Reclaim for the dead process, then see what a living consumer finds; the queue is empty afterwards."""
    queue.reclaim("producer" if action == "put" else "consumer", 1)
    if action == "take":
        with TensorQueue.attach(queue.spec, queue.fds, "consumer", 1) as successor:
            return take_if_there(successor)
    return take_if_there(end)


def take_if_there(consumer: TensorQueue) -> str:
    try:
        slot = consumer.take(A, 0, 0)
    except QueueTimeout:
        return "absent"
    assert bytes(slot.view) == pattern(A, 0, 100)
    slot.release()
    return "whole"
