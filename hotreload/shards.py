"""The safetensors files of one network in a directory: a single file, or an index and the shards it names.

STEM.safetensors
STEM.safetensors.index.json, STEM-00001-of-00006.safetensors, ...    shards may end in -bf16.safetensors
STEM.fp16.safetensors, STEM.safetensors.index.fp16.json, ...         a variant, taken if it is the only one
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

import msgspec

from hotreload.files import small_json
from hotreload.shown import listed, shown
from ipc.errors import BadCheckpoint

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>[^/]*)\.safetensors")


MAX_INDEX = 64 << 20
"""Bytes. Wan's largest has 0.1 MB."""
MAX_SHARDS = 1000
"""Wan's largest model has 12, and each is compared with the files beside it."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def weight_files(root: Path, folder: str, stem: str) -> list[Path]:
    """The files of the network in `folder` of the checkpoint `root`. Raises `BadCheckpoint` if one is missing."""
    directory = root / folder
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    found = _candidates(directory, stem)
    usual = [name for name in (single, index) if name in found]
    chosen = usual or sorted(found)
    label = f"{folder}/" if folder else ""
    if not chosen:
        raise BadCheckpoint(f"the checkpoint lacks {label}{single} (or {index} and its shards)")
    if len(chosen) > 1:
        names = listed(f"{label}{shown(name)}" for name in chosen)
        raise BadCheckpoint(f"several files could be the weights: {names}; leave one of them")
    if chosen[0].endswith(".json"):
        return _indexed(directory, chosen[0], label)
    return found[chosen[0]]


def _candidates(directory: Path, stem: str) -> dict[str, list[Path]]:
    """What could be the weights: single files, indices, and (without an index) sets of shards, by a name for each."""
    names = sorted(path.name for path in directory.glob(f"{stem}*") if path.is_file())
    found: dict[str, list[Path]] = {name: [] for name in names if ".index" in name and name.endswith(".json")}
    sets: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for name in names:
        if match := _SHARD.fullmatch(name):
            sets[match["stem"], int(match["count"]), match["suffix"]].append(name)
        elif name.endswith(".safetensors"):
            found[name] = [directory / name]
    if not any(name.endswith(".json") for name in found):
        for (_, count, _), shards in sets.items():
            _check_complete(shards, count)
            found[shards[0]] = [directory / name for name in shards]
    return found


def _check_complete(shards: list[str], count: int) -> None:
    numbers = {int(name.rsplit("-of-", 1)[0][-5:]) for name in shards}
    if missing := sorted(set(range(1, count + 1)) - numbers):
        raise BadCheckpoint(
            f"the checkpoint lacks shards {listed(map(str, missing))} of {count} beside {shown(shards[0])}"
        )


def _indexed(directory: Path, index: str, label: str) -> list[Path]:
    try:
        names = sorted(set(small_json(directory / index, MAX_INDEX, _Index).weight_map.values()))
    except OSError as error:
        raise BadCheckpoint(f"{label}{shown(index)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadCheckpoint(f"{label}{shown(index)} is not an index: {error}") from error
    if not names:
        raise BadCheckpoint(f"{label}{shown(index)} names no shards")
    if len(names) > MAX_SHARDS:
        raise BadCheckpoint(f"{label}{shown(index)} names {len(names)} shards, expected at most {MAX_SHARDS}")
    beside = sorted(path for path in directory.iterdir() if path.suffix == ".safetensors" and path.is_file())
    return [_shard(beside, index, name, label) for name in names]


def _shard(beside: list[Path], index: str, name: str, label: str) -> Path:
    """The shard that an index names, or the same with a suffix: re-uploads in bf16 keep the index of the original."""
    if os.path.basename(name) != name or not name.endswith(".safetensors"):
        raise BadCheckpoint(
            f"{label}{shown(index)} names the shard '{shown(name)}'; it must be a .safetensors file beside it"
        )
    stem = name.removesuffix(".safetensors")
    for found in (
        [path for path in beside if path.name == name],
        [path for path in beside if path.name.startswith(f"{stem}-")],
    ):
        if len(found) == 1:
            return found[0]
    raise BadCheckpoint(f"the checkpoint lacks {label}{shown(name)}, which {shown(index)} names")
