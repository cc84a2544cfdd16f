"""`engine check`: what a checkpoint holds, what is missing or wrong, and what it would need. Loads no weights."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.admission import frames_of, size_of
from engine.checkpoint import EXPERTS, file_bytes, find_components, identify, possible, suits
from engine.child import NoAnswer, answer_of
from engine.footprint import Need, RequestSize, needs, usual_size
from engine.memory import slot_sizes
from engine.models import existing_directory, load_model
from engine.params import ModelParams, UserParams
from hotreload.checkpoint import Layout, find_component, find_layout, find_tokenizer
from hotreload.comfyui import Suits
from hotreload.described import check_config
from hotreload.safetensors_file import TensorEntry
from hotreload.tables import component_table, safetensors_only, transformer_traits
from ipc.errors import BadCheckpoint, BadConfig, BadRequest
from ipc.messages.check import CheckAsked, ComponentChecked
from ipc.messages.weights import Component

CHECK_TIMEOUT = 300.0
"""Seconds to import torch, build the networks without memory, and read the headers."""


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights in one dtype; activations come on top."""

    components: dict[str, int]
    resident: int
    """All of them, on one device."""


class ComponentReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the directory has of one component."""

    name: str
    files: list[str]
    """Relative to the directory."""
    bytes: int
    """On disk."""
    dtypes: dict[str, int]
    parameters: int
    problem: str
    """Why it is not there, or cannot be read; empty if it can."""
    wrong: dict[str, list[str]]
    """What is wrong -> with which tensors, all of them."""

    @property
    def complete(self) -> bool:
        return not self.problem and not self.wrong


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that `engine check` says."""

    directory: str
    layout: Layout
    model: str
    """Empty: none was named, and which one it is does not show."""
    fits: list[str]
    """The known models that the transformer could be of, or one of the files that could be the transformer."""
    components: list[ComponentReport]
    problems: list[str]
    """Of the directory as a whole, one sentence each."""
    gpu: Needs | None
    """bfloat16. Without a model, nothing is known of what it needs."""
    cpu: Needs | None
    """float32."""
    queue_bytes: int
    """Shared host memory of the engine's queues and states."""
    size: RequestSize | None
    levels: list[Need]
    """What a video of that size takes at each memory level, on one GPU in bfloat16."""

    @property
    def complete(self) -> bool:
        return not self.problems and all(component.complete for component in self.components)


def check_checkpoint(directory: Path, model: str | None, size: str | None = None) -> CheckReport:
    """Examine a directory. Without a `model`, the one that its transformer is of; without that, what can be seen.
    `size`: of the video whose memory is reckoned, as in `read_size`; without, the model's usual one.

    Raises `BadConfig` for what is no directory, and for a size that is none, or not one of the model; `BadCheckpoint`
    if there is nothing in the directory to examine; what is wrong with a component is in the report.
    """
    root = existing_directory(directory)
    layout, fits = find_layout(root), identify(root)
    if model is None and not fits:
        return _without_model(root, layout)
    params = load_model(model if model is not None else fits[0])
    video = usual_size(params) if size is None else read_size(size, params)
    problems, found, missing = _find(root, layout, params.components, functools.partial(suits, params))
    if params.name not in fits and fits:
        problems.insert(0, f"the transformer is that of {' or '.join(fits)}, not of {params.name}")
    for name in EXPERTS:
        if name in found:
            with _reported(name, missing):
                check_config(found[name], params.transformer)
    checked = _examine(params, found)
    return CheckReport(
        directory=str(root), layout=layout, model=params.name, fits=fits,
        components=[_report(root, c, found.get(c.name), missing.get(c.name)) for c in checked], problems=problems,
        gpu=_needs({c.name: c.bytes_bfloat16 for c in checked}),
        cpu=_needs({c.name: c.bytes_float32 for c in checked}), queue_bytes=slot_sizes(params).total,
        size=video, levels=needs(params, video),
    )  # fmt: skip


def read_size(text: str, model: ModelParams) -> RequestSize:
    """WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES. `BadConfig` for what is not of this form, or no size of the model."""
    width, height, frames = size_given(text)
    user = UserParams(prompt="", width=width, height=height, num_frames=frames)
    try:
        size_of(user, model, None)
        return msgspec.structs.replace(usual_size(model), width=width, height=height, frames=frames_of(user, model))
    except BadRequest as error:
        raise BadConfig(str(error)) from error


def size_given(text: str) -> tuple[int, int, int | None]:
    """Width, height, and frames if they are said. `BadConfig` for another form."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
        raise BadConfig(f"the size is {text!r}; expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    width, height, *frames = map(int, parts)
    return width, height, frames[0] if frames else None


def _without_model(root: Path, layout: Layout) -> CheckReport:
    """What can be said of a directory when it is not known which model it is of: by its headers, without torch."""
    wanted: tuple[str, ...] = ("text_encoder", "transformer", "vae")
    experts = find_components(root, EXPERTS)
    if experts and "transformer" not in find_components(root, EXPERTS[:1]):
        wanted = ("text_encoder", *EXPERTS, "vae")
    if "image_encoder" in find_components(root, ("image_encoder",)):
        wanted = (*wanted, "image_encoder")
    problems, found, missing = _find(root, layout, wanted)
    fits: list[str] = []
    with contextlib.suppress(OSError):  # a folder that cannot be read; its component says so
        fits = possible(root)
    why = f"its files could be of {' or '.join(fits)}" if fits else "it has no transformer of a known model"
    problems.insert(0, f"which model this is does not show: {why}; name one with --model (`engine models` lists them)")
    return CheckReport(
        directory=str(root), layout=layout, model="", fits=fits,
        components=[_seen(root, name, found.get(name), missing.get(name)) for name in wanted], problems=problems,
        gpu=None, cpu=None, queue_bytes=0, size=None, levels=[],
    )  # fmt: skip


def _seen(root: Path, name: str, found: Component | None, missing: str | None) -> ComponentReport:
    """Of a component that is compared with nothing. The tensors of a `.pth` file are not listed."""
    table: dict[str, TensorEntry] = {}
    if found is not None:
        try:
            table = component_table(safetensors_only(found))
            if name in EXPERTS:
                transformer_traits(table, found.naming)
        except BadCheckpoint as error:
            missing = str(error)
    checked = ComponentChecked(
        name=name, dtypes=dict(collections.Counter(entry.dtype for entry in table.values())),
        parameters=sum(math.prod(entry.shape) for entry in table.values()), wrong={}, unreadable="", bytes_bfloat16=0,
        bytes_float32=0,
    )  # fmt: skip
    return _report(root, checked, found, missing)


def _find(
    root: Path, layout: Layout, wanted: tuple[str, ...], suits: Suits | None = None
) -> tuple[list[str], dict[str, Component], dict[str, str]]:
    """(problems of the whole, components that are there, why each other one is not)."""
    problems: list[str] = []
    found: dict[str, Component] = {}
    missing: dict[str, str] = {}
    try:
        find_tokenizer(root)
    except BadCheckpoint as error:
        problems.append(str(error))
    for name in wanted:
        with _reported(name, missing):
            found[name] = find_component(root, layout, name, wanted, suits)
    return problems, found, missing


@contextlib.contextmanager
def _reported(name: str, missing: dict[str, str]) -> Iterator[None]:
    """What is wrong with a component as a whole goes into its report."""
    try:
        yield
    except BadCheckpoint as error:
        missing[name] = str(error)


def _examine(model: ModelParams, found: dict[str, Component]) -> list[ComponentChecked]:
    """In a process of its own: it needs torch, and a hostile file may end it."""
    asked = CheckAsked(
        wanted=list(model.components), components=list(found.values()), transformer=model.transformer, vae=model.vae,
        text_encoder=model.text_encoder, image_encoder=model.image_encoder,
    )  # fmt: skip
    try:
        return answer_of("stages.check", asked, list[ComponentChecked], CHECK_TIMEOUT)
    except NoAnswer as error:
        raise BadCheckpoint(f"the checkpoint could not be examined: {error}") from error


def _report(root: Path, checked: ComponentChecked, found: Component | None, missing: str | None) -> ComponentReport:
    return ComponentReport(
        name=checked.name, files=[] if found is None else [os.path.relpath(file, root) for file in found.files],
        bytes=0 if found is None else file_bytes(found), dtypes=checked.dtypes, parameters=checked.parameters,
        problem=checked.unreadable if missing is None else missing, wrong=checked.wrong,
    )  # fmt: skip


def _needs(components: dict[str, int]) -> Needs:
    return Needs(components=components, resident=sum(components.values()))
