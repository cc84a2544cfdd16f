"""ComfyUI's single files: which component each one is, told by the names of the tensors in it.

Which expert of two, only the file's name can tell: it must contain "high" or "low".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from hotreload.names import without_prefix
from hotreload.safetensors_file import read_header
from hotreload.shown import listed, shown
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Component, Naming

Suits = Callable[[Component], bool]
"""The shapes of a component's tensors are those of the model that is wanted."""
FOLDERS = ("", "diffusion_models", "unet", "text_encoders", "clip", "vae", "clip_vision")
BASES = ("", "split_files")
"""`split_files`: a repackaged repository as it is downloaded."""
MARKS: tuple[tuple[str, str, Naming], ...] = (
    ("head.modulation", "transformer", "original"),
    ("condition_embedder.time_proj.weight", "transformer", "diffusers"),
    ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "text_encoder", "diffusers"),
    ("blocks.1.pos_embedding.embedding.weight", "text_encoder", "original"),
    ("decoder.middle.0.residual.0.gamma", "vae", "original"),
    ("decoder.mid_block.resnets.0.norm1.gamma", "vae", "diffusers"),
    ("vision_model.embeddings.class_embedding", "image_encoder", "diffusers"),
    ("visual.cls_embedding", "image_encoder", "original"),
)
"""A tensor that only this component has. (T5 has a bias in its first layer only, UMT5 in each.)"""
_EXPERTS: dict[Literal["high", "low"], re.Pattern[str]] = {
    "high": re.compile(r"high[ _-]?noise|(?<![a-z])high(?![a-z])", re.IGNORECASE),
    "low": re.compile(r"low[ _-]?noise|(?<![a-z])low(?![a-z])", re.IGNORECASE),
}


_HINT = "; two experts of a Wan2.2-A14B model are told apart by 'high' and 'low' in their names"


class Classified(NamedTuple):
    """One file: `component` is None for files of other models; `problem` says why it cannot be used."""

    file: Path
    component: str | None
    naming: Naming
    problem: str | None


def list_files(directory: Path) -> list[Path]:
    """Weights, in any format, in the folders that ComfyUI has for them."""
    folders = [directory / base / folder for base in BASES for folder in FOLDERS]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    return [file for file in files if file.suffix in (".safetensors", ".gguf") and file.is_file()]


def find(
    directory: Path, name: str, components: tuple[str, ...], suits: Suits | None = None
) -> tuple[list[Path], Naming]:
    """The file of one of the `components` of a model, of several the one that `suits`. Raises `BadCheckpoint` if there
    is none, or more than one."""
    files = [classify(file, shown(file.relative_to(directory))) for file in list_files(directory)]
    two_experts = "transformer_2" in components
    kind = "transformer" if name == "transformer_2" else name
    candidates = [file for file in files if file.component == kind and file.problem is None]
    if kind == "transformer":
        candidates = _of_expert(candidates, name, two_experts)
    if len(candidates) > 1 and suits is not None:
        candidates = _suiting(candidates, name, suits, directory)
    if len(candidates) > 1:
        raise BadCheckpoint(
            f"several files could be the {name}: {_names(candidates, directory)}; leave one, or link one of each into "
            f"a directory{_HINT if kind == 'transformer' and not two_experts else ''}"
        )
    if not candidates:
        raise BadCheckpoint(_missing(name, two_experts, kind, files, directory))
    return [candidates[0].file], candidates[0].naming


def transformers(directory: Path) -> list[Component]:
    """Every file that could be a transformer, one component each."""
    files = [classify(file, shown(file.relative_to(directory))) for file in list_files(directory)]
    return [
        Component(name="transformer", files=[str(file.file)], naming=file.naming)
        for file in files
        if file.component == "transformer" and file.problem is None
    ]


def classify(file: Path, label: str) -> Classified:
    """What a file is, from its header."""
    if file.suffix == ".gguf":
        return Classified(file, None, "original", f"{label} is GGUF, which is not supported: use the bf16 or fp16 file")
    try:
        entries = read_header(file, label).entries
    except BadCheckpoint as error:
        return Classified(file, None, "original", str(error))
    names = {without_prefix(entry.name) for entry in entries}
    marked = [(kind, naming) for mark, kind, naming in MARKS if mark in names]
    if not marked:
        return Classified(file, None, "original", None)
    fp8 = next((entry.dtype for entry in entries if entry.dtype.startswith("F8_")), None)
    problem = f"{label} holds {fp8} weights (fp8), which are not supported: use the bf16 or fp16 file" if fp8 else None
    return Classified(file, *marked[0], problem)


def expert_of(name: str) -> Literal["high", "low"] | None:
    """Which expert of two a file's name says it is for, if it says one."""
    said = [expert for expert, pattern in _EXPERTS.items() if pattern.search(name)]
    return said[0] if len(said) == 1 else None


def _of_expert(candidates: list[Classified], name: str, two_experts: bool) -> list[Classified]:
    if not two_experts:
        if candidates and all(expert_of(file.file.name) for file in candidates):
            names = listed(shown(file.file.name) for file in candidates)
            raise BadCheckpoint(
                f"by their names, these are experts of two: {names}; the model has one transformer; choose a "
                "Wan2.2-A14B model with --model"
            )
        return candidates
    expert = "high" if name == "transformer" else "low"
    return [file for file in candidates if expert_of(file.file.name) == expert]


def _suiting(candidates: list[Classified], name: str, suits: Suits, directory: Path) -> list[Classified]:
    """Those of the model that is wanted, by the shapes of their tensors."""
    suiting = [c for c in candidates if suits(Component(name=name, files=[str(c.file)], naming=c.naming))]
    if not suiting:
        raise BadCheckpoint(
            f"of the files that could be the {name}, none is of this model, by its shapes: "
            f"{_names(candidates, directory)}"
        )
    return suiting


def _names(candidates: list[Classified], directory: Path) -> str:
    return listed(shown(file.file.relative_to(directory)) for file in candidates)


def _missing(name: str, two_experts: bool, kind: str, files: list[Classified], directory: Path) -> str:
    wanted = f"the {name}"
    if kind == "transformer" and two_experts:
        expert = "high" if name == "transformer" else "low"
        wanted = f"the {expert}-noise expert ({name}), a file with {expert!r} in its name"
    problems = [file.problem for file in files if file.problem is not None and file.component in (None, kind)]
    seen = [
        f"{shown(file.file.relative_to(directory))} ({file.component or 'not of Wan'})"
        for file in files
        if not file.problem
    ]
    text = f"the checkpoint lacks {wanted}; files found: {listed(seen) or 'none that can be used'}"
    return f"{text}; {listed(problems, '; ')}" if problems else text
