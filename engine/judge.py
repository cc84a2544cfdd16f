"""Whether a canary's video is one that an operator wants."""

from __future__ import annotations

import os
import subprocess

import msgspec

from engine.child import run_module
from ipc.errors import BadRequest, CanaryFailed

TIMEOUT = 120.0
"""Seconds to decode two videos."""
LEAST_DEVIATION = 1.0
"""Of 255: below it there is nothing to be seen."""


class Verdict(msgspec.Struct, frozen=True):
    """What `stages/judge.py` found."""

    deviation: float
    """Standard deviation over all pixels of all frames, of 255: of red, green or blue, whichever has the largest."""
    psnr: float | None
    """In dB, over all frames, to the reference; None: there is none. 100 for videos that are equal."""
    problem: str = ""
    """Why the videos could not be compared."""


def judge(video: str, reference: str | None, psnr: float) -> None:
    """`CanaryFailed` for a video that shows nothing, or is further from the reference than `psnr` dB; `BadRequest` for
    a reference that cannot be read. Blocking."""
    given = [video] if reference is None else [video, os.path.abspath(reference)]
    try:
        ran = run_module("stages.judge", *given, timeout=TIMEOUT)
        verdict = msgspec.json.decode(ran.stdout, type=Verdict)
    except (subprocess.TimeoutExpired, msgspec.DecodeError, OSError) as error:
        raise CanaryFailed("the canary's video could not be judged; the old weights go on") from error
    if verdict.problem:
        raise BadRequest(f"the canary cannot be compared with its reference: {verdict.problem}")
    if verdict.deviation < LEAST_DEVIATION:
        raise CanaryFailed(
            f"the canary shows nothing: its values deviate by {verdict.deviation:.2f} of 255; the old weights go on"
        )
    if verdict.psnr is not None and verdict.psnr < psnr:
        raise CanaryFailed(
            f"the canary is at {verdict.psnr:.1f} dB of its reference, at least {psnr:g} dB were asked for; the old "
            "weights go on"
        )
