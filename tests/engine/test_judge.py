"""What a canary's video is compared with, and how."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.judge import judge
from ipc.errors import BadRequest, CanaryFailed


def write(path: Path, frames: NDArray[np.uint8]) -> str:
    """Lossless: what is read is what was written, but for the rounding of colours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def grey(count: int = 5, side: int = 32, noise: int = 0) -> NDArray[np.uint8]:
    """Frames [count, side, side, 3] of random greys, each value `noise` further up or down."""
    dice = np.random.default_rng(1)
    values = dice.integers(32, 224, (count, side, side, 1), np.uint8).repeat(3, 3)
    signs = dice.choice([-1, 1], (count, side, side, 1)) * noise
    return (values + signs).astype(np.uint8)


@pytest.fixture
def made(tmp_path: Path) -> str:
    return write(tmp_path / "made.mp4", grey())


def test_within_so_many_decibels(tmp_path: Path, made: str) -> None:
    """Without a reference, or equal to it, it is what is wanted. Ten steps of 255 off is at 20 log(255 / 10) = 28.1 dB:
    28 are reached, 29 are not."""
    judge(made, None, 30.0)
    judge(made, made, 99.0)
    reference = write(tmp_path / "near.mp4", grey(noise=10))
    judge(made, reference, 28.0)
    with pytest.raises(CanaryFailed, match=r"at 28\.\d dB of its reference, at least 29 dB were asked for"):
        judge(made, reference, 29.0)


@pytest.mark.parametrize("colour", [(0, 0, 0), (128, 128, 128), (230, 20, 60)])
def test_one_colour_is_nothing(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    video = write(tmp_path / "v.mp4", np.full((5, 32, 32, 3), colour, np.uint8))
    with pytest.raises(CanaryFailed, match="shows nothing"):
        judge(video, video, 0.0)


def test_a_reference_that_is_none(tmp_path: Path, made: str) -> None:
    """Of another size or length, no video, or not there: the operator's mistake, and not the weights'."""
    (tmp_path / "text.mp4").write_text("no video")
    for reference, says in {
        write(tmp_path / "large.mp4", grey(side=48)): "another size or fewer frames",
        write(tmp_path / "short.mp4", grey(4)): "another size or fewer frames",
        write(tmp_path / "long.mp4", grey(6)): "more frames",
        str(tmp_path / "text.mp4"): "cannot be read",
        str(tmp_path / "nowhere.mp4"): "cannot be read: No such file",
    }.items():
        with pytest.raises(BadRequest, match=f"cannot be compared with its reference: it .*{says}"):
            judge(made, reference, 30.0)
