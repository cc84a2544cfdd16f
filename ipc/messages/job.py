"""A request with nothing left to decide, as stages are told of it."""

from __future__ import annotations

import os
from typing import Any, Literal

import msgspec

from ipc.messages.weights import WeightChange


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A request with nothing left to decide. Sizes in pixels and frames; `init` is a path the server has resolved."""

    id: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float
    guidance_scale_2: float
    seed: int
    solver: Literal["unipc", "dpm++", "euler"]
    flow_shift: float
    init: str | None
    start_step: int
    """First schedule index that is run: 0, or later with an init video (from strength: `engine/admission.py`)."""
    init_as: Literal["start", "channels", "first_frame"] = "start"
    """What `init` is: where denoising starts (image or video), or an image in the sense of `Conditioning`."""
    noise_device: Literal["cpu", "cuda"] = "cpu"
    """Where the noise is drawn; the two give different noise for a seed."""
    output: str
    metadata_json: bool
    metadata: dict[str, Any]
    """Goes into the file: parameters, versions, weight hashes. The writer adds the time per stage."""
    weights: dict[str, str] = {}
    """Component -> content hash of the version that this task is computed with; one that is missing: whichever is
    bound."""
    changes: list[WeightChange] = []
    """Of the transformers' versions in the middle of the task, in the order of their steps."""
    loras: list[JobLora] = []
    """Added to those versions, in this order."""

    @property
    def partial(self) -> str:
        """The temporary name the writer uses until the file is complete: same directory, hidden, of this task alone."""
        directory, name = os.path.split(self.output)
        return os.path.join(directory, f".{name}.{self.id[:8]}.part")

    @property
    def temporaries(self) -> tuple[str, ...]:
        """Every name that the writer may use meanwhile: for the video, its JSON, and what had their names before."""
        return tuple(self.partial + suffix for suffix in ("", ".json", ".old", ".json.old"))


class JobLora(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that a task is computed with; its name may mean another one by now."""

    name: str
    strength: float
    content: dict[str, str]
    """Component -> hash of what is added to it."""


class Computed(msgspec.Struct, frozen=True, kw_only=True):
    """From quantum `step` of a phase on (the first is 0), a task was computed with these: library, attention or kernels
    -> version or name, threads -> their number."""

    step: int
    by: dict[str, str]
