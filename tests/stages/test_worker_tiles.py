"""A vae process at memory level 1, with the model that ships: a tile in each quantum, between which it hears what it is
told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from engine.models import CONFIGS, load_model
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.reports import Dropped, Parts, QuantumDone, QuantumDropped
from ipc.messages.stage import Begin, Drop, Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import put_tensor
from tests.engine.tiles_worker import PARTS
from tests.stages.process import WAIT, WorkerProcess
from tests.stages.rig import Rig, finish, is_empty, make_job
from tests.stages.test_vae import take


@pytest.fixture
def demo() -> Iterator[Rig]:
    with Rig(CONFIGS / "demo", load_model("wan-demo")) as rig:
        yield rig


def with_latents(rig: Rig) -> Job:
    """3 frames of 8 x 8."""
    job, vae = make_job(height=64, width=64), rig.model.vae
    latents = torch.randn(vae.z_dim, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    queue = rig.memory.queues["latents"]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        put_tensor(producer, job.id, 0, latents, 1.0)
    return job


def decode(job: Job, index: int = 0) -> Run:
    return Run(id=job.id, phase="decode", index=index)


def test_the_counter_moves_in_every_tile_and_a_cancel_waits_for_one(demo: Rig) -> None:
    """Every quantum answers with one more part, and its tile has moved the progress counter by more than its beginning
    and its end do. With the fourth part in hand and another quantum granted ahead, the task is dropped: that part is
    answered, the other quantum is not run, and the task is gone. The next task is decoded part by part; its frames are
    the untiled ones."""
    untiled = demo.load("vae")
    first = with_latents(demo)
    untiled.begin(first)
    for index in range(2):
        finish(untiled, decode(first, index))
    expected = torch.cat([take(demo, "frames", first, index) for index in range(2)])
    untiled.drop(first.id)
    demo.reclaim("vae")
    with WorkerProcess(demo, ("vae",), "tests.engine.tiles_worker", memory=MemoryPlan(level=1)) as vae:
        vae.ready()
        cancelled = with_latents(demo)
        vae.tell(Begin(stage="vae", job=cancelled))
        for done in range(1, 4):
            before = vae.counter.value
            report = vae.ask(decode(cancelled))
            assert isinstance(report, QuantumDone) and report.parts == Parts(done, PARTS)
            received_begin_and_end = 3
            assert vae.counter.value - before > received_begin_and_end
        before, limit = vae.counter.value, time.monotonic() + WAIT
        vae.tell(decode(cancelled))
        while vae.counter.value < before + 2:  # it was received, and has begun
            assert time.monotonic() < limit, "the part did not begin"
        vae.tell(decode(cancelled, 1))
        vae.tell(Drop(id=cancelled.id, stage="vae"))
        report = vae.hear()
        assert isinstance(report, QuantumDone) and report.parts == Parts(4, PARTS)
        assert isinstance(vae.hear(), QuantumDropped)
        assert vae.hear() == Dropped(id=cancelled.id, stage="vae")
        assert is_empty(demo)

        job = with_latents(demo)
        vae.tell(Begin(stage="vae", job=job))
        for done in range(1, PARTS + 1):
            report = vae.ask(decode(job))
            assert isinstance(report, QuantumDone) and report.parts == Parts(done, PARTS)
        report = vae.ask(decode(job, 1))
        assert isinstance(report, QuantumDone) and report.parts == Parts(PARTS, PARTS)
        assert torch.equal(torch.cat([take(demo, "frames", job, index) for index in range(2)]), expected)
        assert vae.ask(Drop(id=job.id, stage="vae")) == Dropped(id=job.id, stage="vae")
        assert vae.stop() == 0
    assert is_empty(demo)
