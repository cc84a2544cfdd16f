"""Read an init image or video into frames of the size and number a request asks for. No torch here."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from ipc.errors import BadRequest

Frames = NDArray[np.uint8]
"""[frames, height, width, 3], RGB."""

FORMATS = "mov,matroska,webm,avi,mpegts,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
"""Containers that carry their own data: no playlists, which would open other files or the network."""
MAX_PIXELS = 64_000_000
"""Of a source frame; a small file can claim any size."""
SCALING = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def read_frames(path: str, count: int, height: int, width: int) -> Frames:
    """The first `count` frames, scaled to cover [height, width] and cropped to its centre; a still image is repeated.

    `BadRequest` names the file, not its directory, and says what is wrong: unreadable, not a picture, too short.
    """
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file, av.open(file, "r", options={"format_whitelist": FORMATS}) as container:
            frames = [fit(frame, height, width) for frame in itertools.islice(_decode(container, name), count)]
    except av.FFmpegError as error:
        raise BadRequest(f"the init file {name!r} is not an image or a video that can be read") from error
    except OSError as error:
        raise BadRequest(f"the init file {name!r} cannot be read: {error.strerror}") from error
    if len(frames) == 1:
        frames *= count
    if len(frames) < count:
        raise BadRequest(f"the init video {name!r} has {len(frames)} frames, the request {count}; lower num_frames")
    return np.stack(frames)


def fit(frame: av.VideoFrame, height: int, width: int) -> Frames:
    """One decoded frame -> [height, width, 3]: turned upright, scaled to cover that size, cropped to its centre."""
    turns = round(frame.rotation / 90) % 4
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    scaled_height = max(height, round(frame.height * scale))
    scaled_width = max(width, round(frame.width * scale))
    scaled = frame.reformat(scaled_width, scaled_height, "rgb24", interpolation=SCALING).to_ndarray()
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.ascontiguousarray(np.rot90(scaled[top : top + height, left : left + width], turns))


def _decode(container: av.container.InputContainer, name: str) -> Iterator[av.VideoFrame]:
    if not container.streams.video:
        raise BadRequest(f"the init file {name!r} has no picture in it")
    stream = container.streams.video[0]
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > MAX_PIXELS:
        raise BadRequest(f"the init file {name!r} has {pixels:,} pixels a frame; the most is {MAX_PIXELS:,}")
    stream.thread_type = "NONE"
    decoded = container.decode(stream)
    first = next(decoded, None)
    if first is None:
        raise BadRequest(f"the init file {name!r} has no picture in it")
    yield first
    yield from decoded
