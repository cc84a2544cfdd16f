"""The writer stage: real frames in, real files out, and file systems that refuse."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ipc.errors import OutputError
from ipc.messages.job import Job
from ipc.messages.stage import Run
from ipc.tensor_queue import TensorQueue
from stages.stage import Stage
from tests.stages.rig import Rig, is_empty, make_job

COLOURS = [(200, 30, 60), (10, 220, 90), (40, 40, 200), (250, 250, 250), (5, 5, 5), (128, 128, 128)]


def flat(colour: tuple[int, int, int], count: int) -> NDArray[np.uint8]:
    """Frames of one colour, of the size of the tiny model."""
    return np.broadcast_to(np.array(colour, np.uint8), (count, 32, 48, 3))


def noise(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 48, 3), np.uint8)


@pytest.fixture
def writer(rig: Rig) -> Stage:
    return rig.load("writer")


@pytest.fixture
def frames(rig: Rig) -> Iterator[TensorQueue]:
    """The vae's end of the queue."""
    queue = rig.memory.queues["frames"]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        yield producer


def put(frames: TensorQueue, job: Job, index: int, chunk: NDArray[np.uint8]) -> None:
    with frames.put(job.id, index, "uint8", chunk.shape, 1.0) as view:
        np.frombuffer(view, np.uint8).reshape(chunk.shape)[:] = chunk


def write(writer: Stage, frames: TensorQueue, job: Job, chunks: list[NDArray[np.uint8]]) -> dict[str, Any] | None:
    """Hand over the chunks one by one; what the last quantum returned."""
    writer.begin(job)
    metadata = None
    for index, chunk in enumerate(chunks):
        put(frames, job, index, chunk)
        last = index == len(chunks) - 1
        metadata = writer.step(
            Run(id=job.id, phase="write", index=index, seconds={"denoise": 1.23456} if last else None)
        )
    writer.drop(job.id)
    return metadata


def test_frames_become_a_video_with_its_metadata(
    writer: Stage, frames: TensorQueue, rig: Rig, tmp_path: Path, read_video: Callable[[Path], Any]
) -> None:
    """Two chunks: H.264 yuv420p at the asked rate, the frames in order, the metadata inside, the index in front, and
    no other file."""
    job = make_job(str(tmp_path / "v.mp4"), fps=12, metadata={"parameters": {"prompt": "ein Kreis, 红色 ß"}})
    metadata = write(writer, frames, job, [flat((200, 30, 60), 5), flat((10, 220, 90), 4)])
    video = read_video(tmp_path / "v.mp4")
    assert (video.codec, video.pixel_format, video.fps) == ("h264", "yuv420p", 12)
    assert video.frames.shape == (9, 32, 48, 3)
    assert np.abs(video.frames[4].mean((0, 1)) - (200, 30, 60)).max() < 4
    assert np.abs(video.frames[5].mean((0, 1)) - (10, 220, 90)).max() < 4
    assert metadata == {**job.metadata, "seconds": {"denoise": 1.235}}
    assert json.loads(video.metadata["comment"]) == metadata
    content = (tmp_path / "v.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert os.listdir(tmp_path) == ["v.mp4"]
    assert is_empty(rig)


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_what_a_player_shows(
    writer: Stage, frames: TensorQueue, tmp_path: Path, read_video: Callable[[Path], Any], colour: tuple[int, int, int]
) -> None:
    """The stream says BT.709, limited range, and a player that believes it shows each colour within 3 of 255."""
    import av

    write(writer, frames, make_job(str(tmp_path / "v.mp4"), num_frames=5), [flat(colour, 5)])
    with av.open(str(tmp_path / "v.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_range, context.color_primaries, context.color_trc)
        assert [int(tag) for tag in tags] == [1, 1, 1, 1]
    assert np.abs(read_video(tmp_path / "v.mp4").frames.mean((0, 1, 2)) - colour).max() <= 3


def test_the_same_frames_give_the_same_bytes(writer: Stage, frames: TensorQueue, tmp_path: Path) -> None:
    """Ten files of the same frames and metadata are identical."""
    for index in range(10):
        write(writer, frames, make_job(str(tmp_path / f"{index}.mp4")), [noise(5), noise(4, 1)])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_metadata_beside_the_video_on_request(
    writer: Stage, frames: TensorQueue, tmp_path: Path, read_video: Callable[[Path], Any]
) -> None:
    """The JSON file has the name of the video and what is inside it; an older pair is replaced."""
    (tmp_path / "my.film.mp4").write_text("old")
    (tmp_path / "my.film.json").write_text("old")
    job = make_job(str(tmp_path / "my.film.mp4"), metadata_json=True)
    metadata = write(writer, frames, job, [noise(5), noise(4)])
    assert json.loads((tmp_path / "my.film.json").read_text()) == metadata
    assert json.loads(read_video(tmp_path / "my.film.mp4").metadata["comment"]) == metadata
    assert sorted(os.listdir(tmp_path)) == ["my.film.json", "my.film.mp4"]


def test_a_dropped_task_leaves_nothing(writer: Stage, frames: TensorQueue, rig: Rig, tmp_path: Path) -> None:
    """The task is dropped after its first chunk, with the second waiting: no file, no slot, no memory of it."""
    job = make_job(str(tmp_path / "v.mp4"))
    writer.begin(job)
    put(frames, job, 0, noise(5))
    writer.step(Run(id=job.id, phase="write", index=0))
    assert writer.state().tasks == {job.id}
    put(frames, job, 1, noise(4))
    writer.drop(job.id)
    assert os.listdir(tmp_path) == []
    assert is_empty(rig)
    assert writer.state().tasks == frozenset() and writer.state().bytes == 0


def test_a_restarted_writer_starts_the_file_over(
    writer: Stage, frames: TensorQueue, rig: Rig, tmp_path: Path, read_video: Callable[[Path], Any]
) -> None:
    """A writer dies after the first chunk and leaves a stale temporary file; its successor gets all chunks again and
    makes the same video as an undisturbed writer."""
    job = make_job(str(tmp_path / "v.mp4"))
    writer.begin(job)
    put(frames, job, 0, noise(5))
    writer.step(Run(id=job.id, phase="write", index=0))
    Path(job.partial).write_text("half")
    rig.reclaim("writer")
    write(rig.load("writer"), frames, job, [noise(5), noise(4, 1)])
    assert os.listdir(tmp_path) == ["v.mp4"]
    write(rig.load("writer"), frames, make_job(str(tmp_path / "w.mp4")), [noise(5), noise(4, 1)])
    assert read_video(tmp_path / "v.mp4").sha256 == read_video(tmp_path / "w.mp4").sha256


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond so many bytes: EFBIG where a full disk gives ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_fails_the_request_and_leaves_nothing(
    writer: Stage, frames: TensorQueue, rig: Rig, tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    """The disk is full at every point of the writing, from the first byte to the last: each time an `OutputError` that
    names the file, the older file of that name untouched, nothing else left, and the next request is served."""
    write(writer, frames, make_job(str(tmp_path / "v.mp4")), [noise(5), noise(4)])
    whole = (tmp_path / "v.mp4").read_bytes()
    for limit in [0, 40, *range(1000, len(whole), 2500), len(whole) - 1]:
        file_limit(limit)
        with pytest.raises(OutputError, match=r"v\.mp4 could not be written: File too large"):
            write(writer, frames, make_job(str(tmp_path / "v.mp4")), [noise(5), noise(4)])
        file_limit(resource.RLIM_INFINITY)
        for identity in writer.state().tasks:
            writer.drop(identity)
        assert os.listdir(tmp_path) == ["v.mp4"] and (tmp_path / "v.mp4").read_bytes() == whole
        assert is_empty(rig)
    assert write(writer, frames, make_job(str(tmp_path / "v.mp4")), [noise(5), noise(4)]) is not None


def test_a_directory_that_is_gone_fails_the_request(writer: Stage, frames: TensorQueue, tmp_path: Path) -> None:
    """The output directory is removed between two chunks: an `OutputError` without its path."""
    directory = tmp_path / "out"
    directory.mkdir()
    job = make_job(str(directory / "v.mp4"))
    writer.begin(job)
    put(frames, job, 0, noise(5))
    writer.step(Run(id=job.id, phase="write", index=0))
    directory.rmdir()
    put(frames, job, 1, noise(4))
    with pytest.raises(OutputError, match=r"^v\.mp4 could not be written: No such file or directory; make its"):
        writer.step(Run(id=job.id, phase="write", index=1))
    writer.drop(job.id)
