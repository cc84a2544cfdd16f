"""`engine check`: what a checkpoint holds, what is missing or wrong, and what it would need. Loads no weights."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec

from engine.checkpoint import file_bytes, identify
from engine.child import run_module
from engine.memory import slot_sizes
from engine.models import load_model
from engine.params import ModelParams
from hotreload.checkpoint import Layout, find_component, find_layout, find_tokenizer
from ipc.errors import BadCheckpoint, BadConfig
from ipc.messages import CheckAsked, Component, ComponentChecked

CHECK_TIMEOUT = 300.0
"""Seconds to import torch, build the networks without memory, and read the headers."""


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights in one dtype, by component and by placement; activations come on top."""

    components: dict[str, int]
    resident: int
    """Everything on the device."""
    largest: int
    """The largest component alone: with one on the device at a time, and the others on the host."""
    expert: int
    """One expert on the device, with text encoder, VAE and the idle expert on the host."""
    host: int
    """Those on the host."""


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
    fits: list[str]
    """The known models that the transformer could be of."""
    components: list[ComponentReport]
    problems: list[str]
    """Of the directory as a whole, one sentence each."""
    gpu: Needs
    """bfloat16."""
    cpu: Needs
    """float32."""
    queue_bytes: int
    """Shared host memory of the engine's queues and states."""

    @property
    def complete(self) -> bool:
        return not self.problems and all(component.complete for component in self.components)


def check_checkpoint(directory: Path, model: str | None) -> CheckReport:
    """Examine a directory. Without a `model`, the one that its transformer is of.

    Raises `BadCheckpoint` if there is nothing to examine, or no model to compare it with; what is wrong with a
    component is in the report.
    """
    root = directory.expanduser().resolve()
    if not root.is_dir():
        raise BadConfig(f"the checkpoint {str(directory)!r} is not a directory")
    layout, fits = find_layout(root), identify(root)
    if model is None and not fits:
        raise BadCheckpoint(
            "the directory has no transformer of a known model; name the model with --model to see what is missing "
            "(`engine models` lists them)"
        )
    params = load_model(model if model is not None else fits[0])
    problems, found, missing = _find(root, layout, params)
    if params.name not in fits and fits:
        problems.insert(0, f"the transformer is that of {' or '.join(fits)}, not of {params.name}")
    checked = _examine(params, found)
    return CheckReport(
        directory=str(root), layout=layout, model=params.name, fits=fits,
        components=[_report(root, c, found.get(c.name), missing.get(c.name)) for c in checked], problems=problems,
        gpu=_needs({c.name: c.bytes_bfloat16 for c in checked}),
        cpu=_needs({c.name: c.bytes_float32 for c in checked}), queue_bytes=slot_sizes(params).total,
    )  # fmt: skip


def _find(root: Path, layout: Layout, model: ModelParams) -> tuple[list[str], dict[str, Component], dict[str, str]]:
    """(problems of the whole, components that are there, why each other one is not)."""
    problems: list[str] = []
    found: dict[str, Component] = {}
    missing: dict[str, str] = {}
    try:
        find_tokenizer(root)
    except BadCheckpoint as error:
        problems.append(str(error))
    for name in model.components:
        try:
            found[name] = find_component(root, layout, name, model.components)
        except BadCheckpoint as error:
            missing[name] = str(error)
        except OSError as error:
            missing[name] = f"its files cannot be read: {error.strerror}"
    return problems, found, missing


def _examine(model: ModelParams, found: dict[str, Component]) -> list[ComponentChecked]:
    """In a process of its own: it needs torch, and a hostile file may end it."""
    asked = CheckAsked(
        wanted=list(model.components), components=list(found.values()), transformer=model.transformer, vae=model.vae,
        text_encoder=model.text_encoder, image_encoder=model.image_encoder,
    )  # fmt: skip
    try:
        ran = run_module("stages.check", given=msgspec.json.encode(asked), timeout=CHECK_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise BadCheckpoint(f"the checkpoint could not be examined within {CHECK_TIMEOUT:g} seconds") from None
    if ran.returncode != 0:
        said = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise BadCheckpoint(
            f"the checkpoint could not be examined: the process that looks at it ended with status {ran.returncode}: "
            f"{said}"
        )
    return msgspec.json.decode(ran.stdout, type=list[ComponentChecked])


def _report(root: Path, checked: ComponentChecked, found: Component | None, missing: str | None) -> ComponentReport:
    return ComponentReport(
        name=checked.name, files=[] if found is None else [os.path.relpath(file, root) for file in found.files],
        bytes=0 if found is None else file_bytes(found), dtypes=checked.dtypes, parameters=checked.parameters,
        problem=checked.unreadable if missing is None else missing, wrong=checked.wrong,
    )  # fmt: skip


def _needs(components: dict[str, int]) -> Needs:
    total, expert = sum(components.values()), components["transformer"]
    return Needs(
        components=components, resident=total, largest=max(components.values()), expert=expert, host=total - expert
    )
