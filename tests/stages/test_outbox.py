"""Results that are delivered while the next quantum computes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from ipc.messages.job import Job
from ipc.messages.reports import AnyStageReport, Dropped, QuantumDone, QuantumFailed
from ipc.messages.stage import Begin, Drop, Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import put_tensor
from stages.leaving import Leaving
from stages.outbox import Outbox
from tests.stages.late_delivery_worker import LAST
from tests.stages.process import WAIT, WorkerProcess
from tests.stages.rig import CHUNK, Rig, is_empty, make_job
from tests.stages.test_vae import take


def report(number: int) -> QuantumDone:
    return QuantumDone(id="task", phase="decode", index=number, begin=0.0, seconds=0.0)


def test_answers_are_sent_in_their_order_while_the_caller_goes_on() -> None:
    """Three are put while the first waits; nothing is sent until it may, and then all are, by another thread."""
    may, sent = threading.Event(), []

    def first() -> AnyStageReport:
        assert may.wait(WAIT) and threading.current_thread() is not threading.main_thread()
        return report(0)

    outbox = Outbox(sent.append)
    assert outbox.is_empty
    outbox.put(first)
    outbox.put(lambda: report(1))
    outbox.put(lambda: report(2))
    assert not outbox.is_empty and sent == []
    may.set()
    outbox.flush()
    assert sent == [report(0), report(1), report(2)] and outbox.is_empty


def test_what_ends_the_process_ends_it_there_too() -> None:
    """An answer that finds the device lost leaves by `SystemExit`: the caller hears it, however it asks."""

    def lost() -> AnyStageReport:
        raise SystemExit(4)

    for ask in (lambda outbox: outbox.flush(), lambda outbox: wait_for(outbox)):
        outbox = Outbox(lambda answer: None)
        outbox.put(lost)
        with pytest.raises(SystemExit) as left:
            ask(outbox)
        assert left.value.code == 4


def wait_for(outbox: Outbox) -> None:
    while not outbox.is_empty:
        pass


def test_a_tensor_that_is_there_is_not_copied_again(rig: Rig) -> None:
    """A quantum that is run again after a crash: the first copy says how much it was, the second that it was none."""
    frames = torch.arange(4 * 32 * 48 * 3).remainder(251).to(torch.uint8).reshape(4, 32, 48, 3)
    queue = rig.memory.queues["frames"]
    job = make_job()
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        copied = Leaving(producer, job.id, 0, frames, 1.0)()
        assert copied is not None and copied.bytes == frames.nbytes and copied.end - copied.begin == copied.seconds > 0
        assert Leaving(producer, job.id, 0, frames, 1.0)() is None
    assert torch.equal(take(rig, "frames", job, 0), frames)


@pytest.fixture
def clip(rig: Rig) -> Iterator[tuple[Job, list[torch.Tensor]]]:
    """A task whose latents wait for the vae, and its chunks as they are without anything beside them."""
    latent_frames = LAST * CHUNK + 1
    job, shape = make_job(num_frames=4 * LAST * CHUNK + 1), (rig.model.vae.z_dim, latent_frames, 4, 6)
    queue = rig.memory.queues["latents"]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        put_tensor(producer, job.id, 0, torch.randn(shape, generator=torch.Generator().manual_seed(3)), 1.0)
        alone = rig.load("vae")
        alone.begin(job)
        chunks = []
        for index in range(LAST + 1):
            alone.step(decode(job, index))
            chunks.append(take(rig, "frames", job, index))
        rig.memory.queues["frames"].purge(job.id)
        rig.reclaim("vae")
        yield job, chunks


def decode(job: Job, index: int) -> Run:
    return Run(id=job.id, phase="decode", index=index)


def test_a_chunk_is_delivered_while_the_next_is_decoded(rig: Rig, clip: tuple[Job, list[torch.Tensor]]) -> None:
    """A vae process has two chunks granted ahead; the delivery of one ends after the next is decoded, or it fails. The
    answers come in their order, each with the copy, which ends after the next quantum; the frames are those of a vae
    that does one thing after the other. It leaves with status 0 after a drop."""
    job, chunks = clip
    with WorkerProcess(rig, ("vae",), "tests.stages.late_delivery_worker") as vae:
        vae.ready()
        vae.tell(Begin(stage="vae", job=job))
        for index in range(LAST + 1):
            vae.tell(decode(job, index))
        answers = [vae.hear() for _ in range(LAST + 1)]
        done = [answer for answer in answers if isinstance(answer, QuantumDone)]
        assert [answer.index for answer in done] == list(range(LAST + 1)), answers
        for before, after in itertools.pairwise(done):
            assert before.delivered is not None and before.delivered.end > after.begin + after.seconds
        for index, chunk in enumerate(chunks):
            assert torch.equal(take(rig, "frames", job, index), chunk)
        rig.memory.queues["frames"].purge(job.id)
        assert vae.ask(Drop(id=job.id, stage="vae")) == Dropped(id=job.id, stage="vae")
        assert vae.stop() == 0
    assert is_empty(rig)


def test_a_delivery_that_fails_fails_its_quantum_and_no_other(
    rig: Rig, clip: tuple[Job, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first copy finds no memory: that quantum is answered `out_of_memory`, as one that computes is; granted again,
    it is decoded anew and its frames are right."""
    job, chunks = clip
    monkeypatch.setenv("LACKING", "1")
    with WorkerProcess(rig, ("vae",), "tests.stages.late_delivery_worker") as vae:
        vae.ready()
        vae.tell(Begin(stage="vae", job=job))
        vae.tell(decode(job, 0))
        vae.tell(decode(job, 1))
        failed = vae.hear()
        assert isinstance(failed, QuantumFailed) and (failed.index, failed.error.code) == (0, "out_of_memory"), failed
        vae.tell(decode(job, 2))
        for index in (1, 2):
            done = vae.hear()
            assert isinstance(done, QuantumDone) and done.index == index, done
        done = vae.ask(decode(job, 0))
        assert isinstance(done, QuantumDone) and done.index == 0, done
        for index, chunk in enumerate(chunks):
            assert torch.equal(take(rig, "frames", job, index), chunk)
        assert vae.stop() == 0
