"""Server to client: what is answered, and what is told unasked."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ipc.errors import Failure
from ipc.messages.names import Phase
from ipc.messages.status import DeviceMemory, EngineStatus, Holding, LoraInfo, MemoryChange, Span, TaskInfo, VersionInfo


class ServerMessage(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """`ref` answers the message with that `ref`; events have none."""

    ref: int | None = None


class Welcome(ServerMessage, frozen=True, tag="welcome", kw_only=True):
    version: int
    engine: str
    model: str
    pid: int


class Accepted(ServerMessage, frozen=True, tag="accepted", kw_only=True):
    """The request is journalled and will be finished. `params` is the request with every default filled in."""

    id: str
    position: int
    params: dict[str, Any]


class Refused(ServerMessage, frozen=True, tag="refused", kw_only=True):
    """The message it answers was not carried out. `retry_after` (seconds) comes with `busy`."""

    error: Failure
    retry_after: float | None = None


class Ok(ServerMessage, frozen=True, tag="ok", kw_only=True):
    pass


class SupervisorReloaded(ServerMessage, frozen=True, tag="supervisor_reloaded", kw_only=True):
    """Said by the new program, once it has everything. `engine` is its version; `paused` the seconds for which nothing
    was answered."""

    engine: str
    paused: float


class TaskList(ServerMessage, frozen=True, tag="tasks", kw_only=True):
    """Oldest first. `omitted` tasks, finished ones first, did not fit into the frame; long prompts are shortened."""

    tasks: list[TaskInfo]
    omitted: int = 0


class TaskRows(ServerMessage, frozen=True, tag="tasks", kw_only=True):
    """A `TaskList` as the server sends it: its rows were encoded before."""

    tasks: list[msgspec.Raw]
    omitted: int = 0


class Status(ServerMessage, frozen=True, tag="status", kw_only=True):
    status: EngineStatus
    memory: list[Holding] = []


class Progress(ServerMessage, frozen=True, tag="progress", kw_only=True):
    """A quantum of this task ended: `step` of `steps` of `phase`; there are more of them where a clip is decoded or
    encoded in tiles, which shows with the first. `seconds_left` is None until it can be estimated."""

    id: str
    phase: Phase | Literal["queued"]
    step: int
    steps: int
    seconds_left: float | None = None
    memory_level: int = 0
    """That the stage of this phase keeps to at present."""


class Done(ServerMessage, frozen=True, tag="done", kw_only=True):
    """The file is complete at `path`. `metadata` is what is also inside the file."""

    id: str
    path: str
    metadata: dict[str, Any]


class Failed(ServerMessage, frozen=True, tag="failed", kw_only=True):
    """The task ended without a file."""

    id: str
    error: Failure


class Reloaded(ServerMessage, frozen=True, tag="reloaded", kw_only=True):
    """New tasks get these versions. `weights` and `unchanged` are component -> content hash: what is new, and what had
    the same content already. `running`: tasks that finish on other versions."""

    weights: dict[str, str]
    unchanged: dict[str, str] = {}
    bytes: int = 0
    """Placed anew."""
    seconds: float = 0.0
    """Reading and verifying."""
    running: int = 0
    dry_run: bool = False


class Replaced(ServerMessage, frozen=True, tag="replaced", kw_only=True):
    """`pids`: of the new processes, by seat. `seconds`: from the end of the old process until the new one was ready."""

    pids: dict[str, int]
    seconds: dict[str, float]


class VersionList(ServerMessage, frozen=True, tag="version_list", kw_only=True):
    versions: list[VersionInfo]


class Traced(ServerMessage, frozen=True, tag="traced", kw_only=True):
    """The latest quanta, in the order of their answers. `clock`: what the machine's monotonic clock, on which their
    times are, is behind the seconds since the epoch."""

    spans: list[Span]
    clock: float
    changes: list[MemoryChange] = []
    """The latest of the memory levels."""


class MemoryReport(ServerMessage, frozen=True, tag="memory_report", kw_only=True):
    devices: list[DeviceMemory]


class LoraList(ServerMessage, frozen=True, tag="loras", kw_only=True):
    loras: list[LoraInfo]


AnyServerMessage = (
    Welcome
    | Accepted
    | Refused
    | Ok
    | TaskList
    | Status
    | Progress
    | Done
    | Failed
    | Reloaded
    | Replaced
    | VersionList
    | SupervisorReloaded
    | Traced
    | MemoryReport
    | LoraList
)
TaskEvent = Progress | Done | Failed
