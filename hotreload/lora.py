"""LoRA files: what they add to which tensor of a transformer. Headers only, without torch.

A file adds to a tensor `strength * (alpha / rank or 1) * up @ down`, or `strength * diff`. Whose names it uses (the
original's, Diffusers', kohya's with underscores), with which prefix and which suffixes, is found by looking. Nothing is
left out in silence: a key that matches no tensor, a half of a pair, a wrong shape, a method other than LoRA are errors.

Source of the formats: ComfyUI and lightx2v files, kohya's and musubi's, PEFT's and Diffusers'.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from hotreload.files import regular_file
from hotreload.names import original_name, our_name
from hotreload.safetensors_file import FLOATING, Header, TensorEntry, read_header
from hotreload.shown import shown
from hotreload.tables import describe
from ipc.errors import BadCheckpoint

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer_2.", "transformer.",
    "unet.", "model.",
)  # fmt: skip
KOHYA_PREFIX = "lora_unet_"
METADATA_KEY = "lora_adapter_metadata"
"""Diffusers' copy of PEFT's configuration, JSON."""
_ROLES = (
    ("down", re.compile(r"(\.lora_A(\.[^.]+)?\.weight|\.lora_down\.weight|[._]lora\.down\.weight)$")),
    ("up", re.compile(r"(\.lora_B(\.[^.]+)?\.weight|\.lora_up\.weight|[._]lora\.up\.weight)$")),
    ("down", re.compile(r"\.lora_linear_layer\.down\.weight$")),
    ("up", re.compile(r"\.lora_linear_layer\.up\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("diff", re.compile(r"\.diff(_b|_m)?$")),
)
_LEAVES = {".diff_b": "bias", ".diff_m": "modulation"}
"""Which parameter of a module a suffix is for; all others are for its weight."""
_OTHER_METHODS = re.compile(
    r"\.(?P<DoRA>dora_scale|lora_magnitude_vector)|\.(?P<LoHa>hada_)|\.(?P<LoKr>lokr_)|\.(?P<GLoRA>[ab][12]\.weight$)|"
    r"\.(?P<OFT>oft_)|\.(?P<LoCon>lora_mid\.)|\.(?P<replaced>(set|reshape)_weight$|[wb]_norm$)"
)
MAX_SCALE = 1e6
"""Of alpha / rank, which is about 1 in every file that means something."""
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


class Delta(NamedTuple):
    """What one file adds to the tensor `target`, before its strength: `scale * up @ down`, or else `diff`."""

    target: str
    scale: float
    down: TensorEntry | None = None
    up: TensorEntry | None = None
    diff: TensorEntry | None = None


class _Key(NamedTuple):
    target: str
    role: str


class _Adapter(msgspec.Struct):
    """Of Diffusers' metadata, what changes the result."""

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False


def read_lora(
    file: Path, component: str, shapes: Mapping[str, tuple[int, ...]], label: str | None = None
) -> list[Delta]:
    """What `file` adds to a transformer whose tensors have these names (ours) and `shapes`. Raises `BadCheckpoint`.

    `component`: transformer or transformer_2; of a file with both experts, only the keys of this one are looked at.
    `label`: what errors call the file; None: without the directories it is in.
    """
    label = label or f"LoRA {shown(file.name)}"
    if file.suffix != ".safetensors":
        raise BadCheckpoint(f"{label} is not a .safetensors file; convert it")
    header = read_header(file, label)
    entries, experts = header.entries, experts_in(header.entries)
    if len(experts) == 2:
        entries = [entry for entry in entries if _expert(entry.name) == component]
    elif experts == {"transformer_2"} and component != "transformer_2":
        raise BadCheckpoint(
            f"{label} is for the low-noise expert (its keys start with transformer_2.), not for {component}"
        )
    parts = _parts(entries, shapes, label)
    prefix = component if len(experts) == 2 else min(experts, default=component)
    return _deltas(parts, shapes, _adapter(header, prefix, label), label)


def experts_in(entries: Iterable[TensorEntry]) -> set[str]:
    """The experts that the keys of a file name: PEFT's prefixes `transformer.` and `transformer_2.`."""
    return {expert for entry in entries if (expert := _expert(entry.name)) is not None}


def _expert(key: str) -> str | None:
    key = key.removeprefix("base_model.model.")
    return next((name for name in ("transformer", "transformer_2") if key.startswith(f"{name}.")), None)


def _parts(
    entries: list[TensorEntry], shapes: Mapping[str, tuple[int, ...]], label: str
) -> dict[str, dict[str, TensorEntry]]:
    """The keys of a file by target and role. Raises `BadCheckpoint` for those that are not understood."""
    parts: dict[str, dict[str, TensorEntry]] = {}
    unmatched, unsupported, twice = [], [], []
    names = _Names(shapes)
    for entry in entries:
        if other := _OTHER_METHODS.search(entry.name):
            unsupported.append(f"{shown(entry.name)} ({other.lastgroup})")
        elif (key := names.resolve(entry.name)) is None:
            unmatched.append(shown(entry.name))
        elif key.role in parts.setdefault(key.target, {}):
            twice.append(shown(entry.name))
        else:
            parts[key.target][key.role] = entry
    problems = describe({
        "of a method other than LoRA": unsupported, "without a match in the model": unmatched,
        "given a second time": twice,
    })  # fmt: skip
    if problems:
        raise BadCheckpoint(f"{label} does not fit the model: {problems}")
    if not parts:
        raise BadCheckpoint(f"{label} has no tensors")
    return parts


def _deltas(
    parts: Mapping[str, Mapping[str, TensorEntry]], shapes: Mapping[str, tuple[int, ...]], adapter: _Adapter, label: str
) -> list[Delta]:
    deltas: list[Delta] = []
    halves, misshaped, dtypes = [], [], []
    for target, roles in sorted(parts.items()):
        down, up, diff = roles.get("down"), roles.get("up"), roles.get("diff")
        dtypes += [f"{shown(e.name)} ({e.dtype})" for r, e in roles.items() if r != "alpha" and e.dtype not in FLOATING]
        if (down is None) != (up is None) or (down is None and diff is None):
            halves += [shown(entry.name) for entry in roles.values()]
            continue
        if down is not None and up is not None:
            if problem := _misfit(down, up, shapes[target]):
                misshaped.append(problem)
                continue
            scale = _scale(roles.get("alpha"), down.shape[0], adapter, label)
            deltas.append(Delta(target, scale, down=down, up=up))
        if diff is not None:
            if diff.shape != shapes[target]:
                misshaped.append(f"{shown(diff.name)} (got {list(diff.shape)}, expected {list(shapes[target])})")
            deltas.append(Delta(target, 1.0, diff=diff))
    problems = describe({
        "without the other half of the pair": halves, "of another shape": misshaped, "not floating-point": dtypes,
    })  # fmt: skip
    if problems:
        raise BadCheckpoint(f"{label} does not fit the model: {problems}")
    return deltas


def _misfit(down: TensorEntry, up: TensorEntry, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a pair for a weight of `shape` [out, in, ...]; None if nothing is."""
    rank = down.shape[0] if down.shape else 0
    wanted_down = f"{shown(down.name)} (got {list(down.shape)}, expected [rank, {', '.join(map(str, shape[1:]))}])"
    if len(shape) < 2:
        return f"{shown(down.name)} (a pair for a tensor of shape {list(shape)})"
    if rank > max(shape[0], math.prod(shape[1:])):
        return f"{shown(down.name)} (rank {rank}, more than the rows or columns of {list(shape)})"
    if rank == 0 or math.prod(down.shape[1:]) != math.prod(shape[1:]):
        return wanted_down
    if up.shape[:2] != (shape[0], rank) or math.prod(up.shape) != shape[0] * rank:
        return f"{shown(up.name)} (got {list(up.shape)}, expected [{shape[0]}, {rank}])"
    return None


def _scale(alpha: TensorEntry | None, rank: int, adapter: _Adapter, label: str) -> float:
    """alpha / rank. Its product with any strength is a float32, as which torch must take it."""
    scale = 1.0
    if alpha is not None:
        scale = _read_scalar(alpha, label) / rank
    elif adapter.lora_alpha is not None:
        scale = adapter.lora_alpha / (math.sqrt(rank) if adapter.use_rslora else rank)
    if not abs(scale) <= MAX_SCALE:
        name = METADATA_KEY if alpha is None else shown(alpha.name)
        raise BadCheckpoint(f"{label}: {name} scales by {scale:g}, expected at most {MAX_SCALE:g}: it is damaged")
    return scale


def _read_scalar(entry: TensorEntry, label: str) -> float:
    if math.prod(entry.shape) != 1 or entry.dtype not in (*_SCALARS, "BF16"):
        raise BadCheckpoint(f"{label}: {shown(entry.name)} must be one number, got {entry.dtype} {list(entry.shape)}")
    try:
        with regular_file(entry.file) as file:
            file.seek(entry.offset)
            raw = file.read(entry.size)
    except OSError as error:
        raise BadCheckpoint(f"{label} cannot be read: {error.strerror}") from error
    if len(raw) != entry.size:
        raise BadCheckpoint(f"{label} was cut short while it was read; load it again")
    (value,) = struct.unpack(*(("<f", b"\0\0" + raw) if entry.dtype == "BF16" else (_SCALARS[entry.dtype], raw)))
    if not math.isfinite(value):
        raise BadCheckpoint(f"{label}: {shown(entry.name)} is {value}")
    return float(value)


def _adapter(header: Header, prefix: str, label: str) -> _Adapter:
    """PEFT's configuration of the component with this prefix, if Diffusers wrote one into the file."""
    try:
        packed = msgspec.json.decode(header.metadata.get(METADATA_KEY, "{}"), type=dict[str, msgspec.Raw])
        fields = {key.removeprefix(f"{prefix}."): value for key, value in packed.items()}
        known = {name: fields[name] for name in _Adapter.__struct_fields__ if name in fields}
        adapter = msgspec.json.decode(msgspec.json.encode(known), type=_Adapter)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{label} has a broken {METADATA_KEY}: {error}") from error
    if adapter.use_dora or adapter.alpha_pattern:
        what = "use_dora" if adapter.use_dora else "alpha_pattern"
        raise BadCheckpoint(f"{label} uses {what} in its {METADATA_KEY}, which is not supported")
    return adapter


class _Names:
    """Finds the tensor that a key is for."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        both = itertools.chain.from_iterable((name, original_name("transformer", name) or name) for name in self._names)
        modules = {name.rpartition(".")[0] for name in both}
        self._flat = {module.replace(".", "_"): module for module in modules}

    def resolve(self, key: str) -> _Key | None:
        """Target and role of a key; None if it is for no tensor of the model."""
        for role, pattern in _ROLES:
            if match := pattern.search(key):
                module = self._module(key[: match.start()])
                target = None if module is None else self._target(module, _LEAVES.get(match[0], "weight"))
                return None if target is None else _Key(target, role)
        return None

    def _module(self, name: str) -> str | None:
        if name.startswith(KOHYA_PREFIX):
            return self._flat.get(name.removeprefix(KOHYA_PREFIX))
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        name = name.replace(".processor.", ".")
        return f"{name}.0" if name.endswith(".to_out") else name

    def _target(self, module: str, leaf: str) -> str | None:
        ours = f"{module}.{'scale_shift_table' if leaf == 'modulation' else leaf}"
        for name in (ours, our_name("transformer", f"{module}.{leaf}")):
            if name in self._names:
                return name
        return None
