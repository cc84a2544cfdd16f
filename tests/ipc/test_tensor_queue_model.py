"""`TensorQueue` against a model of it: a dictionary."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipc.tensor_queue import QueueTimeout, Slot, TensorQueue
from tests.ipc.peer import pattern

SLOTS, SLOT_BYTES = 3, 256
tasks = st.sampled_from(["a" * 32, "b" * 32])
sequences = st.integers(0, 2)
Key = tuple[str, int]


class QueueMachine(RuleBasedStateMachine):
    """Every operation of the three roles, with restarts of both sides; the model knows what must be where."""

    def __init__(self) -> None:
        super().__init__()
        self.supervisor = TensorQueue.create("model", SLOTS, SLOT_BYTES)
        self.epoch = self.consumer_epoch = 1
        self.producer = TensorQueue.attach(self.supervisor.spec, self.supervisor.fds, "producer", 1)
        self.consumer = TensorQueue.attach(self.supervisor.spec, self.supervisor.fds, "consumer", 1)
        self.held: dict[Key, tuple[str, int]] = {}
        """Key -> (READY or READING, bytes)."""
        self.taken: list[tuple[Key, Slot]] = []
        self.stale: list[Slot] = []
        self.puts = 0
        self.peak = 0

    def teardown(self) -> None:
        self.taken.clear()
        self.stale.clear()
        for end in (self.producer, self.consumer, self.supervisor):
            end.close()

    @rule(task=tasks, sequence=sequences, nbytes=st.integers(1, SLOT_BYTES), fails=st.booleans())
    def put(self, task: str, sequence: int, nbytes: int, fails: bool) -> None:
        key = (task, sequence)
        assert self.producer.holds(*key) == (key in self.held)
        full = len(self.held) == SLOTS
        try:
            with self.producer.put(*key, "uint8", (nbytes,), 0) as view:
                view[:] = pattern(*key, nbytes)
                if fails:
                    raise InterruptedError
        except ValueError:
            assert key in self.held
        except QueueTimeout:
            assert full and key not in self.held
        except InterruptedError:
            assert not full and key not in self.held
            self.peak = max(self.peak, len(self.held) + 1)
        else:
            assert not full and key not in self.held
            self.held[key] = ("READY", nbytes)
            self.peak = max(self.peak, len(self.held))
            self.puts += 1

    @rule(task=tasks, sequence=sequences)
    def take(self, task: str, sequence: int) -> None:
        key = (task, sequence)
        try:
            slot = self.consumer.take(*key, 0)
        except QueueTimeout:
            assert key not in self.held
            return
        _, nbytes = self.held[key]
        assert (slot.dtype, slot.shape) == ("uint8", (nbytes,))
        assert bytes(slot.view) == pattern(*key, nbytes)
        self.held[key] = ("READING", nbytes)
        self.taken.append((key, slot))

    @precondition(lambda self: self.taken)
    @rule(number=st.integers(0, 100))
    def release_slot(self, number: int) -> None:
        """Free one of those that were taken; the handles of the same slot that are left do nothing any more."""
        key, slot = self.taken[number % len(self.taken)]
        slot.release()
        self.held.pop(key)
        self.drop_handles([key])

    @rule(task=tasks)
    def release_task(self, task: str) -> None:
        self.forget(task, self.consumer.release(task))

    @rule(task=tasks)
    def purge(self, task: str) -> None:
        self.forget(task, self.supervisor.purge(task))

    def forget(self, task: str, freed: int) -> None:
        gone = [key for key in self.held if key[0] == task]
        assert freed == len(gone)
        for key in gone:
            del self.held[key]
        self.drop_handles(gone)

    def drop_handles(self, keys: list[Key]) -> None:
        self.stale += [slot for key, slot in self.taken if key in keys]
        self.taken = [(key, slot) for key, slot in self.taken if key not in keys]

    @precondition(lambda self: self.stale)
    @rule(number=st.integers(0, 100))
    def release_stale_slot(self, number: int) -> None:
        """A handle that lost its slot long ago, which may be in use again, frees nothing."""
        self.stale[number % len(self.stale)].release()

    @rule()
    def restart_producer(self) -> None:
        self.producer.close()
        assert self.supervisor.reclaim("producer", self.epoch) == 0
        self.epoch += 1
        self.producer = TensorQueue.attach(self.supervisor.spec, self.supervisor.fds, "producer", self.epoch)

    @rule()
    def restart_consumer(self) -> None:
        self.consumer.close()
        reading = [key for key, (state, _) in self.held.items() if state == "READING"]
        assert self.supervisor.reclaim("consumer", self.consumer_epoch) == len(reading)
        for key in reading:
            self.held[key] = ("READY", self.held[key][1])
        self.taken, self.stale = [], []
        self.epoch += 1
        self.consumer_epoch = self.epoch
        self.consumer = TensorQueue.attach(self.supervisor.spec, self.supervisor.fds, "consumer", self.epoch)

    @invariant()
    def counts_agree(self) -> None:
        statistics = self.supervisor.statistics()
        assert (statistics.depth, statistics.puts, statistics.peak) == (len(self.held), self.puts, self.peak)
        assert self.supervisor.check_integrity() == []


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_queue_machine = QueueMachine.TestCase
