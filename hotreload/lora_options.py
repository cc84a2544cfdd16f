"""LoRA files as the operator names them, FILE[,LOW_FILE][:STRENGTH], attached to the components they go into."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from hotreload.checkpoint import is_utf8
from hotreload.comfyui import expert_of
from hotreload.lora import experts_in, read_lora
from hotreload.safetensors_file import TensorEntry, read_header
from hotreload.tables import component_table
from ipc.errors import BadConfig
from ipc.messages.weights import Component, Lora

EXTENSION = ".safetensors"
MAX_STRENGTH = 10.0
_BETWEEN = re.compile(rf"(?<={re.escape(EXTENSION)})\s*,")
_STRENGTH_OF_ONE = re.compile(rf"{re.escape(EXTENSION)}:[^,/]*,")
"""Before the comma between two files."""


class LoraOption(NamedTuple):
    """One file, or the high-noise and the low-noise expert's, as the operator wrote them."""

    files: tuple[str, ...]
    strength: float


def parse_lora(text: str) -> LoraOption:
    """`FILE[,LOW_FILE][:STRENGTH]`; the strength is 1 if it is left out. Raises `BadConfig`."""
    path, colon, tail = text.strip().rpartition(":")
    if not colon or tail.endswith(EXTENSION):
        path, tail = text.strip(), "1"
    try:
        strength = float(tail)
    except ValueError:
        raise BadConfig(
            f"LoRA {text!r}: {tail!r} is not a strength; expected FILE:STRENGTH, as in x{EXTENSION}:0.8"
        ) from None
    if not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
        raise BadConfig(f"LoRA {text!r}: the strength must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, got {tail}")
    if _STRENGTH_OF_ONE.search(path):
        raise BadConfig(
            f"LoRA {text!r}: one strength, at the end, is for both files; expected HIGH_FILE,LOW_FILE:STRENGTH"
        )
    files = tuple(file.strip() for file in _BETWEEN.split(path))
    if len(files) > 2 or not all(file.endswith(EXTENSION) for file in files):
        raise BadConfig(f"LoRA {text!r}: expected FILE or HIGH_FILE,LOW_FILE, each ending in {EXTENSION}")
    return LoraOption(files, strength)


def attach_loras(
    components: Mapping[str, Component], options: Iterable[str], experts: Sequence[str]
) -> dict[str, Component]:
    """`components` with the LoRA files of `options` in the transformers they go into, each checked to fit.

    `experts`: all transformers of the model, high noise first; `components` may lack some of them, whose files are then
    not read further than their headers. Raises `BadConfig` for an option that is not one, or has the wrong number of
    files; `BadCheckpoint` for a file.
    """
    attached = dict(components)
    parsed = [parse_lora(text) for text in options]
    shapes = {
        name: {n: e.shape for n, e in component_table(components[name]).items()}
        for name in experts
        if parsed and name in components
    }
    for option in parsed:
        check_paths(option)
        for name, given in zip(experts, for_each_expert(option.files, experts), strict=True):
            if name not in components:
                continue
            file = _path(given)
            read_lora(file, name, shapes[name], f"LoRA {given}")
            lora = Lora(file=str(file), strength=option.strength)
            attached[name] = msgspec.structs.replace(attached[name], loras=[*attached[name].loras, lora])
    return attached


def check_paths(option: LoraOption) -> None:
    """`BadConfig` for a path that cannot be sent to a stage."""
    for file in option.files:
        if not is_utf8(Path(file).absolute()):
            raise BadConfig(
                f"LoRA {file!r}: its path is not UTF-8, as paths must be here; rename the file or directory"
            )


def for_each_expert(
    files: tuple[str, ...], experts: Sequence[str], label: Callable[[str], str] = str
) -> tuple[str, ...]:
    """The file that goes into each transformer. `label`: what errors call a file.

    Raises `BadConfig` for a number of files that does not fit the experts, `BadCheckpoint` for a file.
    """
    names = ", ".join(map(label, files))
    both = [file for file in files if len(experts_in(_header_entries(file, label))) == 2]
    if len(files) == 1 and len(experts) == 2:
        if not both:
            raise BadConfig(
                f"LoRA {names} is for one transformer, but the model has two experts; give a file for each, HIGH,LOW"
            )
        return files * 2
    if len(files) == 2 and len(experts) != 2:
        raise BadConfig(f"LoRA {names}: two files are for a model with two experts; this one has one transformer")
    if both:
        expected = "give it alone" if len(experts) == 2 else "the model has one transformer"
        raise BadConfig(f"LoRA {label(both[0])} holds both experts (transformer. and transformer_2.); {expected}")
    if len(files) == 2 and [expert_of(Path(file).name) for file in files] == ["low", "high"]:
        raise BadConfig(f"LoRA {names}: by their names the low-noise file comes first; the order is HIGH,LOW")
    return files


def _header_entries(file: str, label: Callable[[str], str]) -> list[TensorEntry]:
    return read_header(_path(file), f"LoRA {label(file)}").entries


def _path(given: str) -> Path:
    if "\0" in given:
        raise BadConfig(f"LoRA {given!r}: a path has no NUL character")
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError as error:
        raise BadConfig(f"LoRA {given!r}: {error}; give the whole path") from error
