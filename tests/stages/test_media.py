"""Init images and videos."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ipc.errors import BadRequest
from stages.media import read_frames

RED, BLUE = (250, 10, 10), (10, 10, 250)


def picture(path: Path, width: int = 64, height: int = 32, **options: object) -> Path:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def video(path: Path, frames: int, width: int = 64, height: int = 32) -> Path:
    """Grey frames, each brighter than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            grey = np.full((height, width, 3), 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def close(pixel: NDArray[np.uint8], colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= 12)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_an_image_is_repeated(tmp_path: Path, suffix: str) -> None:
    """A still image of any usual format, twice the size of the request: every frame shows it."""
    frames = read_frames(str(picture(tmp_path / f"i.{suffix}")), 5, 16, 32)
    assert frames.shape == (5, 16, 32, 3) and frames.dtype == np.uint8 and frames.flags.c_contiguous
    assert close(frames[4, 8, 4], RED) and close(frames[4, 8, 28], BLUE)


def test_another_shape_is_covered_and_cropped_to_the_centre(tmp_path: Path) -> None:
    """A wide image for a square request: full height, the middle of the width, nothing stretched."""
    frames = read_frames(str(picture(tmp_path / "i.png", 96, 32)), 1, 48, 48)
    assert close(frames[0, 24, 20], RED) and close(frames[0, 24, 28], BLUE)


def test_a_picture_that_was_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    """EXIF orientation 6 (turn clockwise to view): the left half is shown on top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = read_frames(str(picture(tmp_path / "i.jpg", exif=exif, quality=95)), 1, 64, 32)
    assert close(frames[0, 10, 16], RED) and close(frames[0, 54, 16], BLUE)


def test_a_video_gives_its_first_frames(tmp_path: Path) -> None:
    """Nine frames of a video of twelve, in order."""
    frames = read_frames(str(video(tmp_path / "v.mp4", 12)), 9, 32, 64)
    means = frames.mean((1, 2, 3))
    assert np.abs(means - 10 * np.arange(9)).max() < 4


def test_a_video_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """Five frames for a request of nine: the message has both numbers and the file's name, not its directory."""
    with pytest.raises(BadRequest, match=r"'v\.mp4' has 5 frames, the request 9") as refused:
        read_frames(str(video(tmp_path / "v.mp4", 5)), 9, 32, 64)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world" * 100, b"#EXTM3U\n#EXTINF:1,\nother.mp4\n", b"ffconcat version 1.0\nfile other.mp4\n", b"cut"],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    """Empty, text, playlists that point at a real video, a video cut short: each a `BadRequest` that names the file."""
    whole = video(tmp_path / "other.mp4", 9)
    if content == b"cut":
        content = whole.read_bytes()[:900]
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(BadRequest, match=r"'bad\.mp4'"):
        read_frames(str(tmp_path / "bad.mp4"), 9, 32, 64)


def test_a_missing_file_and_a_huge_picture_are_refused(tmp_path: Path) -> None:
    """A file that is gone, and a small file that claims 81 million pixels."""
    with pytest.raises(BadRequest, match=r"'gone\.png' cannot be read: No such file"):
        read_frames(str(tmp_path / "gone.png"), 1, 32, 64)
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(BadRequest, match=r"81,000,000 pixels"):
        read_frames(str(tmp_path / "huge.png"), 1, 32, 64)
