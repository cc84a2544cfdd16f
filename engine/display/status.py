"""What an engine does and has: `engine status`, `engine list`, `engine memory`."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from engine.amounts import said_blocks, seconds, size
from engine.display.tables import print_table
from ipc.messages.status import (
    DeviceMemory,
    EngineStatus,
    Holding,
    MemoryChange,
    StageStatus,
    TaskInfo,
)


def print_tasks(tasks: Sequence[TaskInfo]) -> None:
    """`engine list`."""
    now = time.time()
    rows = [
        (
            task.id[:8],
            task.state,
            f"{task.phase} {task.step}/{task.steps}" if task.state == "running" else "",
            f"{seconds(max(0.0, now - task.submitted_at))} ago",
            task.prompt if len(task.prompt) <= 48 else task.prompt[:47] + "\u2026",
            task.error.message if task.error is not None else task.path,
        )
        for task in tasks
    ]
    print_table(("id", "state", "step", "submitted", "prompt", "video"), rows)


def state(stage: StageStatus) -> str:
    """Of a stage that starts: what it loads, and how much of it is there."""
    loading = stage.loading
    if loading is None or loading.done >= loading.total:
        return stage.state
    return f"loading {loading.component} {100 * loading.done // loading.total} %"


OUTLIVING = {
    "host": "weights and states outlive the stages in host memory",
    "gpu": "weights and states outlive the stages in GPU memory",
    "no": "weights do not outlive the stages: this GPU's driver has no memory that does",
}


def print_status(status: EngineStatus) -> None:
    """`engine status`."""
    accepting = "accepting requests" if status.accepting else "stopping"
    up = seconds(status.uptime_seconds)
    print(
        f"engine {status.engine} with {status.model}, pid {status.pid}, up {up}, {accepting}\n"
        f"{status.running} running, {status.waiting} waiting, {status.finished} done, {status.failed} failed; "
        f"supervisor {size(status.resident_bytes)}\n"
        f"{OUTLIVING[status.outliving]}{f', spare process {status.spare_pid}' if status.spare_pid else ''}"
        f"{f', stages are forked from process {status.forks_pid}' if status.forks_pid else ''}\n"
    )
    stages = [
        (
            s.name,
            state(s),
            s.pid or "-",
            s.device,
            s.restarts,
            size(s.resident_bytes),
            seconds(s.busy_seconds),
            s.quanta,
            s.computes.get("threads", "-"),
            s.computes.get("attention", "-"),
        )
        for s in status.stages
    ]
    columns = ("stage", "state", "pid", "device", "restarts", "memory", "busy", "quanta", "threads", "attention")
    print_table(columns, stages)
    print()
    queues = [
        (q.name, f"{q.depth}/{q.slots}", q.peak, q.puts, size(q.bytes), size(q.slot_bytes)) for q in status.queues
    ]
    print_table(("queue", "depth", "peak", "puts", "passed", "slot"), queues)
    if any(device.device != "cpu" or device.plan.level for device in status.memory):
        print()
        print_plans(status.memory)
    if status.weights:
        print()
        weights = [(name, content, loras(status, name) or "-") for name, content in status.weights.items()]
        print_table(("weights", "content hash", "LoRAs"), weights)


READY = (
    "ready levels: a change to one of these holds from the next step on. The others compute from copies of the weights "
    "in host memory, which are read first when such a level is asked for, unless the column of the copies says why not."
)


def print_memory_levels(devices: Sequence[DeviceMemory]) -> None:
    """`engine memory`: a row for each device, and below them what its levels are."""
    print_plans(devices)
    print(f"\n{textwrap.fill(READY, 100)}")


def print_plans(devices: Sequence[DeviceMemory]) -> None:
    """A row for each device; below them, of whose weights in host memory the pages could not be locked."""
    rows = [
        (d.device, level(d), mode(d), ", ".join(map(str, d.levels)), copies(d), used(d.sample), last_change(d.last))
        for d in devices
    ]
    columns = ("device", "memory level", "mode", "ready levels", "copies on the host", "GPU memory", "last change")
    print_table(columns, rows)
    for device in devices:
        if device.slow:
            print(f"\n{textwrap.fill(f'{device.device}: {device.slow}', 100)}")


def level(device: DeviceMemory) -> str:
    plan = device.plan
    return str(plan.level) + (
        "" if plan.blocks is None else f", {said_blocks(plan.blocks)} stay{'s' if plan.blocks == 1 else ''}"
    )


def mode(device: DeviceMemory) -> str:
    """Who chooses the level, and within what."""
    return device.mode + ("" if device.budget is None else f", budget {size(device.budget)}")


def copies(device: DeviceMemory) -> str:
    """How far they are, or why there are none."""
    found = device.copies
    if found.state == "reading":
        return f"{size(found.done)} of {size(found.total)}"
    return found.problem or found.state


def used(sample: Mapping[str, Any] | None) -> str:
    """What was last seen of a GPU."""
    if sample is None or sample["total"] is None:
        return "-"
    parts = [("ours", sample["ours"]), ("others'", sample["others"]), ("free", sample["free"])]
    return ", ".join(f"{size(amount)} {whose}" for whose, amount in parts if amount is not None)


def last_change(change: MemoryChange | None) -> str:
    if change is None:
        return "-"
    failed = "" if change.error is None else f"; failed: {change.error.message}"
    return f"{change.before.level} to {change.after.level} in {seconds(change.seconds)}: {change.why}{failed}"


def loras(status: EngineStatus, component: str) -> str:
    """What is merged into a component."""
    return ", ".join(f"{lora.file}:{lora.strength:g}" for lora in status.loras if lora.component == component)


def print_memory(held: Sequence[Holding]) -> None:
    """`engine status --memory`."""
    rows = [
        (
            h.name, h.where, "-" if h.slot is None else h.slot, h.state, size(h.bytes), h.task[:8] if h.task else "-",
            "-" if h.sequence is None else h.sequence, h.writer or "-", h.reader or "-", h.generation[:12] or "-",
        )
        for h in held
    ]  # fmt: skip
    columns = ("memory", "where", "slot", "state", "bytes", "task", "sequence", "writer", "reader", "generation")
    print_table(columns, rows)
