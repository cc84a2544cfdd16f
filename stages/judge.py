"""Looks at a video, or at two: `python -m stages.judge VIDEO [REFERENCE]`, an `engine.judge.Verdict` on stdout as JSON.

A process of its own, because a stranger's file may end the decoder.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

EQUAL = 100.0
"""dB that stand for no difference at all."""


def frames(path: str) -> Iterator[NDArray[np.uint8]]:
    """[height, width, 3] each."""
    with av.open(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def look(path: str, reference: str | None) -> dict[str, Any]:
    """Sums over the frames, one or two of which are in memory."""
    pixels, error = 0, 0.0
    total, squares = np.zeros(3), np.zeros(3)
    others = None if reference is None else frames(reference)
    for frame in frames(path):
        values = frame.astype(np.float64)
        pixels += frame.shape[0] * frame.shape[1]
        total, squares = total + values.sum((0, 1)), squares + (values**2).sum((0, 1))
        if others is not None:
            other = next(others, None)
            if other is None or other.shape != frame.shape:
                return verdict(0.0, None, "it has another size or fewer frames")
            error += ((values - other) ** 2).sum()
    if others is not None and next(others, None) is not None:
        return verdict(0.0, None, "it has more frames")
    if not pixels:
        return verdict(0.0, None)
    # Of each colour for itself: one colour everywhere is nothing, though its red differs from its blue.
    deviation = math.sqrt(max(0.0, (squares / pixels - (total / pixels) ** 2).max()))
    if others is None:
        return verdict(deviation, None)
    return verdict(deviation, EQUAL if not error else min(EQUAL, 10 * math.log10(255**2 * 3 * pixels / error)))


def verdict(deviation: float, psnr: float | None, problem: str = "") -> dict[str, Any]:
    return {"deviation": deviation, "psnr": psnr, "problem": problem}


def main() -> None:
    reference = sys.argv[2] if len(sys.argv) > 2 else None
    try:
        found = look(sys.argv[1], reference)
    except (OSError, av.FFmpegError) as error:
        found = verdict(0.0, None, f"it cannot be read: {getattr(error, 'strerror', None) or error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
