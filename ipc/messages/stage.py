"""Supervisor to stage process. Descriptors travel beside the message."""

from __future__ import annotations

from typing import Literal

import msgspec

from ipc.architecture import Conditioning, ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan, QueueSpec, StateSpec
from ipc.messages.names import AttentionChoice, KernelKind, Phase, StageName
from ipc.messages.weights import Component, WeightVersion


class StageProcessMessage(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    pass


class Prepare(StageProcessMessage, frozen=True, tag="prepare", kw_only=True):
    """The first message to a spare process: load the libraries and wake the device, then wait for `Start`, or for the
    end."""

    supervisor_pid: int
    device: str


class ServeForks(StageProcessMessage, frozen=True, tag="serve_forks", kw_only=True):
    """The first message to a process that others are forked from: load the libraries, say `ForksReady`, and touch no
    device."""

    supervisor_pid: int


class Fork(StageProcessMessage, frozen=True, tag="fork", kw_only=True):
    """To that process: fork one that takes its first message from the channel whose end comes along. `Forked` or
    `ForkRefused` answers."""


class Start(StageProcessMessage, frozen=True, tag="start", kw_only=True):
    """The first message to a process, but for a spare: become these stages. The writer has no device.

    Descriptors, in this order: the progress counter's memfd; those of each queue; those of the state slots; one of each
    placed component.
    """

    stages: list[StageName]
    number: int = 0
    """Which of several dits this is; 0 for all else."""
    epoch: int
    supervisor_pid: int
    model: str
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None
    conditioning: Conditioning
    boundary: float | None
    components: list[Component]
    tokenizer: str
    devices: dict[StageName, str]
    threads: dict[StageName, int]
    dtype: str
    decode_latents: int
    """Latent frames per `decode` quantum: chunk k covers latent frames [k * n, (k + 1) * n)."""
    queues: list[QueueSpec]
    """Only those this process takes part in, in the order prompts, init_latents, latents, frames."""
    state: StateSpec | None
    """With the dit stage only."""
    placed: list[WeightVersion] = []
    """Weights of these stages that are in memory already: bind to them instead of reading files."""
    serving: dict[str, str] = {}
    """Component -> content hash of the version, among `placed`, that new tasks get."""
    outliving: bool = True
    """Weights that are read go to memory that outlives the process; False where the GPU's driver has none."""
    attention: AttentionChoice = "auto"
    """auto: the dit tests and times them, and answers with `Chosen`. Another one gives other bits."""
    kernels: Literal["auto", KernelKind] = "auto"
    vae_kernels: Literal["auto", KernelKind] = "auto"
    """auto: the vae tests them, and answers with `VaeChosen`. torch is float32; the two give other bits."""
    memory: MemoryPlan = MemoryPlan()
    """What to begin with. From level 2 on, weights that are read go to host memory, and `placed` are there."""
    limits: dict[StageName, int] = {}
    """Bytes of the device that the process of each stage may allocate, beside weights and queues behind descriptors;
    more is out of memory. One that is missing: no limit."""


class Rehearse(StageProcessMessage, frozen=True, tag="rehearse", kw_only=True):
    """To a process that is to take the place of another, which goes on meanwhile: build the stages of `start`, which
    has no queues and no state, compute something small with each, forget it all, and wait for the real `Start`.
    `Rehearsed` answers. Descriptors: one of each placed component."""

    start: Start


class Begin(StageProcessMessage, frozen=True, tag="begin", kw_only=True):
    """Know this job on this stage; its quanta follow. Sent before the stage's first `Run` of the job, and again to a
    new process, or when its `changes` grow; forgotten at the `Drop` of the same stage."""

    stage: StageName
    job: Job
    adapters: list[WeightVersion] = []
    """To the dit: what `job.loras` add to each component; their descriptors come along, in this order."""


class Run(StageProcessMessage, frozen=True, tag="run", kw_only=True):
    """Run one quantum. Exactly one of QuantumDone, QuantumFailed, QuantumDropped answers it, in order."""

    id: str
    phase: Phase
    index: int
    seconds: dict[Phase, float] | None = None
    """With the last `write`: the time per phase so far, for the metadata."""


class Drop(StageProcessMessage, frozen=True, tag="drop", kw_only=True):
    """Forget this task: skip its queued quanta, free its input slots and its state. `Dropped` answers."""

    id: str
    stage: StageName


class Stop(StageProcessMessage, frozen=True, tag="stop", kw_only=True):
    """Leave after the quantum in hand."""


class Adopt(StageProcessMessage, frozen=True, tag="adopt", kw_only=True):
    """Map one more version of a component; its descriptor comes along. `Adopted` answers."""

    version: WeightVersion


class Forget(StageProcessMessage, frozen=True, tag="forget", kw_only=True):
    """Unmap a version of a component, which no task needs any more. Nothing answers."""

    component: str
    content: str


class SetMemory(StageProcessMessage, frozen=True, tag="set_memory", kw_only=True):
    """Between two quanta, in its turn: keep so much on the device from now on, and allocate no more than `limits`.
    `MemorySet` answers. A level that needs weights in host memory comes after an `Adopt` of them there
    (`WeightVersion.device` None)."""

    plan: MemoryPlan
    limits: dict[StageName, int] = {}
    """As in `Start`."""


AnyStageProcessMessage = (
    ServeForks | Fork | Prepare | Rehearse | Start | Begin | Run | Drop | Adopt | Forget | SetMemory | Stop
)
