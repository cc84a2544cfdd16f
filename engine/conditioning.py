"""What an image or a video means to a request: where it starts, or what it is to show; and the size that follows."""

from __future__ import annotations

import math
import os
import stat
import subprocess
from typing import Literal, NamedTuple

import msgspec

from engine.child import run_module
from engine.params import ModelParams, SystemParams, UserParams
from engine.roots import below_root
from ipc.errors import BadRequest

DEFAULT_STRENGTH = 0.8
LOOK_TIMEOUT = 30.0
"""Seconds to decode what the size and the number of frames are."""
MAX_REASON = 300
"""Characters of what the decoder says."""


class Media(msgspec.Struct, frozen=True):
    """What a file holds, upright: pixels and frames (of a still image: 1)."""

    width: int
    height: int
    frames: int


class Init(NamedTuple):
    """The init file of a request. `role`: as `Job.init_as`; `strength` only with "start"."""

    path: str
    role: Literal["start", "channels", "first_frame"]
    strength: float | None
    media: Media

    @property
    def is_condition(self) -> bool:
        return self.role != "start"


def find_init(user: UserParams, model: ModelParams, system: SystemParams) -> Init | None:
    """The init file, decodable, in the role that it has for this model; None without one.

    Blocking: the file is looked at in a short-lived process, because it may come from anywhere.
    """
    if user.image is not None and user.video is not None:
        raise BadRequest("both image and video are given; start from one of them")
    name, path = ("image", user.image) if user.image is not None else ("video", user.video)
    role = _role(user, model)
    if path is None:
        if user.strength is not None:
            raise BadRequest("strength needs an image or a video to start from; give one, or leave strength out")
        return None
    strength = None
    if role == "start":
        strength = user.strength if user.strength is not None else DEFAULT_STRENGTH
    resolved = _readable(name, path, system)
    return Init(resolved, role, strength, look(name, resolved))


def check_length(init: Init, num_frames: int) -> None:
    """A start video must have the frames of the request; of an image, and for a condition, one is enough."""
    if init.role == "start" and 1 < init.media.frames < num_frames:
        raise BadRequest(
            f"the init video {os.path.basename(init.path)!r} has {init.media.frames} frames and the request "
            f"{num_frames}; lower num_frames"
        )


def look(name: str, path: str) -> Media:
    """The size and length of an image or video file; `BadRequest` with the reason if it cannot be decoded."""
    file = os.path.basename(path)
    try:
        ran = run_module("stages.media", path, timeout=LOOK_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BadRequest(f"the {name} {file!r} cannot be decoded within {LOOK_TIMEOUT:g} seconds") from None
    if ran.returncode == 2 and (said := ran.stdout.decode(errors="replace").strip()):
        raise BadRequest(said.splitlines()[0][:MAX_REASON])
    if ran.returncode != 0:
        raise BadRequest(f"the {name} {file!r} cannot be decoded: its decoder ended with status {ran.returncode}")
    return msgspec.json.decode(ran.stdout, type=Media)


def size_of_condition(media: Media, model: ModelParams) -> tuple[int, int]:
    """(height, width) with the aspect of the image and about the pixels of the model's default size."""
    area, multiple = model.defaults.height * model.defaults.width, model.size_multiple
    if model.conditioning == "first_frame":
        return best_output_size(media.width / media.height, area, multiple)
    # In integers: the original's floats make 832x464 of a picture of 832x480, because its root is 479.99999999999994.
    height, width = math.isqrt(area * media.height // media.width), math.isqrt(area * media.width // media.height)
    return _floored(height, model), _floored(width, model)


def best_output_size(ratio: float, area: int, multiple: int) -> tuple[int, int]:
    """(height, width), multiples of `multiple`, of at most `area` pixels: the width rounded down and the height made to
    fit, or the other way round, whichever is closer to `ratio` = width / height. As Wan2.2-TI2V-5B does."""
    found = []
    for first_is_width in (True, False):
        wanted = math.sqrt(area * ratio) if first_is_width else math.sqrt(area / ratio)
        first = max(multiple, int(wanted // multiple) * multiple)
        second = max(multiple, area // first // multiple * multiple)
        found.append((second, first) if first_is_width else (first, second))

    def apart(size: tuple[int, int]) -> float:
        got = size[1] / size[0]
        return max(ratio / got, got / ratio)

    by_width, by_height = found
    return by_width if apart(by_width) < apart(by_height) else by_height


def _floored(pixels: int, model: ModelParams) -> int:
    """Down to whole patches, as Wan's image-to-video does; one patch at least."""
    return max(1, pixels // model.size_multiple) * model.size_multiple


def _role(user: UserParams, model: ModelParams) -> Literal["start", "channels", "first_frame"]:
    if model.conditioning == "channels":
        if user.video is not None or user.strength is not None:
            what = "video" if user.video is not None else "strength"
            raise BadRequest(f"{model.name} makes an image move and takes no {what}; give it an image only")
        if user.image is None:
            raise BadRequest(f"{model.name} makes an image move: give it one with --image (in code: image=...)")
        return "channels"
    if model.conditioning == "first_frame" and user.image is not None and user.strength is None:
        return "first_frame"
    return "start"


def _readable(name: str, path: str, system: SystemParams) -> str:
    resolved = below_root(name, path, system)
    try:
        status = os.stat(resolved)
    except OSError as error:
        raise BadRequest(f"the {name} {path!r} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or not os.access(resolved, os.R_OK):
        raise BadRequest(f"the {name} {path!r} is not a readable file")
    if status.st_size == 0:
        raise BadRequest(f"the {name} {path!r} is empty")
    return resolved
