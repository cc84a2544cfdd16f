"""The writer stage: chunks of frames become an H.264 mp4. numpy and PyAV only, no torch.

Frames are compressed as they come into an unnamed spool file in the output's directory, so a full disk is found early,
a killed process leaves nothing, and memory does not grow with the video. The last chunk copies the compressed stream
into the final file with its metadata and a sum of it all (`ipc/result.py`), under a temporary name that is synced and
then renamed. All of that happens in one open directory (`ipc/files.py`), so that whoever swaps a part of its path leads
nothing astray.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable, Mapping
from typing import IO, Any, Final

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from numpy.typing import NDArray

from ipc.errors import OutputError
from ipc.files import Directory
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.stage import Run, Start
from ipc.result import clean, json_name, seal, write_json
from stages.stage import QUEUE_TIMEOUT, AnyNetwork, Left, Links, StageState

CODEC: Final = "libx264"
QUALITY = {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}
"""Visually lossless; part of the result's identity. With its macroblock tree (and B-frames) x264 gave another stream in
one run of ten for the same frames on one thread (PyAV 18.1, x86-64); without it in none of 640, at the same size."""
THREADS = 4
"""Of x264. Fixed, because the bytes it makes depend on it."""
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class WriterStage:
    """Takes `frames` chunk by chunk and frees each at once.

    Resource handling: one spool file and encoder per task between its chunk 0 and its last chunk or `drop`.
    Error handling: what the file system refuses is an `OutputError`; nothing is left behind then.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self._jobs: dict[str, Job] = {}
        self._videos: dict[str, Video] = {}
        self._refused: dict[str, str] = {}
        """Tasks whose file the file system refused, and how, until they are dropped or begun again."""

    @classmethod
    def load(cls, start: Start, links: Links) -> WriterStage:
        return cls(links)

    @property
    def weights(self) -> Mapping[str, str]:
        return {}

    @property
    def networks(self) -> Mapping[str, AnyNetwork]:
        return {}

    @property
    def versions(self) -> Mapping[str, str]:
        return {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}

    def begin(self, job: Job) -> None:
        self._jobs[job.id] = job

    def step(self, run: Run) -> dict[str, Any] | None:
        """Write chunk `run.index`. Chunk 0 always starts a fresh file; the last one completes it. A chunk that was
        granted ahead of one that was refused is refused too."""
        job = self._jobs[run.id]
        if run.index == 0:
            self._forget(run.id)
        elif run.id in self._refused:
            raise OutputError(self._refused[run.id])
        try:
            if run.index == 0:
                self._videos[run.id] = Video(job)
            return self._write(self._videos[run.id], job, run)
        except (OSError, av.FFmpegError) as error:
            self._forget(run.id)
            self._refused[run.id] = message = refused(first_error(error), job.output)
            raise OutputError(message) from error

    def _write(self, video: Video, job: Job, run: Run) -> dict[str, Any] | None:
        assert video.chunks == run.index, f"got chunk {run.index} after {video.chunks} chunks"
        slot = self._links.inputs["frames"].take(run.id, run.index, QUEUE_TIMEOUT)
        assert isinstance(slot.view, memoryview), "frames travel in host memory"
        video.add(np.frombuffer(slot.view, np.uint8).reshape(slot.shape))
        slot.release()
        if video.frames < job.num_frames:
            return None
        metadata = {**job.metadata, "seconds": {phase: round(s, 3) for phase, s in (run.seconds or {}).items()}}
        video.complete(metadata, lambda: self._links.placing(run.id))
        self._forget(run.id)
        return metadata

    def drop(self, identity: str) -> None:
        self._links.inputs["frames"].release(identity)
        self._forget(identity)
        job = self._jobs.pop(identity, None)
        # A file system that refuses to remove what a dead process left there must not end this one.
        if job is not None:
            with contextlib.suppress(OSError), Directory(os.path.dirname(job.output)) as directory:
                clean(directory, job)

    def rehearse(self) -> None:
        av.codec.CodecContext.create(CODEC, "w")

    def copied(self) -> None:
        return None

    def set_memory(self, plan: MemoryPlan, left: Left) -> None:
        pass

    def state(self) -> StageState:
        return StageState(frozenset(self._jobs), sum(video.spooled for video in self._videos.values()))

    def _forget(self, identity: str) -> None:
        self._refused.pop(identity, None)
        if (video := self._videos.pop(identity, None)) is not None:
            video.close()


class Video:
    """A video being compressed.

    Resource handling: owns the directory's descriptor, the spool file and the encoder until `close`.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.frames = 0
        self.chunks = 0
        with contextlib.ExitStack() as undo:
            self._directory = undo.enter_context(Directory(os.path.dirname(job.output)))
            clean(self._directory, job)
            self._spool = undo.enter_context(self._directory.unnamed())
            self._container = av.open(self._spool, "w", format="mp4")
            self._stream = self._container.add_stream(CODEC, rate=job.fps, options=QUALITY)
            self._stream.width, self._stream.height, self._stream.pix_fmt = job.width, job.height, "yuv420p"
            tag_colours(self._stream.codec_context)
            self._stream.codec_context.thread_count = THREADS
            self._stream.codec_context.thread_type = "SLICE"
            undo.pop_all()

    @property
    def spooled(self) -> int:
        """Bytes of compressed video so far."""
        return os.fstat(self._spool.fileno()).st_size

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Compress the next frames [frames, height, width, 3]."""
        for frame in frames:
            self._container.mux(self._stream.encode(to_yuv(frame)))
        self.frames += len(frames)
        self.chunks += 1

    def complete(self, metadata: dict[str, Any], placing: Callable[[], None]) -> None:
        """Put the JSON, if asked for, and then the video in place: each whole and on the disk, or not at all. `placing`
        is called when all that is left is to give them their names."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._spool.seek(0)
        job, text = self._job, json.dumps(metadata, ensure_ascii=False, indent=1)
        name, partial = os.path.basename(job.output), os.path.basename(job.partial)
        files = {}
        try:
            if job.metadata_json:
                write_json(self._directory.create(f"{partial}.json"), text)
                files[f"{partial}.json"] = json_name(job)
            copy_stream(self._spool, self._directory.create(partial), text)
            placing()
            self._directory.place({**files, partial: name})
        except BaseException:
            with contextlib.suppress(OSError):
                clean(self._directory, job)
            raise

    def close(self) -> None:
        """Discard what is not complete."""
        with contextlib.suppress(OSError, av.FFmpegError):  # the trailer, when the disk is full
            self._container.close()
        with contextlib.suppress(OSError):  # what was buffered, then too; the file is closed all the same
            self._spool.close()
        self._directory.close()


def tag_colours(context: av.VideoCodecContext) -> None:
    """Say in the stream that it is BT.709 with limited range, so that no player has to guess from the size."""
    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.color_range = ColorRange.MPEG


def to_yuv(frame: NDArray[np.uint8]) -> av.VideoFrame:
    """[height, width, 3] RGB, full range -> yuv420p, BT.709, limited range."""
    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=SCALING,
    )


def copy_stream(source: IO[bytes], target: int, comment: str) -> None:
    """Copy the compressed video in `source` to an mp4 whose index is in front and whose comment is `comment`, sealed.

    `target`: descriptor of an empty file; synced and closed. To move the index to the front libavformat reads the file
    again: through descriptors of ours, because it loses its own when the disk is full.
    """
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(WholeWrites(target, "r+b"))

        def reopen(url: str, flags: int, options: dict[str, str]) -> io.FileIO:
            reader = os.open(f"/proc/self/fd/{target}", os.O_RDONLY | os.O_CLOEXEC)
            return opened.enter_context(io.FileIO(reader))

        options = {"movflags": "faststart"}
        with av.open(source, "r") as spool, av.open(file, "w", format="mp4", options=options, io_open=reopen) as final:
            final.metadata["comment"] = comment
            stream = final.add_stream_from_template(spool.streams.video[0])
            for packet in spool.demux(spool.streams.video[0]):
                if packet.dts is not None:  # the demuxer ends with an empty packet
                    packet.stream = stream
                    final.mux(packet)
        seal(file)
        os.fsync(target)


class WholeWrites(io.FileIO):
    """A file without a buffer. What the kernel takes in parts is written in parts, until an error says why not."""

    def write(self, data: Any) -> int:
        view, written = memoryview(data), 0
        while written < view.nbytes:
            written += super().write(view[written:]) or 0
        return written


def first_error(error: OSError | av.FFmpegError) -> OSError | av.FFmpegError:
    """The error that this one came after: closing a file that cannot be written fails again, and says less."""
    while isinstance(error.__context__, OSError | av.FFmpegError):
        error = error.__context__
    return error


def refused(error: OSError | av.FFmpegError, output: str) -> str:
    """What the user reads when the file system refuses."""
    advice = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some of your quota",
        errno.EROFS: "choose another directory",
        errno.EACCES: "choose another directory",
        errno.ENOENT: "make its directory again",
        errno.ENOTDIR: "its directory was replaced since the request was accepted: submit it again",
    }.get(error.errno or 0, "try again")
    return f"{os.path.basename(output)} could not be written: {error.strerror}; {advice}"
