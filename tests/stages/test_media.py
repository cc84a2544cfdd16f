"""Init images and videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ipc.errors import BadRequest
from stages.media import MAX_COUNTED, SCALING, Media, fit, probe, read_frames, read_image, upright

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
            grey = np.full((height, width, 3), 10 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def frames_of(path: str, count: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.stack([*read_frames(path, count, height, width)])


def close(pixel: NDArray[np.uint8], colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= 12)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_an_image_is_repeated(tmp_path: Path, suffix: str) -> None:
    """A still image of any usual format, twice the size of the request: every frame shows it."""
    frames = frames_of(str(picture(tmp_path / f"i.{suffix}")), 5, 16, 32)
    assert frames.shape == (5, 16, 32, 3) and frames.dtype == np.uint8
    assert close(frames[4, 8, 4], RED) and close(frames[4, 8, 28], BLUE)


def test_another_shape_is_covered_and_cropped_to_the_centre(tmp_path: Path) -> None:
    """A wide image for a square request: full height, the middle of the width, nothing stretched."""
    frames = frames_of(str(picture(tmp_path / "i.png", 96, 32)), 1, 48, 48)
    assert close(frames[0, 24, 20], RED) and close(frames[0, 24, 28], BLUE)


def test_a_picture_that_was_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    """EXIF orientation 6 (turn clockwise to view): the left half is shown on top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = frames_of(str(picture(tmp_path / "i.jpg", exif=exif, quality=95)), 1, 64, 32)
    assert close(frames[0, 10, 16], RED) and close(frames[0, 54, 16], BLUE)


def test_a_video_gives_its_first_frames(tmp_path: Path) -> None:
    """Nine frames of a video of twelve, in order."""
    frames = frames_of(str(video(tmp_path / "v.mp4", 12)), 9, 32, 64)
    means = frames.mean((1, 2, 3))
    assert np.abs(means - 10 * np.arange(9)).max() < 4


@pytest.mark.parametrize("asked", [9, 12])
def test_a_video_is_open_until_its_last_frame(tmp_path: Path, asked: int) -> None:
    """Frames are decoded as they are asked for; behind the last one, or when no more are wanted, the file is closed."""
    path = video(tmp_path / "v.mp4", 12)
    frames = read_frames(str(path), asked, 32, 64)
    assert not is_open(path)
    for _ in range(asked):
        next(frames)
        assert is_open(path)
    assert next(frames, None) is None and not is_open(path)
    frames = read_frames(str(path), asked, 32, 64)
    next(frames)
    frames.close()
    assert not is_open(path)


def test_a_still_image_is_read_once(tmp_path: Path) -> None:
    """However often it is repeated, there is one picture, and its file is closed behind it."""
    path = picture(tmp_path / "i.png")
    first, second, third = read_frames(str(path), 3, 32, 64)
    assert first is second is third and not is_open(path)


def is_open(path: Path) -> bool:
    """In this process."""
    return any(os.path.realpath(fd) == str(path) for fd in Path("/proc/self/fd").iterdir())


def test_a_video_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """Five frames for a request of nine: the message has both numbers and the file's name, not its directory."""
    with pytest.raises(BadRequest, match=r"'v\.mp4' has 5 frames and the request 9") as refused:
        frames_of(str(video(tmp_path / "v.mp4", 5)), 9, 32, 64)
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
        frames_of(str(tmp_path / "bad.mp4"), 9, 32, 64)


@pytest.mark.parametrize("read", [probe, read_image, lambda path: next(read_frames(path, 1, 32, 64))])
def test_a_missing_file_and_a_huge_picture_are_refused(tmp_path: Path, read: Callable[[str], object]) -> None:
    """A file that is gone, and small files that claim 81 million pixels: an image and a video."""
    with pytest.raises(BadRequest, match=r"'gone\.png' cannot be read: No such file"):
        read(str(tmp_path / "gone.png"))
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(BadRequest, match=r"'huge\.png' is damaged or too large; the most is 64,000,000 pixels"):
        read(str(tmp_path / "huge.png"))


def test_a_long_line_takes_little_memory(tmp_path: Path) -> None:
    """A picture of 20000 x 1 pixels for a request of 832x480: its middle, for less than 60 MB beside the libraries."""
    image = Image.new("RGB", (20000, 1), BLUE)
    image.paste(RED, (0, 0, 10000, 1))
    image.save(tmp_path / "line.png")
    program = (
        "import resource, sys; from stages.media import read_frames\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "frame = next(read_frames(sys.argv[1], 1, 480, 832))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *frame[240, 20], *frame[240, 811])"
    )
    kilobytes, *ends = map(int, run("-c", program, tmp_path / "line.png").stdout.split())
    assert kilobytes < 60_000
    assert close(np.array(ends[:3]), RED) and close(np.array(ends[3:]), BLUE)


@pytest.mark.parametrize("size", [(300, 48), (48, 301), (640, 20)])
def test_cut_before_scaling_is_the_same_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    """Waves in a picture six and more times as long as the request: within half a pixel of scaling it whole and
    cropping then."""
    width, height = size
    wave = 128 + 100 * np.sin(np.arange(width) / 10) * np.cos(np.arange(height) / 10)[:, None]
    Image.fromarray(wave.astype(np.uint8)).convert("RGB").save(tmp_path / "i.png")
    frame = read_image(str(tmp_path / "i.png"))
    scale = 32 / min(size)
    whole = frame.reformat(round(width * scale), round(height * scale), "rgb24", interpolation=SCALING).to_ndarray()
    top, left = (whole.shape[0] - 32) // 2, (whole.shape[1] - 32) // 2
    difference = fit(frame, 32, 32).astype(int) - whole[top : top + 32, left : left + 32]
    assert np.abs(difference).max() <= 10 / scale / 2 + 2


def test_the_whole_picture_upright(tmp_path: Path) -> None:
    """A picture taken sideways, at its own size: 64x32 on disk, 32x64 to see, its left half on top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = upright(read_image(str(picture(tmp_path / "i.jpg", exif=exif, quality=95))))
    assert whole.shape == (64, 32, 3) and whole.flags.c_contiguous
    assert close(whole[10, 16], RED) and close(whole[54, 16], BLUE)
    assert probe(str(tmp_path / "i.jpg")) == Media(32, 64, 1)


def test_what_a_file_is(tmp_path: Path) -> None:
    """An image has one frame, a video those that are in it; of a long one no more are counted than anyone asks for."""
    assert probe(str(picture(tmp_path / "i.gif"))) == Media(64, 32, 1)
    assert probe(str(video(tmp_path / "v.mp4", 12))) == Media(64, 32, 12)
    assert probe(str(video(tmp_path / "long.mp4", MAX_COUNTED + 20, 32, 16))) == Media(32, 16, MAX_COUNTED)


def test_the_program(tmp_path: Path) -> None:
    """`python -m stages.media`: a line of JSON and 0; for text, the words of the `BadRequest` and 2, and nothing on
    standard error; and torch is not imported."""
    good = run("-m", "stages.media", video(tmp_path / "v.mp4", 9))
    assert (good.returncode, json.loads(good.stdout)) == (0, {"width": 64, "height": 32, "frames": 9})
    (tmp_path / "bad.png").write_text("not a picture")
    bad = run("-m", "stages.media", tmp_path / "bad.png")
    assert (bad.returncode, bad.stderr) == (2, "")
    with pytest.raises(BadRequest) as refused:
        probe(str(tmp_path / "bad.png"))
    assert bad.stdout == f"{refused.value}\n"
    assert run("-c", "import sys, stages.media; print('torch' in sys.modules)").stdout == "False\n"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60)
