"""Read an init image or video into frames of the size and number a request asks for. No torch here.

`python -m stages.media PATH` says what a file is, for a supervisor that does not open strangers' files itself: exit
status 0 and one line of JSON, {"width", "height", "frames"} (`probe`); or 2 and one line that says why the file cannot
be used, in the words of the `BadRequest` of the functions here. Both on standard output; any other status is a crash.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from ipc.errors import BadRequest
from ipc.files import open_regular

Picture = NDArray[np.uint8]
"""[height, width, 3], RGB."""

FORMATS = "mov,matroska,webm,avi,mpegts,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
"""Containers that carry their own data: no playlists, which would open other files or the network."""
MAX_PIXELS = 64_000_000
"""Of a source frame; a small file can claim any size: 1 MB of PNG took 1 GB just to be opened before the decoders,
too, were given this bound."""
MAX_COUNTED = 1000
"""Frames that `probe` counts; more than any request reads."""
SCALING = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
BAD_FILE = 2
"""Exit status of this module as a program for a file that cannot be used."""


T = TypeVar("T")


class Media(NamedTuple):
    """What a file holds: upright size in pixels; frames, counted up to `MAX_COUNTED`; of a still image, 1."""

    width: int
    height: int
    frames: int


def read_frames(path: str, count: int, height: int, width: int) -> Generator[Picture]:
    """The first `count` frames, scaled to cover [height, width] and cropped to its centre; of a still image the same
    array again and again. Each is decoded when it is asked for: the file is open until the last, or until `close`.

    `BadRequest` names the file, not its directory, and says what is wrong: unreadable, not a picture, too short, which
    shows at its end.
    """
    found = 0
    with _opened(path) as (container, stream):
        for frame in itertools.islice(container.decode(stream), count):
            picture = fit(frame, height, width)
            found += 1
            yield picture
    if found == 1:
        yield from itertools.repeat(picture, count - 1)
    elif found < count:
        _something(found or None, path)
        raise BadRequest(f"the init video {_name(path)!r} has {found} frames and the request {count}; lower num_frames")


def read_image(path: str) -> av.VideoFrame:
    """The image, or the first frame of a video, as it was decoded: for `fit` and `upright`. Errors as `read_frames`."""
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
    return _something(first, path)


def probe(path: str) -> Media:
    """What a file is, after really decoding its first frame. Errors as `read_frames`."""
    first, count = None, 0
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            count += packet.size > 0
            if first is not None and count >= MAX_COUNTED:
                break
    first = _something(first, path)
    size = (first.width, first.height) if _turns(first) % 2 == 0 else (first.height, first.width)
    return Media(*size, count)


def fit(frame: av.VideoFrame, height: int, width: int) -> Picture:
    """One decoded frame -> [height, width, 3]: turned upright, scaled to cover that size, cropped to its centre. In
    memory of its own, so that nothing of what was cropped stays with it."""
    turns = _turns(frame)
    if turns % 2:
        height, width = width, height
    frame = _trimmed(frame, height, width)
    scale = max(height / frame.height, width / frame.width)
    scaled_height = max(height, round(frame.height * scale))
    scaled_width = max(width, round(frame.width * scale))
    scaled = _rgb(frame, scaled_width, scaled_height)
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.rot90(scaled[top : top + height, left : left + width], turns).copy()


def upright(frame: av.VideoFrame) -> Picture:
    """One decoded frame at its own size, turned upright."""
    return np.ascontiguousarray(np.rot90(_rgb(frame), _turns(frame)))


def _trimmed(frame: av.VideoFrame, height: int, width: int) -> av.VideoFrame:
    """A frame of a much longer shape than asked for, cut at its ends: scaled first, a line of 20000 x 1 pixels would
    become 9,600,000 x 480. Of the long side twice what is needed is kept, so that the filter sees the same neighbours;
    shapes that are less than twice as long as the one asked for are left alone.
    """
    scale = max(height / frame.height, width / frame.width)
    rows, columns = (
        min(size, needed + (size - needed) % 2)  # as many from either end: the centre stays where it is
        for size, needed in ((frame.height, int(2 * height / scale) + 1), (frame.width, int(2 * width / scale) + 1))
    )
    if (rows, columns) == (frame.height, frame.width):
        return frame
    top, left = (frame.height - rows) // 2, (frame.width - columns) // 2
    kept = np.ascontiguousarray(_rgb(frame)[top : top + rows, left : left + columns])
    return av.VideoFrame.from_ndarray(kept, format="rgb24")


def _rgb(frame: av.VideoFrame, width: int | None = None, height: int | None = None) -> Picture:
    """[height, width, 3]; None: the frame's own size."""
    return np.asarray(frame.reformat(width, height, "rgb24", interpolation=SCALING).to_ndarray(), np.uint8)


def _turns(frame: av.VideoFrame) -> int:
    """Quarter turns, against the clock, that set the picture upright."""
    return round(frame.rotation / 90) % 4


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and the picture in it. What goes wrong in here, or in the block with the file, becomes `BadRequest`."""
    options = {"format_whitelist": FORMATS, "max_pixels": str(MAX_PIXELS)}
    try:
        with open(path, "rb", opener=open_regular) as file, av.open(file, "r", options=options) as container:
            stream = _something(next(iter(container.streams.video), None), path)
            pixels = stream.codec_context.width * stream.codec_context.height
            if not 0 < pixels <= MAX_PIXELS:
                wrong = f"has {pixels:,} pixels a frame" if pixels else "is damaged or too large"
                raise BadRequest(f"the init file {_name(path)!r} {wrong}; the most is {MAX_PIXELS:,} pixels a frame")
            stream.thread_type = "NONE"
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except av.FFmpegError as error:
        raise BadRequest(f"the init file {_name(path)!r} is not an image or a video that can be read") from error
    except OSError as error:
        raise BadRequest(f"the init file {_name(path)!r} cannot be read: {error.strerror}") from error


def _something(found: T | None, path: str) -> T:
    if found is None:
        raise BadRequest(f"the init file {_name(path)!r} has no picture in it")
    return found


def _name(path: str) -> str:
    return os.path.basename(path)


def main() -> int:
    """See the module's docstring."""
    try:
        print(json.dumps(probe(sys.argv[1])._asdict()))
    except BadRequest as error:
        print(error)
        return BAD_FILE
    return 0


if __name__ == "__main__":
    sys.exit(main())
