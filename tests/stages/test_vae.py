"""The vae stage: chunks, their cache, and init files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.params import ModelParams
from ipc.errors import BadRequest, NumericalError
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.stage import Run
from ipc.tensor_queue import TensorQueue
from ipc.tensors import put_tensor, slot_tensor
from stages.models.image_encoder import image_tokens
from stages.stage import Stage
from stages.vae import VaeStage
from stages.vae_clips import InitChunks, to_frames, to_pixels
from tests.stages.reference import make_image_encoder
from tests.stages.rig import CHANNELS, FIRST_FRAME, Rig, finish, is_empty, make_checkpoint, make_job

replace = msgspec.structs.replace
FIRST_FRAME_22 = replace(FIRST_FRAME, vae=replace(FIRST_FRAME.vae, is_residual=True, patch_size=2, decoder_base_dim=8))


def put_latents(rig: Rig, job: Job) -> torch.Tensor:
    """Random latents of 3 frames, the same every time."""
    latents = torch.randn(4, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    queue = rig.memory.queues["latents"]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        put_tensor(producer, job.id, 0, latents, 1.0)
    return latents


def decode(stage: Stage, job: Job, index: int) -> None:
    finish(stage, Run(id=job.id, phase="decode", index=index))


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
        whole = to_frames(stage._vae.module.decode(latents.unsqueeze(0)))
    assert int((frames.int() - whole.int()).abs().max()) <= 1
    assert stage.state().bytes > 0
    stage.drop(job.id)
    assert is_empty(rig)
    assert stage.state().tasks == frozenset() and stage.state().bytes == 0


def test_a_clip_in_tiles(rig: Rig) -> None:
    """From memory level 1 on: the same bytes in the same chunks, whichever is asked for first and by whom; all frames
    are held from the last part on. A clip that began before the level changed goes on as it began."""
    job, other = make_job(), make_job()
    for each in (job, other):
        put_latents(rig, each)
    stage = rig.load("vae")
    assert isinstance(stage, VaeStage)
    stage.begin(job)
    decode(stage, job, 0)
    stage.set_memory(MemoryPlan(level=1), [])
    decode(stage, job, 1)
    expected = torch.cat([take(rig, "frames", job, i) for i in range(2)])
    rig.reclaim("vae")
    tiled = rig.load("vae", memory=MemoryPlan(level=1))
    for each in (job, other):
        tiled.begin(each)
    decode(tiled, job, 1)
    assert torch.equal(take(rig, "frames", job, 1), expected[5:])
    assert tiled.state().bytes == expected.nbytes
    decode(tiled, other, 0)
    assert torch.equal(video(rig, tiled, job), expected)
    decode(tiled, other, 1)
    assert torch.equal(torch.cat([take(rig, "frames", other, i) for i in range(2)]), expected)
    for each in (job, other):
        tiled.drop(each.id)
    assert is_empty(rig)


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
    rig.reclaim("vae")
    tiled, again = rig.load("vae", memory=MemoryPlan(level=1)), make_job(init=job.init)
    encode(tiled, again)
    assert torch.equal(take(rig, "init_latents", again), latents)
    tiled.drop(again.id)
    still = torch.from_numpy(pixels).expand(9, 32, 48, 3)
    with torch.inference_mode():
        torch.testing.assert_close(latents, stage._vae.module.encode(to_pixels(still))[0], atol=1e-4, rtol=1e-4)
    stage.drop(job.id)
    assert is_empty(rig)


def noise(path: Path, height: int, width: int) -> torch.Tensor:
    """Write a picture; what is in it, [height, width, 3]."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels)


def with_image_encoder(directory: Path) -> Path:
    """A checkpoint whose image encoder has its last block and norm, as it is published."""
    make_checkpoint(directory, CHANNELS)
    torch.manual_seed(1)
    state = make_image_encoder(CHANNELS.image_encoder).state_dict()
    save_file(state, directory / "image_encoder" / "model.safetensors")
    return directory


def encode(stage: Stage, job: Job) -> None:
    stage.begin(job)
    finish(stage, Run(id=job.id, phase="encode", index=0))


def test_an_image_to_move_becomes_latents_and_tokens(tmp_path: Path) -> None:
    """Image-to-video with channels: sequence 0 is the VAE's encoding of the image and 8 frames of grey; sequence 1 the
    tokens of the picture at its own size, which is not the request's. A second time, after a crash, they are the same
    bytes. The hashes of both networks are told."""
    pixels = noise(tmp_path / "i.png", 64, 96)
    job = make_job(init=str(tmp_path / "i.png"), init_as="channels")
    put = []
    with Rig(with_image_encoder(tmp_path / "checkpoint"), CHANNELS) as rig:
        for _ in range(2):
            stage = rig.load("vae")
            assert isinstance(stage, VaeStage) and stage._image_encoder is not None
            assert stage.weights.keys() == rig.loaded.keys() == {"vae", "image_encoder"}
            encode(stage, job)
            put.append([take(rig, "init_latents", job, sequence) for sequence in range(2)])
            rig.reclaim("vae")
        with torch.inference_mode():
            clip = torch.zeros(1, 3, 9, 32, 48)
            clip[:, :, :1] = next(iter(InitChunks(job, 4)))
            latents = stage._vae.module.encode(clip)[0]
            tokens = image_tokens(stage._image_encoder.module, pixels)
        stage.drop(job.id)
        assert is_empty(rig)
    assert all(torch.equal(a, b) for a, b in zip(*put, strict=True))
    torch.testing.assert_close(put[0][0], latents, atol=1e-4, rtol=1e-4)
    assert put[0][0].shape == (4, 3, 4, 6) and put[0][1].shape == (5, 8)
    assert torch.equal(put[0][1], tokens) and tokens.dtype == torch.float32


@pytest.mark.parametrize(("model", "shape"), [(FIRST_FRAME, (4, 1, 4, 6)), (FIRST_FRAME_22, (4, 1, 2, 3))])
def test_an_image_as_first_frame(tmp_path: Path, model: ModelParams, shape: tuple[int, ...]) -> None:
    """Image-to-video with a first frame: the image's own latent frame, for the VAEs of stride 8 and 16, and no more."""
    pixels = noise(tmp_path / "i.png", 32, 48)
    job = make_job(init=str(tmp_path / "i.png"), init_as="first_frame")
    with Rig(make_checkpoint(tmp_path / "checkpoint", model), model) as rig:
        stage = rig.load("vae")
        assert isinstance(stage, VaeStage)
        encode(stage, job)
        assert rig.depths()["init_latents"] == 1
        latents = take(rig, "init_latents", job)
        with torch.inference_mode():
            assert torch.equal(latents, stage._vae.module.encode(to_pixels(pixels[None]))[0])
        stage.drop(job.id)
        assert latents.shape == shape and is_empty(rig)


@pytest.mark.parametrize("init_as", ["start", "channels", "first_frame"])
def test_a_clip_comes_in_chunks(tmp_path: Path, init_as: str) -> None:
    """81 frames at 832x480 from a picture: 1 frame, then 8 at a time, never more at once; the picture first, at any
    request's size; then the same picture, mid-grey, or nothing."""
    noise(tmp_path / "i.png", 30, 50)
    job = make_job(init=str(tmp_path / "i.png"), init_as=init_as, num_frames=81, height=480, width=832)
    counts = []
    for chunk in InitChunks(job, 8):
        assert chunk.shape[:2] == (1, 3) and chunk.shape[3:] == (480, 832) and chunk.dtype == torch.float32
        if not counts:
            first = chunk
        assert torch.equal(chunk[:, :, -1:], first if init_as == "start" or not counts else torch.zeros_like(first))
        counts.append(chunk.shape[2])
    assert counts == ([1] if init_as == "first_frame" else [1] + [8] * 10)


def moving(path: Path, frames: int) -> str:
    """A video of noise, of 64x48."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def most_read(chunks: InitChunks) -> int:
    """Bytes of pictures that there are at once while they are gone through."""
    tracemalloc.start()
    try:
        for chunk in chunks:
            del chunk
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_video_is_read_while_it_is_encoded(tmp_path: Path) -> None:
    """Untiled, 81 frames and 161 take the memory of 17, which is that of a chunk. Where they are kept for the tiles,
    they are what `nbytes` says, and no more."""
    picture, init = 64 * 48 * 3, moving(tmp_path / "i.mp4", 161)
    for kept in (False, True):
        most = {}
        for frames in (17, 81, 161):
            chunks = InitChunks(make_job(init=init, num_frames=frames, width=64, height=48), 8, kept=kept)
            most[frames] = most_read(chunks)
            assert chunks.nbytes == (frames * picture if kept else 0)
        for frames in (81, 161):
            grew, more = most[frames] - most[17], (frames - 17) * picture
            assert abs(grew - (more if kept else 0)) < 4 * picture, (kept, most)


def test_what_is_kept_of_a_video_can_be_gone_through_again(tmp_path: Path) -> None:
    """The first time ends in the middle of the file, as when a tile fails: what comes then are the bytes of a clip that
    is gone through once, and again, though the file is gone."""
    job = make_job(init=moving(tmp_path / "i.mp4", 17), num_frames=17, width=64, height=48)
    expected = torch.cat(list(InitChunks(job, 8)), dim=2)
    chunks = InitChunks(job, 8, kept=True)
    begun = iter(chunks)
    next(begun), next(begun)
    (tmp_path / "i.mp4").unlink()
    for _ in range(2):
        assert torch.equal(torch.cat(list(chunks), dim=2), expected)


def test_an_image_that_is_held_still_is_kept_once(tmp_path: Path) -> None:
    noise(tmp_path / "i.png", 30, 50)
    chunks = InitChunks(make_job(init=str(tmp_path / "i.png"), num_frames=81), 8, kept=True)
    assert sum(chunk.shape[2] for chunk in chunks) == 81 and chunks.nbytes == 32 * 48 * 3


def test_a_video_that_ends_in_the_middle_fails_the_request(rig: Rig, tmp_path: Path) -> None:
    """13 frames, and the request wants 17: `BadRequest`, untiled and in tiles; nothing is put, the stage goes on."""
    job = make_job(init=moving(tmp_path / "i.mp4", 13), num_frames=17)
    for level in (0, 1):
        stage = rig.load("vae", memory=MemoryPlan(level=level))
        stage.begin(job)
        with pytest.raises(BadRequest, match=r"'i\.mp4' has 13 frames and the request 17"):
            stage.step(Run(id=job.id, phase="encode", index=0))
        stage.drop(job.id)
        assert is_empty(rig)
        rig.reclaim("vae")


def test_values_of_the_image_encoder_that_are_not_finite(tmp_path: Path) -> None:
    """A NaN in the image encoder's weights: `NumericalError` that names that network."""
    noise(tmp_path / "i.png", 32, 48)
    job = make_job(init=str(tmp_path / "i.png"), init_as="channels")
    with Rig(with_image_encoder(tmp_path / "checkpoint"), CHANNELS) as rig:
        stage = rig.load("vae")
        assert isinstance(stage, VaeStage) and stage._image_encoder is not None
        stage._image_encoder.module.vision_model.pre_layrnorm.weight = torch.nn.Parameter(torch.full((8,), torch.nan))
        with pytest.raises(NumericalError, match="weights of the image encoder"):
            encode(stage, job)


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
    """Every uint8 value survives the way to [-1, 1] and back."""
    frames = torch.arange(256, dtype=torch.uint8).repeat(9, 1, 1).unsqueeze(-1).expand(9, 1, 256, 3)
    pixels = to_pixels(frames)
    assert pixels.shape == (1, 3, 9, 1, 256)
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
    assert torch.equal(to_frames(pixels), frames)
