"""From what the user asked to a `Job` with nothing left to decide, or a `BadRequest` that says what to change.

Everything that can be known before computing is checked here: ranges, sizes, the model's limits, the output directory.
Nothing is rounded: what does not fit is refused with the nearest value that does.
"""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec

from engine.decode import decode_strictly
from engine.params import ModelParams, SystemParams, UserParams
from ipc.errors import BadRequest, EngineError
from ipc.messages import Job

MAX_PROMPT_BYTES = 16 * 1024
MAX_PATH_BYTES = 4096
DEFAULT_STRENGTH = 0.8


def admit(user: UserParams, model: ModelParams, system: SystemParams, *, identity: str | None = None) -> Job:
    """Check a request and fill in every default. Raises `BadRequest`; touches nothing.

    The length of the prompt in tokens is checked by `check_prompt_tokens`, which needs the tokenizer.
    """
    user = decode_strictly(UserParams, msgspec.to_builtins(user), BadRequest, "the request")
    defaults = model.defaults
    _check_prompt("prompt", user.prompt, may_be_empty=False)
    _check_prompt("negative_prompt", user.negative_prompt or "", may_be_empty=True)
    height, width = _size(user, model)
    num_frames = _frames(user, model)
    steps = user.steps if user.steps is not None else defaults.steps
    if not 1 <= steps <= model.limits.max_steps:
        raise BadRequest(f"steps is {steps}; it must be from 1 to {model.limits.max_steps}")
    guidance, guidance_2 = _guidance(user, model)
    init, strength = _init(user, system)
    output = _output(user, system)
    return Job(
        id=identity or uuid.uuid4().hex,
        prompt=user.prompt,
        negative_prompt=defaults.negative_prompt if user.negative_prompt is None else user.negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=user.fps or defaults.fps,
        steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=guidance_2,
        seed=user.seed if user.seed is not None else secrets.randbelow(2**31),
        solver=user.solver or defaults.solver,
        flow_shift=user.flow_shift if user.flow_shift is not None else defaults.flow_shift,
        init=init,
        start_step=0 if strength is None else steps - max(1, int(steps * strength)),
        output=output,
        metadata_json=user.metadata_json,
        metadata={},
    )


def resolved_params(user: UserParams, job: Job) -> dict[str, Any]:
    """The request with every default filled in, as it goes into `Accepted` and the metadata."""
    params: dict[str, Any] = msgspec.to_builtins(user)
    for name in params:
        if name in Job.__struct_fields__:
            params[name] = getattr(job, name)
    if job.init is not None and params["strength"] is None:
        params["strength"] = DEFAULT_STRENGTH
    return params


def _check_prompt(name: str, text: str, *, may_be_empty: bool) -> None:
    if not may_be_empty and not text.strip():
        raise BadRequest(f"the {name} is empty; say what the video should show")
    size = len(_utf8(name, text))
    if size > MAX_PROMPT_BYTES:
        raise BadRequest(f"the {name} has {size:,} bytes; the most is {MAX_PROMPT_BYTES:,}")


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"the {name} contains characters that are not valid Unicode; remove them") from error


def _size(user: UserParams, model: ModelParams) -> tuple[int, int]:
    multiple = model.size_multiple
    height = user.height if user.height is not None else model.defaults.height
    width = user.width if user.width is not None else model.defaults.width
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise BadRequest(f"{name} is {value}; it must be a multiple of {multiple}, the nearest is {nearest}")
    if height * width > model.limits.max_pixels:
        raise BadRequest(
            f"{width}x{height} is {height * width:,} pixels; {model.name} takes up to {model.limits.max_pixels:,}"
            f" (its usual size is {model.defaults.width}x{model.defaults.height})"
        )
    return height, width


def _frames(user: UserParams, model: ModelParams) -> int:
    stride = model.vae.temporal_stride
    frames = user.num_frames if user.num_frames is not None else model.defaults.num_frames
    most = model.limits.max_frames
    if frames > most:
        raise BadRequest(f"num_frames is {frames}; {model.name} goes up to {most}")
    if frames < 1 or (frames - 1) % stride:
        below = max(1, (frames - 1) // stride * stride + 1)
        above = min(below + stride, most)
        near = f"{below} or {above}" if frames > 1 else "1"
        raise BadRequest(f"num_frames is {frames}; it must be {stride}n + 1, the nearest is {near}")
    return frames


def _guidance(user: UserParams, model: ModelParams) -> tuple[float, float]:
    if user.guidance_scale_2 is not None and model.boundary is None:
        raise BadRequest(f"guidance_scale_2 is for models with two experts; {model.name} has one: leave it out")
    first = user.guidance_scale if user.guidance_scale is not None else model.defaults.guidance_scale
    second = user.guidance_scale_2
    if second is None and user.guidance_scale is None:
        second = model.defaults.guidance_scale_2
    return first, first if second is None else second


def _init(user: UserParams, system: SystemParams) -> tuple[str | None, float | None]:
    """The resolved path of the init image or video, and the strength; (None, None) without one."""
    if user.image is not None and user.video is not None:
        raise BadRequest("both image and video are given; start from one of them")
    name, path = ("image", user.image) if user.image is not None else ("video", user.video)
    if path is None:
        if user.strength is not None:
            raise BadRequest("strength needs an image or a video to start from; give one, or leave strength out")
        return None, None
    resolved = _below_root(name, path, system)
    try:
        status = os.stat(resolved)
    except OSError as error:
        raise BadRequest(f"the {name} {path!r} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or not os.access(resolved, os.R_OK):
        raise BadRequest(f"the {name} {path!r} is not a readable file")
    if status.st_size == 0:
        raise BadRequest(f"the {name} {path!r} is empty")
    return resolved, user.strength if user.strength is not None else DEFAULT_STRENGTH


def _output(user: UserParams, system: SystemParams) -> str:
    """The resolved output path, in a directory that exists and can be written."""
    path = user.output
    directory, name = os.path.split(_absolute("output", path))
    stem, extension = os.path.splitext(name)
    if extension.lower() != ".mp4":
        raise BadRequest(f"the output {path!r} must end in .mp4, after a name")
    resolved = os.path.join(_below_root("output", directory, system), name)
    parent = os.path.dirname(path) or "."
    if len(os.fsencode(name)) > 200:
        raise BadRequest("the name of the output is longer than 200 bytes; choose a shorter one")
    if not os.path.isdir(os.path.dirname(resolved)):
        raise BadRequest(f"the output directory {parent!r} does not exist; make it first")
    if not os.access(os.path.dirname(resolved), os.W_OK | os.X_OK):
        raise BadRequest(f"the output directory {parent!r} cannot be written; choose another or change its mode")
    beside = [os.path.join(os.path.dirname(resolved), stem + ".json")] if user.metadata_json else []
    for file in [resolved, *beside]:
        if os.path.lexists(file) and not os.path.isfile(file):
            raise BadRequest(f"{os.path.basename(file)!r} exists in {parent!r} and is not a file; choose another name")
    return resolved


def _absolute(name: str, path: str) -> str:
    if "\0" in path:
        raise BadRequest(f"the {name} path contains a NUL character")
    if len(_utf8(f"{name} path", path)) > MAX_PATH_BYTES:
        raise BadRequest(f"the {name} path is longer than {MAX_PATH_BYTES:,} bytes; use a shorter one")
    return os.path.join(os.getcwd(), os.path.expanduser(path))


def _below_root(name: str, path: str, system: SystemParams) -> str:
    """`path` with symbolic links resolved; `BadRequest` if that leaves the operator's root."""
    resolved = os.path.realpath(_absolute(name, path))
    root = os.path.realpath(system.output_root)
    if os.path.commonpath((root, resolved)) != root:
        raise BadRequest(f"the {name} path {path!r} is outside the directory this server works in")
    return resolved


def check_prompt_tokens(job: Job, model: ModelParams, tokenizer: Path) -> None:
    """Refuse a prompt of more tokens than the model reads, saying how many it has.

    A text has at most one token per UTF-8 byte, so only long texts are counted; that happens in a short-lived process,
    because the tokenizer of the large models takes hundreds of megabytes. Blocking: call it in a thread.
    """
    most = model.transformer.text_len
    for name, text in (("prompt", job.prompt), ("negative prompt", job.negative_prompt)):
        if 2 * len(text.encode()) < most:
            continue
        try:
            count = _count_tokens(text, tokenizer)
        except (subprocess.SubprocessError, ValueError) as error:
            raise EngineError(f"the tokens of the {name} could not be counted: {error}") from error
        if count > most:
            raise BadRequest(f"the {name} has {count} tokens; {model.name} reads at most {most}: shorten it")


def _count_tokens(text: str, tokenizer: Path) -> int:
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "stages.prompt", str(tokenizer)],
        input=text.encode(), capture_output=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    return int(ran.stdout)


def python_path() -> str:
    """PYTHONPATH for child processes: they must import this very installation, wherever it was found."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return root if not inherited else f"{root}{os.pathsep}{inherited}"
