"""Stage process to supervisor."""

from __future__ import annotations

from typing import Any

import msgspec

from ipc.errors import Failure
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import AttentionBackend, KernelKind, Phase, StageName
from ipc.messages.status import Copied
from ipc.messages.weights import WeightVersion


class StageReport(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    pass


class Loading(StageReport, frozen=True, tag="loading", kw_only=True):
    """Sent a few times a second while weights are read: `done` of `total` bytes of the component's files."""

    component: str
    done: int
    total: int


class Placed(StageReport, frozen=True, tag="placed", kw_only=True):
    """A component was read into memory that outlives this process; its descriptor comes with the message."""

    version: WeightVersion
    device: str
    """As the processes that compute there are told: cpu, cuda:0."""


class Unlocked(StageReport, frozen=True, tag="unlocked", kw_only=True):
    """The pages of a version in host memory could not be locked for the GPU of this process, which copies from it more
    slowly, and waits for it."""

    component: str
    content: str
    why: str
    """What the driver says."""


class Chosen(StageReport, frozen=True, tag="chosen", kw_only=True):
    """What the dit will compute with, before it reads its weights. Every dit after it is told to use the same, so that
    a result does not depend on which process came to it, or how often one was started."""

    attention: AttentionBackend
    kernels: KernelKind


class VaeChosen(StageReport, frozen=True, tag="vae_chosen", kw_only=True):
    """As `Chosen`, of the vae."""

    kernels: KernelKind


class Ready(StageReport, frozen=True, tag="ready", kw_only=True):
    """All stages of this process are loaded. `weights` maps component -> content hash (hex); `threads` is what each
    stage computes on."""

    epoch: int
    seconds: float
    weights: dict[str, str]
    versions: dict[str, str]
    threads: dict[StageName, int]


class StartFailed(StageReport, frozen=True, tag="start_failed", kw_only=True):
    """The process cannot become these stages and leaves."""

    error: Failure


class Parts(msgspec.Struct, frozen=True):
    """How far a phase of a task is whose work is not cut into its quanta: `done` of `total` parts of all of it. While
    some are left, each quantum does one and leaves nothing behind; then they leave what they are for."""

    done: int
    total: int

    @property
    def left(self) -> int:
        return self.total - self.done


class QuantumDone(StageReport, frozen=True, tag="done", kw_only=True):
    """The quantum began at `begin`, of the machine's monotonic clock, and computed for `seconds`. The last `write`
    carries the file's `metadata`. With `parts` left the quantum is unfinished: it is to be granted again."""

    id: str
    phase: Phase
    index: int
    begin: float
    seconds: float
    metadata: dict[str, Any] | None = None
    parts: Parts | None = None
    copied: Copied | None = None
    delivered: Copied | None = None
    """The copy of what it made, if that waited for the end of the quantum."""


class PlacingFile(StageReport, frozen=True, tag="placing_file", kw_only=True):
    """The writer has the task's file whole and on the disk, and gives it its name now. What it says before it dies is
    heard: without this the file is not there."""

    id: str


class QuantumFailed(StageReport, frozen=True, tag="failed", kw_only=True):
    """This request failed; the stage goes on. Times as in `QuantumDone`."""

    id: str
    phase: Phase
    index: int
    begin: float
    seconds: float
    error: Failure


class QuantumDropped(StageReport, frozen=True, tag="quantum_dropped", kw_only=True):
    """The quantum was not run because its task had been dropped."""

    id: str
    phase: Phase
    index: int


class Dropped(StageReport, frozen=True, tag="dropped", kw_only=True):
    id: str
    stage: StageName


class Adopted(StageReport, frozen=True, tag="adopted", kw_only=True):
    """A version is mapped and is what it is said to be; or `error` says why not, and it is not known here."""

    component: str
    content: str
    device: int | None = None
    """Where it is placed, as `WeightVersion.device`."""
    error: Failure | None = None


class MemorySet(StageReport, frozen=True, tag="memory_set", kw_only=True):
    """The plan that holds from now on, which with an `error` is the one before. What the device has of the weights,
    in memory that outlives the process, was sent before (`Placed`); of what is named in `left`, component and content
    hash, nothing of this process is mapped there any more."""

    plan: MemoryPlan
    left: list[tuple[str, str]] = []
    seconds: float = 0.0
    error: Failure | None = None


class Rehearsed(StageReport, frozen=True, tag="rehearsed", kw_only=True):
    """The process could take over, or `error` says why not."""

    error: Failure | None = None


class ForksReady(StageReport, frozen=True, tag="forks_ready", kw_only=True):
    """Others can be forked from this process."""


class Forked(StageReport, frozen=True, tag="forked", kw_only=True):
    """There is a new process, whose parent has ended."""

    pid: int


class ForkRefused(StageReport, frozen=True, tag="fork_refused", kw_only=True):
    """The system has started no process: its error number, and its words. The next `Fork` may be granted."""

    number: int
    reason: str


AnyStageReport = (
    ForksReady
    | Forked
    | ForkRefused
    | Loading
    | Placed
    | Unlocked
    | Chosen
    | VaeChosen
    | Ready
    | StartFailed
    | PlacingFile
    | QuantumDone
    | QuantumFailed
    | QuantumDropped
    | Dropped
    | Adopted
    | MemorySet
    | Rehearsed
)
