"""What tests of several folders share: reading back a video, waiting for a condition with a deadline."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


class Video:
    """What is in a file: frames [frames, height, width, 3] uint8, and what a player would be told."""

    def __init__(self, path: Path | str) -> None:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.codec = stream.codec_context.name
            self.pixel_format = stream.codec_context.pix_fmt
            self.fps = float(stream.average_rate or 0)
            self.metadata = dict(container.metadata)
            self.frames: npt.NDArray[np.uint8] = np.stack(
                [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
            )

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.frames.tobytes()).hexdigest()


@pytest.fixture
def read_video() -> Callable[[Path | str], Video]:
    return Video


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Of another seed each time; a failure says how to draw the same again."""
    seed = int(os.environ.get("SEED") or secrets.randbits(32))
    print(f"again: SEED={seed} python -m pytest '{request.node.nodeid}'")
    return random.Random(seed)


async def until(condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    """Wait for a condition, looking every 2 ms; TimeoutError says what did not come."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout} s")
        await asyncio.sleep(0.002)


@pytest.fixture
def wait_until() -> Callable[..., object]:
    return until
