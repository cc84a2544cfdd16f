"""Every message that crosses a process border.

Three conversations, each with its own closed set of tagged structs, encoded as MessagePack:

- a client and the server, over a stream socket in length-prefixed frames (`ipc/frames.py`, `docs/protocol.md`);
- the supervisor and a stage process, over a SOCK_SEQPACKET pair, file descriptors beside them (`ipc/channel.py`);
- nothing else: tensors travel in `TensorQueue` slots (`ipc/tensor_queue.py`), never in messages.
"""

from __future__ import annotations

import functools
import os
from typing import Annotated, Any, Literal, cast

import msgspec

from ipc.architecture import Conditioning, ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ipc.errors import Failure

PROTOCOL_VERSION = 1

StageName = Literal["text", "dit", "vae", "writer"]
Seat = str
"""The place of a process that is one stage: the stage's name, or "dit:1", "dit:2", ... for further dits."""

Phase = Literal["text", "encode", "denoise", "decode", "write"]
"""What a quantum does. `encode` and `decode` both run on the vae stage; the others on the stage of their name."""

STAGE_OF_PHASE: dict[Phase, StageName] = {
    "text": "text", "encode": "vae", "denoise": "dit", "decode": "vae", "write": "writer",
}  # fmt: skip


AttentionBackend = Literal[
    "flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "flash", "efficient", "sdpa", "math"
]
"""Implementations of exact attention: libraries of the FlashAttention project, operators of torch, and the formula as
it is written (`stages/attention/backends.py`)."""
AttentionChoice = Literal["auto", AttentionBackend]
MemoryLevel = Literal["auto", 0, 1, 2, 3]
"""What an operator may ask for: a level of `MemoryPlan`, or whichever fits best."""
KernelKind = Literal["triton", "torch"]
"""How what stands between the matrix products is computed (`stages/kernels/`)."""


@functools.cache
def stage_of(seat: Seat) -> StageName:
    """What the process at this seat is."""
    stage = seat.partition(":")[0]
    assert stage in STAGE_OF_PHASE.values() and stage in (seat, "dit"), f"no such seat: {seat}"
    return cast(StageName, stage)


STAGE_OF_COMPONENT: dict[str, StageName] = {
    "text_encoder": "text", "image_encoder": "vae", "transformer": "dit", "transformer_2": "dit", "vae": "vae",
}  # fmt: skip
"""Whose weights they are."""


def number_of(seat: Seat) -> int:
    """Which of its stage's processes it is."""
    return int(seat.partition(":")[2] or 0)


# Client -> server.


class ClientMessage(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """`ref` is chosen by the client; the direct reply carries it back."""

    ref: int


class Hello(ClientMessage, frozen=True, tag="hello", kw_only=True):
    """Must be the first message. Another protocol version gets `Refused(version_mismatch)` and is closed."""

    version: int
    client: str = ""


class Submit(ClientMessage, frozen=True, tag="submit", kw_only=True):
    """Ask for a video. `params` is a `UserParams`, decoded strictly by the server: an unknown key is the user's error,
    not a protocol error. With `subscribe`, the task's events follow the reply on this connection."""

    params: msgspec.Raw
    subscribe: bool = True


class Cancel(ClientMessage, frozen=True, tag="cancel", kw_only=True):
    id: str


class Subscribe(ClientMessage, frozen=True, tag="subscribe", kw_only=True):
    """Receive the events of one task, from its present state to its end."""

    id: str


class ListTasks(ClientMessage, frozen=True, tag="list", kw_only=True):
    pass


class GetStatus(ClientMessage, frozen=True, tag="status", kw_only=True):
    """With `memory`, the reply lists who has what of the memory that outlives the stages."""

    memory: bool = False


class Shutdown(ClientMessage, frozen=True, tag="shutdown", kw_only=True):
    """Owner only. With `drain`, accepted tasks are finished first; without, they stay in the journal."""

    drain: bool = True


When = Literal["drain", "now", "pin"]
"""What becomes of requests that are running when weights change. drain, pin: they finish on the old version; with pin
it stays in memory afterwards. now: they change between two steps, and their metadata says so."""


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request that must go well on new weights before anybody else gets them."""

    params: msgspec.Raw
    """A `UserParams`."""
    reference: str | None = None
    """A video that it must resemble."""
    psnr: float = 30.0
    """How closely, in dB, at least."""


class Reload(ClientMessage, frozen=True, tag="reload", kw_only=True):
    """Owner only. Read weights from a directory and serve them; answered when that is so, or it failed and nothing has
    changed."""

    checkpoint: str
    components: list[str] = []
    """Names; empty: all that the model has."""
    when: When = "drain"
    canary: Canary | None = None
    manifest: str | None = None
    """Of SHA-256 sums, as `sha256sum` writes it; every file must be in it."""
    dry_run: bool = False
    """Read and verify, then forget it."""


class ReplaceStages(ClientMessage, frozen=True, tag="replace_stages", kw_only=True):
    """Owner only. Put new processes, with the code that is now on disk, in the places of these stages' (none: of all);
    answered when they serve, or one is not fit and its predecessor goes on. With another attention backend or number of
    threads (0: the default), if they are given, of the dit and the vae."""

    stages: list[StageName] = []
    attention_backend: str | None = None
    threads: int | None = None


class UpdateWeights(ClientMessage, frozen=True, tag="update_weights", kw_only=True):
    """Owner only. Serve the weights of a component that are in the memfd whose descriptor comes with the frame: a
    safetensors file with Diffusers' names, sealed against writing and shrinking."""

    component: str
    when: When = "drain"


class Rollback(ClientMessage, frozen=True, tag="rollback", kw_only=True):
    """Owner only. Serve what was served before the last reload."""

    when: When = "drain"


class ListVersions(ClientMessage, frozen=True, tag="versions", kw_only=True):
    pass


class ReloadSupervisor(ClientMessage, frozen=True, tag="reload_supervisor", kw_only=True):
    """Owner only. Replace the supervisor's program by the one that is on disk now, in the same process."""


class GetTrace(ClientMessage, frozen=True, tag="trace", kw_only=True):
    """When the latest quanta ran, and where."""


class ChangeMemory(ClientMessage, frozen=True, tag="change_memory", kw_only=True):
    """Owner only. Keep so much of the weights on the GPUs from now on, or, with auto, as much as fits; answered when
    that is so, or it failed and what was before holds."""

    level: MemoryLevel
    blocks: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """At level 3: of the DiT's blocks, so many stay on the device."""


class GetMemory(ClientMessage, frozen=True, tag="memory", kw_only=True):
    """How much of the weights is on the GPUs, and why."""


class AddLora(ClientMessage, frozen=True, tag="lora_add", kw_only=True):
    """Owner only. Read a LoRA file, or the high-noise and the low-noise expert's, and offer it to requests as `name`;
    answered with it when that is so. A `name` that is taken is given to this one from now on."""

    name: str
    files: list[str]


class RemoveLora(ClientMessage, frozen=True, tag="lora_remove", kw_only=True):
    """Owner only. Requests that were accepted with it are finished with it."""

    name: str


class ListLoras(ClientMessage, frozen=True, tag="lora_list", kw_only=True):
    pass


AnyClientMessage = (
    Hello
    | Submit
    | Cancel
    | Subscribe
    | ListTasks
    | GetStatus
    | Shutdown
    | Reload
    | UpdateWeights
    | ReplaceStages
    | Rollback
    | ListVersions
    | ReloadSupervisor
    | GetTrace
    | ChangeMemory
    | GetMemory
    | AddLora
    | RemoveLora
    | ListLoras
)


# Server -> client.


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


# Supervisor -> stage process.


class QueueSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to attach to a `TensorQueue`: its descriptors travel with the message, in the order of the specs."""

    name: str
    slots: int
    slot_bytes: int
    device: int | None = None
    """Number of the GPU that the payload is on; None: host memory."""
    producers: int = 1
    consumers: int = 1


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to attach to the DiT's `StateSlots`."""

    slots: int
    slot_bytes: int
    device: int | None = None
    """Number of the GPU that the payload is on; None: host memory."""
    shared: bool = False
    """Several processes compute: only the supervisor hands out free slots."""


Naming = Literal["diffusers", "original"]
"""Whose tensor names a file has: Diffusers' (and transformers'), which are ours, or those of the Wan repositories."""


class Lora(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA file to be merged into a component as it is loaded, and how strongly."""

    file: str
    strength: float


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """Weights to load: `name` as in a Diffusers directory (text_encoder, image_encoder, transformer, transformer_2,
    vae), the files they are in (safetensors, or `.pth`), whose names the tensors have, and what is merged into them."""

    name: str
    files: list[str]
    naming: Naming = "diffusers"
    loras: list[Lora] = []


class WeightVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A component's weights, placed in memory that outlives the process that read them (`hotreload/placement.py`)."""

    component: str
    content: str
    """Hash of what was read, in hex: the same however it was sharded, named or placed."""
    fingerprint: str
    """Hash of the placed bytes, checked by everyone who binds to them."""
    bytes: int
    device: int | None = None
    """Number of the GPU that they are on; None: host memory."""


class AdapterVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a LoRA file adds to one component, in host memory (`hotreload/adapters.py`)."""

    version: WeightVersion
    rank: int
    """The highest of its pairs."""
    tensors: int
    """That it adds to."""


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


OFFLOADED = 2
"""From this memory level on, weights are in host memory."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the weights a process keeps in its device's memory (docs/memory.md). No plan changes a result."""

    level: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    """0: all. 1: all, and the VAE in tiles. 2: what is not in use now is in host memory: text encoder, VAE, the expert
    that is not at work. 3: the DiT's blocks, too, come from there as they are needed."""
    blocks: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """At level 3: of the DiT's blocks, so many stay on the device. None: none."""


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


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A request with nothing left to decide. Sizes in pixels and frames; `init` is a path the server has resolved."""

    id: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float
    guidance_scale_2: float
    seed: int
    solver: Literal["unipc", "dpm++", "euler"]
    flow_shift: float
    init: str | None
    start_step: int
    """First schedule index that is run: 0, or later with an init video (from strength: `engine/admission.py`)."""
    init_as: Literal["start", "channels", "first_frame"] = "start"
    """What `init` is: where denoising starts (image or video), or an image in the sense of `Conditioning`."""
    noise_device: Literal["cpu", "cuda"] = "cpu"
    """Where the noise is drawn; the two give different noise for a seed."""
    output: str
    metadata_json: bool
    metadata: dict[str, Any]
    """Goes into the file: parameters, versions, weight hashes. The writer adds the time per stage."""
    weights: dict[str, str] = {}
    """Component -> content hash of the version that this task is computed with; one that is missing: whichever is
    bound."""
    changes: list[WeightChange] = []
    """Of the transformers' versions in the middle of the task, in the order of their steps."""
    loras: list[JobLora] = []
    """Added to those versions, in this order."""

    @property
    def partial(self) -> str:
        """The temporary name the writer uses until the file is complete: same directory, hidden, of this task alone."""
        directory, name = os.path.split(self.output)
        return os.path.join(directory, f".{name}.{self.id[:8]}.part")

    @property
    def temporaries(self) -> tuple[str, ...]:
        """Every name that the writer may use meanwhile: for the video, its JSON, and what had their names before."""
        return tuple(self.partial + suffix for suffix in ("", ".json", ".old", ".json.old"))


class JobLora(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that a task is computed with; its name may mean another one by now."""

    name: str
    strength: float
    content: dict[str, str]
    """Component -> hash of what is added to it."""


class WeightChange(msgspec.Struct, frozen=True, kw_only=True):
    """From step `step` of the task on (the first is 0), a component is that of this content hash."""

    step: int
    component: str
    content: str


class Computed(msgspec.Struct, frozen=True, kw_only=True):
    """From quantum `step` of a phase on (the first is 0), a task was computed with these: library, attention or kernels
    -> version or name, threads -> their number."""

    step: int
    by: dict[str, str]


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


# Stage process -> supervisor.


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


# Supervisor -> the process that reads a new version of weights, or a LoRA (`stages/loader.py`), and back: `Loading` and
# `Placed`, or `PlacedLora`, of each component, then `ReadAll` or `ReadFailed`.


class Read(msgspec.Struct, frozen=True, tag_field="type", tag="read", kw_only=True):
    """Read and verify these components, and place each on each of its devices. One at a time; `ReadAll` or `ReadFailed`
    answers."""

    supervisor_pid: int
    components: list[Component]
    devices: dict[str, list[str]]
    """Component -> where it is wanted."""
    in_memory: list[str] = []
    """Names of components whose file came along as a descriptor, in the order of these."""
    manifest: str | None = None
    """A file as `sha256sum` writes it, which must name every file and have its sum."""
    dtype: str
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None


class ReadLora(msgspec.Struct, frozen=True, tag_field="type", tag="read_lora", kw_only=True):
    """Read and verify a LoRA, one file or one for each expert, and place what it adds to each of these components."""

    supervisor_pid: int
    files: list[str]
    components: list[str]
    """The model's transformers."""
    transformer: TransformerConfig


class PlacedLora(StageReport, frozen=True, tag="placed_lora", kw_only=True):
    """What a LoRA adds to one component was read into host memory; its descriptor comes with the message."""

    adapter: AdapterVersion


class ReadAll(StageReport, frozen=True, tag="read_all", kw_only=True):
    """Everything is placed, and was handed over."""


class ReadFailed(StageReport, frozen=True, tag="read_failed", kw_only=True):
    """What is wrong with the files, or with the machine."""

    error: Failure


AnyLoaderReport = Loading | Placed | PlacedLora | ReadAll | ReadFailed


# Supervisor -> the processes that make and test GPU memory (`ipc/device_maker.py`), and back.


class MakeMemory(msgspec.Struct, frozen=True, tag_field="type", tag="make", kw_only=True):
    """Allocate pieces of these sizes on GPU number `device`, with a pattern in them; their descriptors come back."""

    device: int
    sizes: list[int]


class ProbeMemory(msgspec.Struct, frozen=True, tag_field="type", tag="probe", kw_only=True):
    """Map these pieces, whose descriptors come along, look for the pattern and clear it."""

    device: int
    sizes: list[int]


class MemoryReply(msgspec.Struct, frozen=True, kw_only=True):
    """`problem` is empty if all went well."""

    problem: str


# The supervisor -> the process that rehearses its replacement (`engine/rehearsal.py`), and back.


class RehearseProgram(msgspec.Struct, frozen=True, tag_field="type", tag="rehearse_program", kw_only=True):
    """Descriptors come with it: of all packets together, that of the document, and those that it speaks of in their
    order."""

    more: bool
    """Another packet follows."""


class ProgramRehearsed(msgspec.Struct, frozen=True, tag_field="type", tag="program_rehearsed", kw_only=True):
    """`problem` is empty if the program of version `engine` could go on with what it was given."""

    problem: str
    engine: str


# `engine check` -> the process that examines a checkpoint, and back, as JSON.


class CheckAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Compare the headers of `components` with the networks of a model, and say what all of those take up."""

    wanted: list[str]
    """Names of all components of the model; of those that were not found, only the size is asked for."""
    components: list[Component]
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None


class ComponentChecked(msgspec.Struct, frozen=True, kw_only=True):
    """One component. `dtypes` and `parameters` are those of the files, the `bytes` those of the network once loaded."""

    name: str
    dtypes: dict[str, int]
    """safetensors' name of the dtype -> number of tensors."""
    parameters: int
    wrong: dict[str, list[str]]
    """What is wrong -> with which tensors, all of them."""
    unreadable: str
    """Why the files could not be compared; empty if they could."""
    bytes_bfloat16: int
    """Loaded with dtype bfloat16, in which some tensors stay float32."""
    bytes_float32: int


# `engine doctor` -> the process that tries what is there, and back, as JSON.


class DoctorAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Try on `device` the attention backends and the kernels as a transformer would use them, and those of a VAE."""

    device: str
    dtype: str
    transformer: TransformerConfig
    block_bytes: int
    """Of one of its blocks, what travels to the device in each step where blocks are streamed."""
    vae: VaeConfig
    attention: AttentionChoice


class AttentionMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """One backend."""

    backend: AttentionBackend
    version: str = ""
    problem: str = ""
    """Why it is not used; empty if it is right."""
    error: float | None = None
    """Relative L2 distance from float64, the largest of the self-test."""
    lse_error: float | None = None
    """Largest difference of the log-sum-exp from float64."""
    milliseconds: float | None = None
    """Of the measurement."""


class TransfersMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """What streaming weights costs. With a `problem`, nothing was measured."""

    problem: str = ""
    pinning: float = 0.0
    """Bytes a second of page-locking shared host memory that is there already."""
    copy_in: float = 0.0
    """Bytes a second from there to the GPU."""
    copy_out: float = 0.0
    """Bytes a second back."""
    block_seconds: dict[int, float] = {}
    """Tokens -> seconds that a transformer block computes."""
    break_even: int = 0
    """Tokens from which on a block computes for longer than one travels: streaming costs nothing."""


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `attention` and `kernels` are what an engine would take; `attention` is empty if what was asked
    for does not work."""

    device: str
    dtype: str
    heads: int
    head_dim: int
    versions: dict[str, str]
    tokens: int
    """Queries and keys of the measurement."""
    backends: list[AttentionMeasured]
    attention: Literal["", AttentionBackend]
    kernels: KernelKind
    kernels_problem: str
    """Why the Triton kernels are not used; empty if they are."""
    vae_kernels: KernelKind
    vae_kernels_problem: str
    """As `kernels_problem`."""
    transfers: TransfersMeasured
