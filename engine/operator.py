"""What an operator gives on the command line, made into messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast, get_args

import msgspec

from engine.client import absolute_params
from engine.decode import decode_strictly
from engine.params import UserParams
from hotreload.lora_options import EXTENSION, check_paths, parse_lora
from ipc.errors import BadConfig, BadRequest
from ipc.messages.client import Canary, When
from ipc.messages.names import MemoryLevel, StageName


class CanaryFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As `Canary`, with the request as an object, and the reference relative to the file. Paths of the request are
    relative to the current directory, as everywhere."""

    params: dict[str, object]
    reference: str | None = None
    psnr: float = 30.0


def read_canary(file: Path) -> Canary:
    """`BadConfig` for a file that is none, `BadRequest` for a request that is none."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=CanaryFile)
    except (OSError, msgspec.DecodeError) as error:
        raise BadConfig(f"the canary {file.name} cannot be read: {error}") from error
    params = absolute_params(decode_strictly(UserParams, found.params, BadRequest, "the canary"))
    if found.reference is not None and params.seed is None:
        raise BadConfig(f"the canary {file.name} has a reference and no seed: name the seed that the reference has")
    reference = None if found.reference is None else str((file.parent / found.reference).absolute())
    return Canary(params=msgspec.Raw(msgspec.msgpack.encode(params)), reference=reference, psnr=found.psnr)


def check_of_weights(options: Mapping[str, object]) -> None:
    """`BadConfig` if one of these is given where no weights are to be reloaded: it would mean nothing there."""
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
        verb = "is" if len(given) == 1 else "are"
        raise BadConfig(f"{' and '.join(given)} {verb} of weights: say where they are, with --checkpoint DIR")


def read_components(names: Iterable[str]) -> tuple[str, ...]:
    """The names; none, which means all, if `all` is one of them."""
    found = tuple(names)
    return () if "all" in found else found


def read_when(text: str) -> When:
    """`BadConfig` for what is none."""
    if text not in get_args(When):
        raise BadConfig(f"--when is {text!r}; it must be {', '.join(get_args(When))}")
    return cast(When, text)


def read_stages(names: Iterable[str]) -> list[StageName]:
    """`BadConfig` for a name that is none."""
    stages: list[StageName] = []
    for name in names:
        if name not in get_args(StageName):
            raise BadConfig(f"--stage is {name!r}; it must be {', '.join(get_args(StageName))}")
        stages.append(cast(StageName, name))
    return stages


def read_level(text: str) -> MemoryLevel:
    """`BadConfig` for what is none."""
    levels = {str(level): level for level in get_args(MemoryLevel)}
    if text not in levels:
        raise BadConfig(f"the memory level is {text!r}; it must be {', '.join(levels)}")
    return cast(MemoryLevel, levels[text])


def read_lora_files(text: str) -> tuple[str, ...]:
    """FILE or HIGH_FILE,LOW_FILE. `BadConfig` for what is neither."""
    option = parse_lora(text)
    if not text.strip().endswith(EXTENSION):
        raise BadConfig(
            f"LoRA {text!r}: requests choose the strength (engine generate --lora NAME:STRENGTH); leave it out"
        )
    check_paths(option)
    return option.files
