"""What the engine tells of itself: tasks, quanta, memory, queues, versions."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ipc.errors import Failure
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import Phase, Seat


class TaskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `engine list`. Times are seconds since the epoch."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    phase: Phase | Literal["queued"]
    step: int
    steps: int
    priority: int
    submitted_at: float
    prompt: str
    path: str
    error: Failure | None = None


class Copied(msgspec.Struct, frozen=True, array_like=True):
    """What was copied from host memory to a device, or from there, beside what is computed. Times as in `Span`."""

    begin: float
    """Of the first copy."""
    end: float
    """Of the last."""
    seconds: float
    """In which something was copied."""
    bytes: int


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One quantum, run to its end or to its failure. Times are seconds of the machine's monotonic clock."""

    task: str
    seat: Seat
    device: str | None
    """The compute token that it ran with: one quantum at a time has it. None: it needed none."""
    phase: Phase
    index: int
    granted: float
    """The supervisor sent it to the stage process then."""
    begin: float
    end: float
    failed: bool = False
    copied: Copied | None = None
    """Of the weights that it needed, or the next one needs; done when it ended."""
    delivered: Copied | None = None
    """What it made, to where it is read; perhaps while the next one computed."""


class MemoryChange(msgspec.Struct, frozen=True, kw_only=True):
    """A memory plan that was to take the place of another on a device. With an `error`, the one before holds."""

    at: float
    """Seconds of the machine's monotonic clock."""
    device: str
    before: MemoryPlan
    after: MemoryPlan
    why: str
    seconds: float
    """Until every process of the device kept to it, or it had failed."""
    error: Failure | None = None


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the weights is on a device. `mode`: auto, whatever fits; fixed, what the operator asked for."""

    device: str
    plan: MemoryPlan
    mode: Literal["auto", "fixed"]
    levels: list[int]
    """That hold from the next quantum on when they are asked for; the others need copies in host memory first."""
    budget: int | None
    """Bytes of the device that the engine may take; None: all that are free."""
    copies: HostCopies
    slow: str = ""
    """That the pages of weights in host memory could not be locked for this device, so that copies from there are slow,
    and what to change; empty if they could."""
    last: MemoryChange | None
    sample: dict[str, Any] | None = None
    """What was last seen of this machine's memory (`engine/monitor.py`); None: it is not looked at."""


class HostCopies(msgspec.Struct, frozen=True, kw_only=True):
    """The copies of the weights in host memory, which the levels from 2 on need. `state`: complete; reading; none: not
    wanted so far, or there can be none, and `problem` says why. `done` of `total` bytes."""

    state: Literal["complete", "reading", "none"]
    done: int = 0
    total: int = 0
    problem: str = ""


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a component's weights is loaded, in bytes of its files."""

    component: str
    done: int
    total: int


class StageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: starting, up, restarting, failed, stopped. `restarts`: that nobody asked for; `engine reload --stage` is
    none. `loading`: while it starts, what it reads just now."""

    name: Seat
    state: Literal["starting", "up", "restarting", "failed", "stopped"]
    pid: int | None
    device: str
    epoch: int
    restarts: int
    resident_bytes: int
    busy_seconds: float
    quanta: int
    loading: LoadProgress | None = None
    computes: dict[str, str] = {}
    """What results depend on, of the process that is up: attention, kernels, versions of libraries, threads."""


class QueueStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one `TensorQueue` since it was made. `depth` counts slots that are not FREE."""

    name: str
    slots: int
    slot_bytes: int
    depth: int
    peak: int
    puts: int
    bytes: int


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of memory that outlives the stages, and who has it."""

    name: str
    """A queue, "states", or a component's weights."""
    where: str
    """host, or gpu and its number."""
    state: Literal["writing", "ready", "reading", "taken", "placed"]
    bytes: int
    slot: int | None = None
    task: str | None = None
    sequence: int | None = None
    writer: int | None = None
    """Epoch of the process that wrote it, or has the state."""
    reader: int | None = None
    """Epoch of the process that is reading it."""
    generation: str = ""
    """Of weights: their content hash; of a state: how often it was committed."""


class VersionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a component's weights. `state`: serving; previous: what a rollback returns to; draining: only tasks
    that began with it use it. `placed`: devices where it is in memory; none: it would be read again."""

    component: str
    content: str
    source: str
    """The directory it was read from, by its last name."""
    state: Literal["serving", "previous", "draining"]
    placed: list[str]
    bytes: int
    served: int
    """Videos made with it."""
    running: int
    """Tasks that use it."""


class LoraInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that requests can name, or, `draining`, that only accepted ones still use. `reading`: a restarted
    engine reads it again; requests can name it and wait for that, `rank`, `tensors` and `bytes` are 0 until then."""

    name: str
    state: Literal["loaded", "draining", "reading"]
    files: list[str]
    """Without the directories they are in."""
    content: dict[str, str]
    """Component -> hash of what is added to it."""
    rank: int
    """The highest of its pairs; 0: it has none, but whole differences."""
    tensors: int
    """That it adds to, of all components."""
    bytes: int
    running: int
    """Unfinished requests that use it."""


class MergedLora(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA that is merged into a component; `file` without the directories it is in."""

    component: str
    file: str
    strength: float


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    model: str
    pid: int
    uptime_seconds: float
    accepting: bool
    waiting: int
    running: int
    finished: int
    failed: int
    resident_bytes: int
    stages: list[StageStatus]
    queues: list[QueueStatistics]
    outliving: Literal["host", "gpu", "no"]
    """Where weights and states are that outlive the stages; "no": on a GPU whose driver has no such memory."""
    spare_pid: int | None
    """The process that is ready to take the place of a stage that dies, if there is one."""
    forks_pid: int | None = None
    """The process that stages are forked from, if there is one."""
    weights: dict[str, str] = {}
    """Component -> content hash, of what is loaded."""
    loras: list[MergedLora] = []
    memory: list[DeviceMemory] = []
    """Of each device that a stage computes on."""
