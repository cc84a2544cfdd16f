"""What the scheduler is told and what it asks for: its whole interface.

A `stage` is the seat of one process: "text", "dit", "vae", "writer", and "dit:1", "dit:2", ... where there are several
dits. Times are seconds of a monotonic clock, given by the caller. Everything is plain data, so that a history can be
generated, recorded and replayed.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ipc.errors import Failure
from ipc.messages.names import Phase, Seat, StageName
from ipc.messages.reports import Parts


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler needs to know of a task: its quanta per phase and who goes first.

    `text` has 1 quantum, `encode` 1 (with an init video) or 0, `denoise` one per step, `decode` one per chunk of frames
    and `write` one per chunk; write k needs decode k. Of a phase that a stage does in `Parts`, which only the stage
    knows, unfinished quanta come before these and are granted again. `cost` is the estimated work of one quantum of
    each phase in seconds on this machine, refined by what is measured.
    """

    id: str
    encode: bool
    denoise: int
    chunks: int
    priority: int = 0
    deadline: float | None = None
    """On the scheduler's clock; the task fails when it passes."""
    cost: dict[Phase, float]


# Events.


class Submitted(msgspec.Struct, frozen=True):
    task: TaskSpec


class CancelAsked(msgspec.Struct, frozen=True):
    """The client (or the embedding service) no longer wants the task; `error` is how it ends."""

    id: str
    error: Failure


class StageUp(msgspec.Struct, frozen=True):
    """A process for this stage is loaded and knows no task.

    `epoch` names the process and grows: stages that share one have the same, no other process has it."""

    stage: Seat
    epoch: int


class StageLost(msgspec.Struct, frozen=True):
    """The stage's process is dead and reaped (also one that never came up), with all stages of the same epoch, and the
    supervisor has given back the queue slots it was writing or reading. Whatever was granted to it and not reported
    will never be.

    `outside`: it was killed by somebody, not by its own doing, by lack of memory, or by the engine because it hung.
    `asked`: it left because another process takes its place."""

    stage: Seat
    epoch: int
    outside: bool = False
    asked: bool = False


class StageGone(msgspec.Struct, frozen=True):
    """The stage's process could not be started at all (bad checkpoint, missing library): restarting cannot help."""

    stage: Seat
    error: Failure


class QuantumEnded(msgspec.Struct, frozen=True):
    """A granted quantum was answered. `seconds` is its compute time; an `error` fails the task; `dropped` means it was
    skipped because the task had been dropped; with `parts` left it is unfinished."""

    stage: Seat
    epoch: int
    id: str
    phase: Phase
    index: int
    seconds: float = 0.0
    error: Failure | None = None
    dropped: bool = False
    parts: Parts | None = None


class Placing(msgspec.Struct, frozen=True):
    """The writer begins to give the task's file its name: from now on it may be there. Always heard before that
    process's death."""

    stage: Seat
    epoch: int
    id: str


class TaskDropped(msgspec.Struct, frozen=True):
    """The stage has forgotten the task and freed its slots."""

    stage: Seat
    epoch: int
    id: str


class LevelChanged(msgspec.Struct, frozen=True):
    """The process at a seat keeps `level` from now on, and may be asked for more of them, up to `top`. The higher, the
    less of its device's memory it takes. Until this is said, both are 0."""

    stage: Seat
    level: int
    top: int


class TokensChanged(msgspec.Struct, frozen=True):
    """The seats need other compute tokens from now on (`Capacity.devices`), as the processes to come are others. Said
    while none is up."""

    devices: dict[Seat, str | None]


class Tick(msgspec.Struct, frozen=True):
    """Nothing happened but time: deadlines and ageing are looked at."""


Event = (
    Submitted | CancelAsked | StageUp | StageLost | StageGone | QuantumEnded | Placing | TaskDropped | LevelChanged
    | TokensChanged | Tick
)  # fmt: skip


# Actions.


class BeginTask(msgspec.Struct, frozen=True):
    """Send the job to this stage's process; comes before the first `Grant` there (again after a restart)."""

    stage: Seat
    id: str


class Grant(msgspec.Struct, frozen=True):
    """Run this quantum. The stage answers grants in order."""

    stage: Seat
    id: str
    phase: Phase
    index: int


class DropTask(msgspec.Struct, frozen=True):
    """Make this stage forget the task."""

    stage: Seat
    id: str


class Purge(msgspec.Struct, frozen=True):
    """Free all that is held of this task for this stage, whatever its state and whichever seat: the slots of the queues
    it consumes, and the state slot if it is the dit. The process that had it died, or none was ever told of the task,
    so it cannot free them itself; whoever fills those queues has nothing of the task in hand."""

    stage: StageName
    id: str


class Restart(msgspec.Struct, frozen=True):
    """Start a new process for this stage, after `delay` seconds."""

    stage: Seat
    delay: float


class RaiseLevel(msgspec.Struct, frozen=True):
    """A quantum there had not enough memory: have the seat keep a level above `level`. `LevelChanged` answers, also if
    that cannot be: then its `top` is no higher than what holds. May be asked again before it is answered."""

    stage: Seat
    level: int


class Report(msgspec.Struct, frozen=True):
    """Tell whoever listens: `step` of `steps` of `phase` is done; about `seconds_left` until the video is."""

    id: str
    phase: Phase | Literal["queued"]
    step: int
    steps: int
    seconds_left: float | None


class Finish(msgspec.Struct, frozen=True):
    """The file is complete: the task is done."""

    id: str


class Fail(msgspec.Struct, frozen=True):
    """The task ends without a file."""

    id: str
    error: Failure


class DeclareFailed(msgspec.Struct, frozen=True):
    """The stage died too often: it is FAILED, and is not started again."""

    stage: Seat
    error: Failure


Action = BeginTask | Grant | DropTask | Purge | Restart | RaiseLevel | Report | Finish | Fail | DeclareFailed


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds the scheduler keeps to, all of them: slots of each queue, the seats, and which of them share a device.

    `devices[seat]` names the compute token the stage there must hold to run a quantum; None: it needs none (the
    writer). Every stage has one seat; the dit may have more.
    """

    devices: dict[Seat, str | None]
    prompts: int
    """Tasks whose prompt embeddings may be held for the dit stage (queue `prompts`, text -> dit)."""
    init_latents: int
    """Tasks whose encoded init video may be held (queue `init_latents`, vae -> dit)."""
    states: int
    """Tasks in the middle of denoising (DiT state slots)."""
    latents: int
    """Tasks whose denoised latents may be held for the vae stage (queue `latents`, dit -> vae)."""
    frames: int
    """Chunks of frames between vae and writer (queue `frames`)."""
