"""Which device each process computes on, which of them take turns there, and with how many threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from engine.cuda import VARIABLES, visible_devices
from engine.params import SystemParams
from ipc.errors import BadConfig
from ipc.messages.names import Seat, StageName, stage_of

log = logging.getLogger(__name__)


def compute_dtype(params: SystemParams, device: str) -> str:
    """What the linears of all stages on such a device compute in."""
    return params.dtype if params.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"


def resolve_devices(params: SystemParams) -> tuple[str, tuple[str, ...]]:
    """The device of text and vae, and that of each dit. `BadConfig` if they do not go together."""
    dits = tuple(resolve_device(device) for device in params.dit_devices)
    device = dits[0] if dits and params.device == "auto" else resolve_device(params.device)
    if params.placement == "fused" and dits not in ((), (device,)):
        raise BadConfig(
            f"placement fused is one process with one dit on {device}, but dit_devices are {', '.join(dits)}; use "
            "placement split, or leave dit_devices out"
        )
    if twice := [name for name in dits if name != "cpu" and dits.count(name) > 1]:
        raise BadConfig(f"dit_devices names {twice[0]} twice, where two would only take turns; name each GPU once")
    if len({name.partition(":")[0] for name in (device, *dits)}) > 1:
        raise BadConfig(
            f"device is {device} and dit_devices are {', '.join(dits)}; results differ between CPU and GPU, so name "
            "devices of one kind"
        )
    return device, dits or (device,)


def resolve_device(device: str) -> str:
    """`auto` becomes the first CUDA device, else the CPU; the stages number them in the same way."""
    if device == "cpu":
        return device
    count = len(visible_devices())
    if device == "auto":
        return "cuda:0" if count else "cpu"
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise BadConfig(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    if int(index or 0) >= count:
        raise BadConfig(f"device is {device!r}, but CUDA shows {count} devices{_shown_by()}; cpu always works")
    return f"cuda:{int(index or 0)}"


def _shown_by() -> str:
    """What hides others, if something might."""
    named = [f"{name}={os.environ[name]!r}" for name in VARIABLES[:1] if name in os.environ]
    return f" with {named[0]}" if named else " on this machine"


def devices_of_seats(device: str, dit_devices: tuple[str, ...]) -> dict[Seat, str | None]:
    """Every seat of an engine and its device; the writer has none."""
    dits = {"dit" if number == 0 else f"dit:{number}": where for number, where in enumerate(dit_devices)}
    return {"text": device, **dits, "vae": device, "writer": None}


def compute_tokens(params: SystemParams, devices: Mapping[Seat, str | None]) -> dict[Seat, str | None]:
    """The compute token each seat needs, for the scheduler.

    On a GPU all model stages take turns: two processes computing at once gain nothing. On a CPU the text encoder, small
    and on one thread, runs beside the others, and so do the dits, each with its own token, and the vae where there are
    threads for all; else it takes turns with the first dit. One fused process is one token.
    """
    if params.placement == "fused":
        return dict.fromkeys(devices, "process")
    if devices["dit"] != "cpu":
        return dict(devices)
    dits: dict[Seat, str | None] = {seat: f"cpu:{seat}" for seat in devices if stage_of(seat) == "dit"}
    threads = compute_threads(params, len(dits))
    vae = "cpu:vae" if len(dits) * threads["dit"] + threads["vae"] <= _cores() else "cpu:dit"
    return {"text": None, **dits, "vae": vae, "writer": None}


def compute_threads(params: SystemParams, dits: int) -> dict[StageName, int]:
    """Compute threads of each process; the same for every dit, as they are part of the result's identity."""
    given, half = params.threads, _cores() // 2
    return {"text": 1, "dit": given or max(1, half // dits), "vae": given or max(1, half), "writer": 1}


def warn_of_threads(threads: int) -> None:
    """Say so if a process is to compute with more threads than there are cores, which makes nothing faster.

    Refused is none up to the 1,024 of `SystemParams`, whatever the machine: the number is part of a result's identity,
    so a result of a larger machine can be made again on this one only with as many.
    """
    if threads > (cores := _cores()):
        log.warning(
            "threads is %d, but the engine may use %d core%s: results are those of %d threads, and come no sooner "
            "than with %d",
            threads, cores, "" if cores == 1 else "s", threads, cores,
        )  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0))
