"""The vae stage: chunks, their cache, and init files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipc.errors import BadRequest, NumericalError
from ipc.messages import Job, Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import put_tensor, slot_tensor
from stages.stage import Stage
from stages.vae import VaeStage, split_frames, to_frames, to_pixels
from tests.stages.rig import Rig, is_empty, make_job


def put_latents(rig: Rig, job: Job) -> torch.Tensor:
    """Random latents of 3 frames, the same every time."""
    latents = torch.randn(4, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    queue = rig.memory.queues["latents"]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        put_tensor(producer, job.id, 0, latents, 1.0)
    return latents


def decode(stage: Stage, job: Job, index: int) -> None:
    stage.step(Run(id=job.id, phase="decode", index=index))


def take(rig: Rig, name: str, job: Job, sequence: int = 0) -> torch.Tensor:
    """What the consumer would find; its slot is free afterwards."""
    queue = rig.memory.queues[name]  # type: ignore[index]
    with TensorQueue.attach(queue.spec, queue.fds, "consumer", 1) as consumer:
        slot = consumer.take(job.id, sequence, 1)
        tensor = slot_tensor(slot).clone()
        slot.release()
    return tensor


def video(rig: Rig, stage: Stage, job: Job) -> torch.Tensor:
    """Both chunks decoded in order, [9, 32, 48, 3]."""
    chunks = []
    for index in range(2):
        decode(stage, job, index)
        chunks.append(take(rig, "frames", job, index))
    return torch.cat(chunks)


def test_chunks_are_the_whole_video_in_pieces(rig: Rig) -> None:
    """Two latent frames, then one: 5 frames, then 4, of uint8; together what the VAE makes of the clip at once, but for
    rounding. Everything is free at the end."""
    stage = rig.load("vae")
    assert isinstance(stage, VaeStage)
    job = make_job()
    latents = put_latents(rig, job)
    stage.begin(job)
    frames = video(rig, stage, job)
    assert frames.shape == (9, 32, 48, 3) and frames.dtype == torch.uint8
    with torch.inference_mode():
        whole = to_frames(stage._vae.decode(latents.unsqueeze(0)))
    assert int((frames.int() - whole.int()).abs().max()) <= 1
    assert stage.state().bytes > 0
    stage.drop(job.id)
    assert is_empty(rig)
    assert stage.state().tasks == frozenset() and stage.state().bytes == 0


def test_lost_and_repeated_chunks_are_the_same_bytes(rig: Rig) -> None:
    """A successor is asked for chunk 1 without having seen chunk 0; a writer that lost its file has chunk 0 decoded
    again; another task is decoded in between: the frames are always the same bytes."""
    job, other = make_job(), make_job()
    for each in (job, other):
        put_latents(rig, each)
    stage = rig.load("vae")
    stage.begin(job)
    expected = video(rig, stage, job)
    rig.reclaim("vae")
    successor = rig.load("vae")
    for each in (job, other):
        successor.begin(each)
    decode(successor, job, 1)
    assert torch.equal(take(rig, "frames", job, 1), expected[5:])
    decode(successor, other, 0)
    assert torch.equal(video(rig, successor, job), expected)
    decode(successor, other, 1)
    assert torch.equal(torch.cat([take(rig, "frames", other, i) for i in range(2)]), expected)


def test_a_chunk_that_is_already_there_is_not_put_twice(rig: Rig) -> None:
    """The process died after it put chunk 0 and before it could tell: it is there once, and chunk 1 follows."""
    job = make_job()
    put_latents(rig, job)
    for _ in range(2):
        rig.reclaim("vae")
        stage = rig.load("vae")
        stage.begin(job)
        decode(stage, job, 0)
    decode(stage, job, 1)
    assert rig.depths()["frames"] == 2
    assert rig.memory.check_integrity() == []


def test_an_init_image_becomes_latents(rig: Rig, tmp_path: Path) -> None:
    """A picture as init: the latents are those of the VAE for that picture held still, but for the order of sums."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "init.png")
    job = make_job(init=str(tmp_path / "init.png"))
    stage = rig.load("vae")
    assert isinstance(stage, VaeStage)
    stage.begin(job)
    stage.step(Run(id=job.id, phase="encode", index=0))
    latents = take(rig, "init_latents", job)
    assert latents.shape == (4, 3, 4, 6) and latents.dtype == torch.float32
    still = torch.from_numpy(pixels).expand(9, 32, 48, 3)
    with torch.inference_mode():
        torch.testing.assert_close(latents, stage._vae.encode(to_pixels(still))[0], atol=1e-4, rtol=1e-4)
    stage.drop(job.id)
    assert is_empty(rig)


def test_a_file_that_is_no_picture_fails_the_request(rig: Rig, tmp_path: Path) -> None:
    """Text as init file: `BadRequest`, nothing is put, and the stage goes on."""
    (tmp_path / "init.png").write_text("not a picture")
    job = make_job(init=str(tmp_path / "init.png"))
    stage = rig.load("vae")
    stage.begin(job)
    with pytest.raises(BadRequest, match=r"init\.png"):
        stage.step(Run(id=job.id, phase="encode", index=0))
    stage.drop(job.id)
    assert is_empty(rig)


def test_values_that_are_not_finite_fail_the_request(rig: Rig) -> None:
    """Latents with a NaN: `NumericalError` that names the chunk."""
    job = make_job()
    queue = rig.memory.queues["latents"]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        put_tensor(producer, job.id, 0, torch.full((4, 3, 4, 6), torch.nan), 1.0)
    stage = rig.load("vae")
    stage.begin(job)
    with pytest.raises(NumericalError, match="chunk 0"):
        decode(stage, job, 0)


def test_pixels_and_frames() -> None:
    """Every uint8 value survives the way to [-1, 1] and back; frames are split as the encoder wants them."""
    frames = torch.arange(256, dtype=torch.uint8).repeat(9, 1, 1).unsqueeze(-1).expand(9, 1, 256, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (1, 3, 9, 1, 256)
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
    assert torch.equal(to_frames(pixels), frames)
    assert [len(chunk) for chunk in split_frames(frames, 8)] == [1, 8]
    assert [len(chunk) for chunk in split_frames(frames[:1], 8)] == [1]
