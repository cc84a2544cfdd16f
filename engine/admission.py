"""From what the user asked to a `Job` with nothing left to decide, or a `BadRequest` that says what to change.

Everything that can be known before computing is checked here: ranges, sizes, the model's limits, the output directory.
Nothing is rounded: what does not fit is refused with the nearest value that does.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import uuid
from pathlib import Path
from typing import Any

import msgspec

from engine.adapters import Adapters
from engine.child import run_module
from engine.conditioning import DEFAULT_STRENGTH, Init, check_length, find_init, size_of_condition
from engine.decode import decode_strictly
from engine.footprint import (
    ALL_LEVELS,
    DEFAULT_SETTING,
    Bounds,
    RequestSize,
    Setting,
    gigabytes,
    plan_for,
    refusal,
)
from engine.params import PRESETS, Defaults, ModelParams, SystemParams, UserParams
from engine.roots import absolute, below_root, utf8
from ipc.errors import BadRequest, EngineError
from ipc.messages.job import Job

MAX_PROMPT_BYTES = 16 * 1024


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What there can ever be for a request: bytes of the GPU, all of it or the operator's budget, and the memory plans
    that are allowed."""

    bytes: int
    setting: Setting = DEFAULT_SETTING
    bounds: Bounds = ALL_LEVELS


def admit(
    user: UserParams,
    model: ModelParams,
    system: SystemParams,
    *,
    on_gpu: bool = False,
    adapters: Adapters | None = None,
    room: Room | None = None,
) -> Job:
    """Check a request and fill in every default. Raises `BadRequest`; changes nothing. Blocking: it reads files.

    `adapters`: those it may name; None: there are none. `room`: of the device that computes it; None: of any size.

    The length of the prompt in tokens is checked by `check_prompt_tokens`, which needs the tokenizer.
    """
    user = decode_strictly(UserParams, msgspec.to_builtins(user), BadRequest, "the request")
    defaults = _defaults(user, model)
    _check_prompt("prompt", user.prompt, may_be_empty=False)
    _check_prompt("negative_prompt", user.negative_prompt or "", may_be_empty=True)
    if user.noise_device == "cuda" and not on_gpu:
        raise BadRequest("noise_device is cuda, but this engine computes on the CPU; leave it out, or use cpu")
    num_frames = frames_of(user, model)
    steps = user.steps if user.steps is not None else defaults.steps
    if not 1 <= steps <= model.limits.max_steps:
        raise BadRequest(f"steps is {steps}; it must be from 1 to {model.limits.max_steps}")
    guidance, guidance_2 = _guidance(user, model, defaults)
    loras = (adapters or Adapters()).resolve(user.lora)
    output = _output(user, system)
    init = find_init(user, model, system)
    height, width = size_of(user, model, init)
    if init is not None:
        check_length(init, num_frames)
    if room is not None:
        guided = max(guidance, guidance_2) > 1
        check_room(RequestSize(width, height, num_frames, guided, image=init is not None), model, room)
    return Job(
        id=uuid.uuid4().hex,
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
        init=None if init is None else init.path,
        start_step=_start_step(init, steps),
        init_as="start" if init is None else init.role,
        noise_device=user.noise_device,
        output=output,
        metadata_json=user.metadata_json,
        metadata={},
        loras=loras,
    )


def resolved_params(user: UserParams, job: Job, model: ModelParams) -> dict[str, Any]:
    """The request with every default filled in, as it goes into `Accepted` and the metadata.

    It is a request of its own: the same video. Of a model with one expert, `guidance_scale_2` stays None.
    """
    params: dict[str, Any] = msgspec.to_builtins(user)
    for name in params:
        if name in Job.__struct_fields__:
            params[name] = getattr(job, name)
    if job.init is not None and job.init_as == "start" and params["strength"] is None:
        params["strength"] = DEFAULT_STRENGTH
    if model.boundary is None:
        params["guidance_scale_2"] = None
    params["lora"] = [f"{lora.name}:{lora.strength:g}" for lora in job.loras]
    return params


def _defaults(user: UserParams, model: ModelParams) -> Defaults:
    """The model's, or what the preset puts in their place."""
    if user.preset is None:
        return model.defaults
    return msgspec.structs.replace(model.defaults, **msgspec.structs.asdict(PRESETS[user.preset]))


def _start_step(init: Init | None, steps: int) -> int:
    """The first schedule index that is run: the later, the smaller the strength."""
    if init is None or init.strength is None:
        return 0
    return steps - max(1, int(steps * init.strength))


def _check_prompt(name: str, text: str, *, may_be_empty: bool) -> None:
    if not may_be_empty and not text.strip():
        raise BadRequest(f"the {name} is empty; say what the video should show")
    size = len(utf8(name, text))
    if size > MAX_PROMPT_BYTES:
        raise BadRequest(f"the {name} has {size:,} bytes; the most is {MAX_PROMPT_BYTES:,}")


def size_of(user: UserParams, model: ModelParams, init: Init | None) -> tuple[int, int]:
    """(height, width): what was asked for, the model's default for what was not; with neither, the image's aspect.
    `BadRequest` if the model does not make videos of this size."""
    multiple = model.size_multiple
    height = user.height if user.height is not None else model.defaults.height
    width = user.width if user.width is not None else model.defaults.width
    if init is not None and init.is_condition and user.height is None and user.width is None:
        height, width = size_of_condition(init.media, model)
    most = multiple * model.transformer.rope_max_seq_len
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise BadRequest(f"{name} is {value}; it must be a multiple of {multiple}, the nearest is {nearest}")
        if value > most:
            raise BadRequest(f"{name} is {value}; {model.name} goes up to {most}: give a height and a width that fit")
    if height * width > model.limits.max_pixels:
        raise BadRequest(
            f"{width}x{height} is {height * width:,} pixels; {model.name} takes up to {model.limits.max_pixels:,}"
            f" (its usual size is {model.defaults.width}x{model.defaults.height})"
        )
    return height, width


def frames_of(user: UserParams, model: ModelParams) -> int:
    """What was asked for, or the model's default; `BadRequest` if the model does not make so many."""
    stride = model.vae.temporal_stride
    frames = user.num_frames if user.num_frames is not None else model.defaults.num_frames
    most = model.limits.max_frames
    if frames > most:
        raise BadRequest(f"num_frames is {frames}; {model.name} makes up to {most} frames")
    if frames < 1 or (frames - 1) % stride:
        below = max(1, (frames - 1) // stride * stride + 1)
        above = min(below + stride, most)
        near = f"{below} or {above}" if frames > 1 else "1"
        raise BadRequest(f"num_frames is {frames}; it must be {stride}n + 1, the nearest is {near}")
    return frames


def check_room(size: RequestSize, model: ModelParams, room: Room) -> None:
    """Refuse what can never fit, with the numbers; what does not fit at the moment is another matter."""
    if plan_for(model, size, room.bytes, room.setting, room.bounds) is None:
        why = refusal(model, size, room.bytes, room.setting, room.bounds)
        there, what = (room.bounds.host, "host") if why.missing_host else (room.bytes, "GPU")
        raise BadRequest(
            f"{size.width}x{size.height} with {size.frames} frames does not fit into the {gigabytes(there or 0)} of "
            f"{what} memory that this engine may take: {why}"
        )


def _guidance(user: UserParams, model: ModelParams, defaults: Defaults) -> tuple[float, float]:
    """Of the high-noise and of the low-noise expert; the names are diffusers', the original's pair is (low, high)."""
    first = user.guidance_scale if user.guidance_scale is not None else defaults.guidance_scale
    if model.boundary is None and user.guidance_scale_2 not in (None, first):
        raise BadRequest(
            f"guidance_scale_2 is the low-noise expert's (guidance_scale the high-noise one's), and {model.name} has "
            "one expert only: leave it out"
        )
    second = user.guidance_scale_2
    if second is None and user.guidance_scale is None:
        second = defaults.guidance_scale_2
    return first, first if second is None else second


def _output(user: UserParams, system: SystemParams) -> str:
    """The resolved output path, in a directory that exists and can be written."""
    path = user.output
    name = os.path.basename(absolute("output", path))
    stem, extension = os.path.splitext(name)
    if extension.lower() != ".mp4":
        raise BadRequest(f"the output {path!r} must end in .mp4, after a name")
    parent = os.path.dirname(path) or "."
    resolved = os.path.join(below_root("output", parent, system), name)
    if len(os.fsencode(name)) > 200:
        raise BadRequest("the name of the output is longer than 200 bytes; choose a shorter one")
    if not os.path.isdir(os.path.dirname(resolved)):
        raise BadRequest(f"the output directory {parent!r} does not exist; make it first")
    if not os.access(os.path.dirname(resolved), os.R_OK | os.W_OK | os.X_OK):  # syncing a directory takes reading it
        raise BadRequest(f"the output directory {parent!r} cannot be written; choose another or change its mode")
    beside = [os.path.join(os.path.dirname(resolved), stem + ".json")] if user.metadata_json else []
    for file in [resolved, *beside]:
        if os.path.islink(file) or (os.path.lexists(file) and not os.path.isfile(file)):
            raise BadRequest(f"{os.path.basename(file)!r} exists in {parent!r} and is not a file; choose another name")
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
            # The error's own text has the command line, with the paths of this machine.
            raise EngineError(f"the tokens of the {name} could not be counted: {type(error).__name__}") from error
        if count > most:
            raise BadRequest(f"the {name} has {count} tokens; {model.name} reads at most {most}: shorten it")


def _count_tokens(text: str, tokenizer: Path) -> int:
    ran = run_module("stages.prompt", str(tokenizer), given=text.encode(), timeout=60)
    ran.check_returncode()
    return int(ran.stdout)
