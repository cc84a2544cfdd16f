"""The model and its files, the memory of the queues and states, and the memory plan that each device begins with: from
what the operator asks for and what there is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import NamedTuple

from engine.amounts import said_blocks
from engine.checkpoint import open_model
from engine.device_memory import make_device_memory
from engine.devices import compute_dtype, devices_of_seats, resolve_devices, warn_of_threads
from engine.footprint import Bounds, Setting, allocation_limits, need, plan_for, refusal, usual_size
from engine.host_samples import HostSample, host_sample
from engine.memory import EngineMemory, device_sizes
from engine.models import load_model
from engine.monitor import HOST_RESERVE, SLACK, Sample, Sampler, why_no_copies
from engine.params import ModelParams, SystemParams, bytes_of
from engine.plans import HOST, Limits
from hotreload.checkpoint import Checkpoint
from ipc.channel import close_fds
from ipc.errors import BadConfig, BadRequest
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import MemoryLevel, StageName, stage_of
from ipc.payload import DeviceFd

log = logging.getLogger(__name__)

LEAST = MemoryPlan(level=3, blocks=0)
"""What takes the least of a GPU."""


class Opened(NamedTuple):
    """What is found before anything is started."""

    model: ModelParams
    device: str
    dit_devices: tuple[str, ...]
    checkpoint: Checkpoint


def look_up(params: SystemParams) -> Opened:
    """The model, its devices and its files. Raises `BadConfig` and `BadCheckpoint`."""
    model = load_model(params.model)
    device, dit_devices = resolve_devices(params)
    check_level(params, device)
    warn_of_threads(params.threads)
    return Opened(model, device, dit_devices, open_model(model, params))


def check_level(params: SystemParams, device: str) -> None:
    """`BadConfig` for a budget that is none, where there is nothing that it could be of, or beside a level that leaves
    no choice."""
    if params.gpu_budget is None:
        return
    bytes_of(params.gpu_budget)
    if device == HOST:
        raise BadConfig(f"gpu_budget is {params.gpu_budget}, but the engine computes on the CPU; leave it out")
    if params.memory_level != "auto":
        raise BadConfig(
            f"memory_level is {params.memory_level} and gpu_budget is {params.gpu_budget}; the level follows from the "
            "budget, so give one of them"
        )


def queues_on_device(params: SystemParams, device: str, dit_devices: tuple[str, ...]) -> bool:
    """The queues and states are in GPU memory, if it has such memory: not with dits on several GPUs, which reach those
    of the host, and not where the operator wants little of the GPU taken."""
    spare = params.gpu_budget is not None or params.memory_level in (2, 3)
    return set(dit_devices) == {device} and not spare


async def make_memory(
    params: SystemParams, model: ModelParams, device: str, dit_devices: tuple[str, ...]
) -> EngineMemory:
    """`BadConfig` if it cannot be had."""
    on = await _device_memory(model, device) if queues_on_device(params, device, dit_devices) else await _none(device)
    try:
        return EngineMemory(model, dits=len(dit_devices), device=on)
    except OSError as error:
        raise BadConfig(f"the shared memory of the engine cannot be made: {error.strerror}") from error


async def _device_memory(model: ModelParams, device: str) -> Mapping[str, DeviceFd] | None:
    """For the queues and the states; None without a GPU whose driver has such memory."""
    return None if device == HOST else await asyncio.to_thread(make_device_memory, device, device_sizes(model))


async def _none(device: str) -> Mapping[str, DeviceFd] | None:
    """As `_device_memory`, for queues and states in host memory: empty, or None."""
    made = None if device == HOST else await asyncio.to_thread(make_device_memory, device, {"test": 1})
    if made is None:
        return None
    close_fds(piece.fd for piece in made.values())
    return {}


def settings_of(params: SystemParams, device: str, dit_devices: tuple[str, ...], queues: bool) -> dict[str, Setting]:
    """Of each device that a stage computes on, what its memory depends on. `queues`: they are on the GPU."""
    dtype = compute_dtype(params, device)
    seats: dict[str, list[StageName]] = {}
    for seat, where in devices_of_seats(device, dit_devices).items():
        if where is not None:
            seats.setdefault(where, []).append(stage_of(seat))
    found = {}
    for where, stages in seats.items():
        processes = (1 if params.placement == "fused" else len(stages)) + (params.warm_spare and where == device)
        found[where] = Setting(
            dtype=dtype, processes=0 if where == HOST else processes, queues=queues and where == device,
            stages=tuple(dict.fromkeys(stages)),
        )  # fmt: skip
    return found


def limits_of(params: SystemParams, model: ModelParams, settings: Mapping[str, Setting]) -> Limits:
    """What the stages may allocate, if there is a budget."""
    if params.gpu_budget is None:
        return lambda device, plan: {}
    budget = bytes_of(params.gpu_budget)
    return lambda device, plan: allocation_limits(model, plan, settings[device], budget) if device in settings else {}


def plans_at_start(params: SystemParams, model: ModelParams, settings: Mapping[str, Setting]) -> dict[str, MemoryPlan]:
    """The plan of each device. Asks the driver's management library what is free."""
    return {device: _plan(params, model, device, setting) for device, setting in settings.items()}


def _plan(params: SystemParams, model: ModelParams, device: str, setting: Setting) -> MemoryPlan:
    if params.memory_level != "auto":
        plan = exact_plan(MemoryPlan(level=params.memory_level), model)
        if device != HOST:
            warn_of_host_memory(model, host_sample(), plan, setting)
        return plan
    if device == HOST:
        return MemoryPlan()
    sampler = Sampler(int(device.partition(":")[2]), lambda: ())
    try:
        sample = sampler.sample()
    finally:
        sampler.close()
    return fitting(model, sample, None if params.gpu_budget is None else bytes_of(params.gpu_budget), setting)


def warn_of_host_memory(model: ModelParams, host: HostSample, plan: MemoryPlan, setting: Setting) -> None:
    """Say so if the weights that an operator wants in host memory seem not to fit there. No refusal: they may be there
    already, kept for this engine by systemd."""
    amount = need(model, usual_size(model), plan, setting).host
    sample = Sample(at=0.0, host_available=host.available, pressure=host.pressure)
    if amount and (why := why_no_copies(sample, amount)):
        log.warning("memory level %d keeps the weights in host memory, and %s", plan.level, why)


def fitting(model: ModelParams, sample: Sample, budget: int | None, setting: Setting) -> MemoryPlan:
    """The lowest level at which a request of the usual size fits into what is free, and into the budget; if none does,
    what takes the least, since a smaller request may fit."""
    there = budget
    if sample.free is not None and sample.total is not None:
        # The queues are there already, and count as needed.
        queues = sum(device_sizes(model).values()) if setting.queues else 0
        free = sample.free + queues - int(sample.total * SLACK)
        there = free if there is None else min(there, free)
    if there is None:
        return MemoryPlan()
    host = None if sample.host_available is None else max(0, sample.host_available - HOST_RESERVE)
    bounds, size = Bounds(host=host), usual_size(model)
    plan = plan_for(model, size, there, setting, bounds)
    if plan is not None:
        return exact_plan(plan, model)
    log.warning("a request of the usual size does not fit: %s", refusal(model, size, there, setting, bounds))
    return exact_plan(LEAST, model) if bounds.allow(need(model, size, LEAST, setting)) else MemoryPlan(level=1)


def exact_plan(plan: MemoryPlan, model: ModelParams) -> MemoryPlan:
    """The same plan, always written the same way: with a number of blocks that the model has, at level 3 only."""
    blocks = min(plan.blocks or 0, model.transformer.num_layers) if plan.level == 3 else None
    return MemoryPlan(level=plan.level, blocks=blocks)


def asked_plan(level: MemoryLevel, blocks: int | None, model: ModelParams) -> MemoryPlan:
    """What an operator asks for; of auto, what it begins with. `BadRequest` for blocks that this model does not have,
    or at a level that has no use for them."""
    if blocks is not None and level != 3:
        raise BadRequest(f"blocks is {blocks} and the level {level}; blocks are of level 3, so leave them out")
    there = model.transformer.num_layers
    if blocks is not None and not 0 <= blocks <= there:
        raise BadRequest(
            f"blocks is {blocks}, but the DiT of {model.name} has {said_blocks(there)}; it must be from 0 to {there}"
        )
    return exact_plan(MemoryPlan(level=0 if level == "auto" else level, blocks=blocks), model)
