"""The three kinds of parameter. There is no fourth.

- `ModelParams`: static, one YAML per model in `configs/models/`, tied to its weights; nobody changes them.
- `UserParams`: per request, chosen by the end user; what is left out takes the model's default.
- `SystemParams`: at start, chosen by the operator (`engine serve` flags or a YAML file).

All are frozen; unknown keys are errors. Ranges that need only the field are checked here; what needs the model, the
file system or the tokenizer is checked in `engine/admission.py`, before anything is allocated.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ipc.architecture import Conditioning, ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ipc.errors import BadConfig
from ipc.messages.names import AttentionChoice, MemoryLevel, Placement, StageName
from ipc.slot_table import MAX_PROCESSES

Solver = Literal["unipc", "dpm++", "euler"]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


MAX_LORAS = 64
"""Of a request, and loaded at a time."""

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
"""Of memory, as a person writes it: 8GiB, 7.5 GB."""


class Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request of this model gets where it says nothing."""

    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float
    flow_shift: float
    solver: Solver = "unipc"
    guidance_scale_2: float | None = None
    """Low-noise expert's guidance; None: the same as `guidance_scale`."""
    negative_prompt: str = ""


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """What takes the place of a model's defaults of these names."""

    steps: int
    guidance_scale: float
    guidance_scale_2: float
    solver: Solver
    flow_shift: float


PRESETS: dict[str, Preset] = {
    "distilled": Preset(steps=4, guidance_scale=1.0, guidance_scale_2=1.0, solver="euler", flow_shift=5.0),
}
"""By the values of `UserParams.preset`."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest request this model serves; the slots of every queue are sized by it."""

    max_pixels: int
    """height * width."""
    max_frames: int
    max_steps: int = 1000


class ModelParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model: its networks, its sampling and its limits."""

    name: str
    family: str
    description: str
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig | None = None
    conditioning: Conditioning = "none"
    defaults: Defaults
    limits: Limits
    boundary: float | None = None
    """Two experts: timesteps >= boundary * 1000 go to the high-noise `transformer`, the others to `transformer_2`."""
    checkpoint: str | None = None
    """Directory below `configs/` for a model that ships with its weights."""

    @property
    def components(self) -> tuple[str, ...]:
        """The networks with weights, by the names of their directories in a Diffusers checkpoint."""
        second = ("transformer_2",) if self.boundary is not None else ()
        image = ("image_encoder",) if self.image_encoder is not None else ()
        return ("text_encoder", *image, "transformer", *second, "vae")

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this: VAE stride times patch size (16; 32 for Wan2.2-TI2V-5B)."""
        return self.vae.spatial_stride * self.transformer.patch_size[1]


class UserParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request. Names as in diffusers' Wan pipelines."""

    prompt: str
    negative_prompt: str | None = None
    """None: the model's own; "": empty."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    num_frames: int | None = None
    """4n + 1."""
    fps: Annotated[int, Meta(ge=1, le=240)] | None = None
    steps: int | None = None
    """Denoising steps (diffusers: `num_inference_steps`)."""
    guidance_scale: Annotated[float, Meta(ge=0, le=100)] | None = None
    """With two experts, the HIGH-noise one's (as in diffusers; the original's pair is low, high). <= 1: no guidance."""
    guidance_scale_2: Annotated[float, Meta(ge=0, le=100)] | None = None
    """The LOW-noise expert's. None: `guidance_scale`, or the model's (the preset's) if that is None too."""
    seed: Seed | None = None
    """None: drawn at submission and written into the metadata."""
    noise_device: Literal["cpu", "cuda"] = "cpu"
    """Where the noise is drawn. cpu: the same for a seed on every machine; cuda: that of the original programs."""
    preset: Literal["distilled"] | None = None
    """distilled: for step-distilled checkpoints, 4 Euler steps without guidance, in place of the model's defaults."""
    solver: Solver | None = None
    flow_shift: Annotated[float, Meta(ge=0.001, le=100)] | None = None
    image: str | None = None
    """A picture, by its path on the server's file system. Image-to-video models make it move; the others start from it,
    with `strength`."""
    video: str | None = None
    """A video to start from (with `strength`)."""
    strength: Annotated[float, Meta(gt=0, le=1)] | None = None
    """How much of the schedule is run on the start image or video: 1 ignores it, small values keep it. None: 0.8."""
    lora: Annotated[
        tuple[Annotated[str, Meta(description="NAME or NAME:STRENGTH", examples=["style:0.8"])], ...],
        Meta(max_length=MAX_LORAS),
    ] = ()
    """Adapters that the engine has loaded (`engine lora add`), NAME or NAME:STRENGTH each; the strength is 1 if it is
    left out."""
    priority: Annotated[int, Meta(ge=-10, le=10)] = 0
    """Higher first."""
    deadline: Annotated[float, Meta(gt=0)] | None = None
    """Seconds from submission; the task fails when it passes."""
    output: str = "video.mp4"
    """Where the video goes: a path on the server's file system, ending in .mp4."""
    metadata_json: bool = False
    """Also write the metadata as JSON beside the video."""


class SystemParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this engine runs. Every default runs on a laptop CPU."""

    model: str = "wan-demo"
    checkpoint: str | None = None
    """Directory with the weights, in any of the layouts of docs/checkpoints.md; None: what ships with the model."""
    lora: tuple[Annotated[str, Meta(description="FILE:STRENGTH", examples=["style.safetensors:0.8"])], ...] = ()
    """LoRA files merged into the transformer at start, FILE:STRENGTH each; with two experts, HIGH,LOW:STRENGTH."""
    placement: Placement = "split"
    """split: a process per stage; fused: all stages in one process."""
    device: Annotated[str, Meta(description="auto, cpu, cuda or cuda:N", examples=["cuda:0"])] = "auto"
    """auto: the first CUDA device, else cpu. Or cpu, cuda, cuda:N. With `dit_devices`, auto is the first of those."""
    dit_devices: Annotated[
        tuple[Annotated[str, Meta(description="cpu or cuda:N", examples=["cuda:0"])], ...],
        Meta(max_length=MAX_PROCESSES),
    ] = ()
    """The device of each of several dit stages, which take requests from one queue: one per GPU, or cpu as often as
    there are to be. (): one dit, on `device`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on CPU."""
    attention_backend: AttentionChoice = "auto"
    """What computes attention in the dits; all of them are exact. auto: the fastest that is right on the device, tested
    and timed once per engine start (`engine doctor` shows it). Part of the result's identity."""
    memory_level: MemoryLevel = "auto"
    """How much of the weights stays in the GPU's memory (docs/memory.md). auto: as much as fits beside what other
    programs take, at any time; on a CPU 0. No level changes a result."""
    gpu_budget: Annotated[str, Meta(description="a number with its unit", examples=["8GiB"])] | None = None
    """What this engine may take of each GPU's memory, all its processes together, such as 8GiB; None: all that is
    free. The level follows from it, so `memory_level` is auto."""
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Compute threads of each dit stage and of the vae stage on a CPU; 0: half of the cores for the vae, and half for
    the dits together, so that all can work at once. Part of the result's identity."""
    policy: Literal["shortest", "fifo"] = "shortest"
    """shortest: shortest remaining work first, with ageing and priorities; fifo: in order of arrival."""
    max_queue: Annotated[int, Meta(ge=1, le=100_000)] = 64
    """Accepted and unfinished requests; one more gets Busy."""
    socket: str | None = None
    """Path of the Unix socket; None: $XDG_RUNTIME_DIR/engine/engine.sock."""
    state_dir: str | None = None
    """Directory of the journal; None: no journal (one-off, embedded use)."""
    allow_uids: tuple[Annotated[int, Meta(ge=0, le=2**32 - 2)], ...] = ()
    """Numbers of the users that are served beside the owner and root; needs an `output_root` (docs/security.md)."""
    checkpoint_root: str = "/"
    """Weights and LoRA files that are named, at start or while the engine runs, are only read below this directory."""
    output_root: str = "/"
    """Videos are only written, and init files only read, below this directory."""
    start_deadline: Annotated[float, Meta(gt=0)] = 180.0
    """Seconds a stage process may go without progress while it loads."""
    warm_spare: bool = False
    """Keep a process with its libraries loaded, and a context on the GPU, that takes the place of a stage that dies."""
    stage_deadline: Annotated[float, Meta(gt=0)] = 300.0
    """Seconds a quantum may go without progress before its stage counts as hung."""


STAGES: tuple[StageName, ...] = ("text", "dit", "vae", "writer")


def bytes_of(amount: str) -> int:
    """8GiB -> 8589934592. `BadConfig` for what is no amount of memory."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", amount.strip())
    if found is None:
        raise BadConfig(f"gpu_budget is {amount!r}; it must be a number of {', '.join(UNITS)}, such as 8GiB or 7.5 GB")
    return int(float(found[1]) * UNITS[found[2]])
