"""Clips that the vae codes in tiles, part by part: what comes when, what may happen between two parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from engine.footprint import RequestSize, decoded_bytes, encoded_bytes
from engine.params import Limits, ModelParams
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.reports import Parts
from ipc.messages.stage import Run
from stages.models import vae_fast_tiles, vae_plain_tiles
from stages.models.vae_check import random_vae
from stages.models.vae_codec import Codec, FastCodec, PlainClip, PlainCodec, encode_tiles
from stages.models.vae_tiles import Costs, Cut, Piece, Tile, tiles
from stages.models.vae_walk import TorchOperations
from stages.stage import Stage
from stages.vae import VaeStage
from stages.vae_clips import InitChunks, TileDecoding, TileEncoding
from tests.stages.rig import CHUNK, FIRST_FRAME, MODEL, Rig, finish, is_empty, make_checkpoint, make_job
from tests.stages.test_vae import FIRST_FRAME_22, moving, put_latents, take, video

TILED = MemoryPlan(level=1)
PARTS = 5
"""Four tiles, and the lowest level."""
TEXT_22 = msgspec.structs.replace(
    FIRST_FRAME_22, conditioning=MODEL.conditioning, limits=Limits(max_pixels=64 * 96, max_frames=17)
)
"""Wan2.2's VAE, with requests from text."""


@pytest.fixture(autouse=True)
def four_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the budget is."""

    def chosen(height: int, width: int, costs: Costs, budget: int, cut: Cut) -> list[Tile]:
        return list(tiles(height, width, 2, 2, costs.reach, cut))

    monkeypatch.setattr(vae_plain_tiles, "plan", chosen)
    monkeypatch.setattr(vae_fast_tiles, "plan", chosen)


@pytest.fixture(params=["torch", "kernels"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stage computes with: as on a CPU, or what the kernels do, in plain torch."""
    if request.param == "kernels":
        monkeypatch.setattr(
            "stages.vae.make_codec", lambda vae, kind, device: FastCodec(vae, TorchOperations(), torch.float32)
        )


@pytest.fixture(params=[MODEL, TEXT_22], ids=["2.1", "2.2"])
def any_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with Rig(make_checkpoint(tmp_path / "any", request.param), request.param) as rig:
        yield rig


def decode(job: Job, index: int = 0) -> Run:
    return Run(id=job.id, phase="decode", index=index)


def load(rig: Rig, *jobs: Job, level: int = 1) -> VaeStage:
    """The vae that knows these tasks, in a new process."""
    rig.reclaim("vae")
    stage = rig.load("vae", memory=MemoryPlan(level=level))
    assert isinstance(stage, VaeStage)
    for job in jobs:
        stage.begin(job)
    return stage


def job_of(rig: Rig, **fields: object) -> Job:
    """With latents of 3 frames that wait to be decoded: of 4 x 6, also where a latent is of 16 x 16 pixels."""
    scale = rig.model.vae.spatial_stride
    job = make_job(height=4 * scale, width=6 * scale, **fields)
    if job.init is None:
        put_latents(rig, job)
    return job


def expected_frames(rig: Rig) -> torch.Tensor:
    job = job_of(rig)
    stage = load(rig, job, level=0)
    frames = video(rig, stage, job)
    stage.drop(job.id)
    return frames


@pytest.mark.usefixtures("codec")
def test_a_clip_in_parts(any_rig: Rig) -> None:
    """A part in each quantum, with a sign of life in each; nothing is put before the last. Between parts the level
    goes up and down, from host memory and back: the bytes are those of the untiled clip. Only frames are kept then."""
    rig = any_rig
    job, expected = job_of(rig), expected_frames(rig)
    stage = load(rig, job)
    for done, level in enumerate((2, 0, 3, 1), 1):
        beats = rig.beats
        assert stage.step(decode(job)) == Parts(done, PARTS)
        assert rig.beats > beats and rig.depths()["frames"] == 0
        assert stage.state().bytes > expected.nbytes
        stage.set_memory(MemoryPlan(level=level, blocks=0 if level == 3 else None), [])
        assert level < 2 or stage._codec is None, "nothing is on the device between two parts"
    assert stage.step(decode(job)) == Parts(PARTS, PARTS)
    assert stage.state().bytes == expected.nbytes
    assert finish(stage, decode(job, 1)) == [Parts(PARTS, PARTS)]
    assert torch.equal(torch.cat([take(rig, "frames", job, i) for i in range(2)]), expected)
    stage.drop(job.id)
    assert is_empty(rig)


def test_two_clips_take_turns(rig: Rig) -> None:
    """A part of one, a part of the other; one is dropped in the middle, with all that was kept for it: the other's
    frames are the same bytes."""
    expected, one, other = expected_frames(rig), job_of(rig), job_of(rig)
    stage = load(rig, one, other)
    for done in range(1, 4):
        assert stage.step(decode(one)) == Parts(done, PARTS)
        assert stage.step(decode(other)) == Parts(done, PARTS)
    held = stage.state().bytes
    stage.drop(one.id)
    assert stage.state().bytes == held / 2
    assert torch.equal(video(rig, stage, other), expected)
    stage.drop(other.id)
    assert stage.state().bytes == 0 and is_empty(rig)


def test_a_chunk_that_was_granted_ahead_does_a_part(rig: Rig) -> None:
    """Chunk 1 is asked for after an unfinished chunk 0: it does the next part, whichever chunk is asked for."""
    expected, job = expected_frames(rig), job_of(rig)
    stage = load(rig, job)
    assert stage.step(decode(job, 0)) == Parts(1, PARTS)
    assert stage.step(decode(job, 1)) == Parts(2, PARTS)
    assert torch.equal(video(rig, stage, job), expected)


def test_a_part_that_fails_leaves_those_before_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third tile has not memory enough in its second chunk: it alone is done again, at the next level, and the
    bytes are the same."""
    expected, job = expected_frames(rig), job_of(rig)
    stage = load(rig, job)
    for done in range(1, 4):
        assert stage.step(decode(job)) == Parts(done, PARTS)

    def short(pieces: Callable[[PlainCodec, list[object], Tile], Iterator[Piece]]) -> object:
        def some(codec: PlainCodec, kept: list[object], tile: Tile) -> Iterator[Piece]:
            yield next(pieces(codec, kept, tile))
            raise MemoryError("the tile does not fit")

        return some

    with monkeypatch.context() as patch:
        patch.setattr(PlainCodec, "decode_tile", short(PlainCodec.decode_tile))
        with pytest.raises(MemoryError):
            stage.step(decode(job))
    stage.set_memory(MemoryPlan(level=2), [])
    assert stage.step(decode(job)) == Parts(4, PARTS)
    assert torch.equal(video(rig, stage, job), expected)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_chunk_that_lacks_memory_untiled_is_done_in_tiles(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """At level 0 the first or the second chunk has not memory enough; the level goes up, and the clip is done in tiles,
    with the same bytes."""
    expected, job = expected_frames(rig), job_of(rig)
    stage = load(rig, job, level=0)
    for index in range(failing):
        assert stage.step(decode(job, index)) is None

    def short(clip: PlainClip, latents: torch.Tensor) -> torch.Tensor:
        raise MemoryError("the chunk does not fit")

    with monkeypatch.context() as patch:
        patch.setattr(PlainClip, "decode", short)
        with pytest.raises(MemoryError):
            stage.step(decode(job, failing))
    stage.set_memory(TILED, [])
    assert stage.step(decode(job, failing)) == Parts(1, PARTS)
    for index in range(failing, 2):
        assert finish(stage, decode(job, index))[-1] == Parts(PARTS, PARTS)
    assert torch.equal(torch.cat([take(rig, "frames", job, i) for i in range(2)]), expected)


@pytest.mark.parametrize("model", [MODEL, FIRST_FRAME, FIRST_FRAME_22], ids=["start", "first_frame", "2.2"])
@pytest.mark.usefixtures("codec")
def test_an_init_file_in_parts(tmp_path: Path, model: ModelParams) -> None:
    """A part in each quantum, and the latents with the last, while the level goes up and down: the bytes of all parts
    at once. What is kept between them is gone when the task is dropped in the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "init.png")
    init_as = "start" if model is MODEL else "first_frame"
    with Rig(make_checkpoint(tmp_path / "checkpoint", model), model) as rig:
        jobs = [job_of(rig, init=str(tmp_path / "init.png"), init_as=init_as) for _ in range(2)]
        runs = [Run(id=job.id, phase="encode", index=0) for job in jobs]
        stage = load(rig, *jobs)
        size = jobs[0].height // model.vae.spatial_stride, jobs[0].width // model.vae.spatial_stride
        with torch.inference_mode():
            chunks = list(InitChunks(jobs[0], CHUNK * model.vae.temporal_stride))
            expected = encode_tiles(stage._codec_of(jobs[0]), chunks, *size)[0]
        for done, level in enumerate((2, 0, 3, 1), 1):
            beats = rig.beats
            assert stage.step(runs[0]) == Parts(done, PARTS)
            assert rig.beats > beats and rig.depths()["init_latents"] == 0
            stage.set_memory(MemoryPlan(level=level, blocks=0 if level == 3 else None), [])
        assert stage.step(runs[0]) == Parts(PARTS, PARTS)
        assert torch.equal(take(rig, "init_latents", jobs[0]), expected)
        assert stage.state().bytes == 0
        assert stage.step(runs[1]) == Parts(1, PARTS) and stage.state().bytes > 0
        for job in jobs:
            stage.drop(job.id)
        assert stage.state().bytes == 0 and is_empty(rig)


def test_a_successor_begins_with_the_first_part(rig: Rig) -> None:
    """The process dies after the third part: its successor has none, and makes the same bytes."""
    expected, job = expected_frames(rig), job_of(rig)
    stage: Stage = load(rig, job)
    for _ in range(3):
        stage.step(decode(job))
    stage = load(rig, job)
    assert stage.step(decode(job)) == Parts(1, PARTS)
    assert torch.equal(video(rig, stage, job), expected)


VAES = {
    "tiny 2.1": MODEL.vae,
    "tiny 2.2": TEXT_22.vae,
    "deep 2.1": msgspec.structs.replace(MODEL.vae, dim_mult=(1, 1, 2, 3)),
    "late 2.2": msgspec.structs.replace(TEXT_22.vae, dim_mult=(1, 1, 2, 2), temporal_downsample=(True, True, False)),
}


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("kind", ["torch", "kernels"])
@pytest.mark.parametrize("frames", [1, 17, 33])
@torch.inference_mode()
def test_what_a_clip_keeps_in_host_memory(name: str, kind: str, frames: int, tmp_path: Path) -> None:
    """Between its parts, at most, decoded and encoded: to the byte what `engine/footprint.py` reckons with."""
    config, device = VAES[name], torch.device("cpu")
    vae = random_vae(config, device)
    codec: Codec = PlainCodec(vae) if kind == "torch" else FastCodec(vae, TorchOperations(), torch.bfloat16)
    dtype = "float32" if kind == "torch" else "bfloat16"
    width, height = 6 * config.spatial_stride, 4 * config.spatial_stride
    size = RequestSize(width, height, frames)

    decoding, most = TileDecoding(CHUNK, lambda: None, device), 0
    latents = torch.zeros(config.z_dim, (frames - 1) // config.temporal_stride + 1, 4, 6)
    while decoding.chunk(lambda: codec, latents, 0) is None:
        most = max(most, decoding.nbytes)
    assert most == decoded_bytes(config, size, dtype)

    job = make_job(init=moving(tmp_path / "i.mp4", frames + 1), num_frames=frames, width=width, height=height)
    encoding, most = TileEncoding(job, CHUNK, lambda: None, codec), 0
    while encoding.part(codec) is None:
        most = max(most, encoding.nbytes)
    assert most == encoded_bytes(config, size, dtype, read=frames)
