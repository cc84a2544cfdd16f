"""A tiny Wan model with random weights on disk, and the shared memory that its stages work on.

Every module is the real one, of the smallest size that its code takes.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from engine.memory import EngineMemory
from engine.params import Defaults, Limits, ModelParams
from engine.weights import WeightStore
from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ipc.messages.job import Job
from ipc.messages.names import STAGE_OF_COMPONENT, Phase, StageName
from ipc.messages.reports import Chosen, Parts, VaeChosen
from ipc.messages.stage import Run, Start
from ipc.messages.weights import Component, WeightVersion
from stages.models.image_encoder import ImageEncoder
from stages.models.text_encoder import build as build_text_encoder
from stages.models.transformer import WanTransformer
from stages.models.vae import WanVae
from stages.outbox import Delivery
from stages.stage import Links, Stage, attach_links
from stages.worker import load_stage

STAGES: tuple[StageName, ...] = ("text", "dit", "vae", "writer")
CHUNK = 2
"""Latent frames per decode quantum."""
WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "right", "on", "black"]

MODEL = ModelParams(
    name="tiny",
    family="wan2.1",
    description="random weights",
    transformer=TransformerConfig(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, text_len=12, in_channels=4,
        out_channels=4, freq_dim=32,
    ),
    vae=VaeConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, latents_mean=(0.1,) * 4, latents_std=(1.5,) * 4
    ),
    text_encoder=TextEncoderConfig(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    defaults=Defaults(height=32, width=48, num_frames=9, fps=8, steps=4, guidance_scale=3.0, flow_shift=3.0),
    limits=Limits(max_pixels=32 * 48, max_frames=17),
)  # fmt: skip
TWO_EXPERTS = msgspec.structs.replace(MODEL, boundary=0.875)
FIRST_FRAME = msgspec.structs.replace(MODEL, conditioning="first_frame")
CHANNELS = msgspec.structs.replace(
    MODEL,
    conditioning="channels",
    transformer=msgspec.structs.replace(MODEL.transformer, in_channels=12, image_dim=8),
    image_encoder=ImageEncoderConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=28
    ),
)
"""With image tokens, as Wan2.1-I2V."""


def modules(model: ModelParams) -> dict[str, nn.Module]:
    """The networks by component name, with random weights that are the same every time."""
    torch.manual_seed(0)
    built: dict[str, nn.Module] = {
        "text_encoder": build_text_encoder(model.text_encoder),
        "transformer": WanTransformer(model.transformer),
        "transformer_2": WanTransformer(model.transformer),
        "vae": WanVae(model.vae),
    }
    if model.image_encoder is not None:
        built["image_encoder"] = ImageEncoder(model.image_encoder)
    return built


def make_tokenizer(path: Path) -> None:
    """One token per known word, `<unk>` for others, `</s>` at the end."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def make_checkpoint(directory: Path, model: ModelParams = MODEL) -> Path:
    """A checkpoint in the Diffusers layout, float16 as small models are shipped."""
    built = modules(model)
    for name in model.components:
        (directory / name).mkdir(parents=True)
        file = "model.safetensors" if name.endswith("_encoder") else "diffusion_pytorch_model.safetensors"
        save_file({k: v.half().contiguous() for k, v in built[name].state_dict().items()}, directory / name / file)
    make_tokenizer(directory / "tokenizer" / "tokenizer.json")
    return directory


def make_job(output: Path | str = "unused.mp4", **fields: Any) -> Job:
    """A request of this model; `fields` replace what a test cares about."""
    defaults: dict[str, Any] = {
        "id": uuid.uuid4().hex, "prompt": "a red circle moves left", "negative_prompt": "a blue square", "height": 32,
        "width": 48, "num_frames": 9, "fps": 8, "steps": 4, "guidance_scale": 3.0, "guidance_scale_2": 3.0, "seed": 7,
        "solver": "unipc", "flow_shift": 3.0, "init": None, "start_step": 0, "output": str(output),
        "metadata_json": False, "metadata": {"seed": 7},
    }  # fmt: skip
    return Job(**{**defaults, **fields})


def quanta(job: Job) -> list[Run]:
    """All quanta of a request, in an order in which they can run in one process without a deep queue."""
    latent_frames = (job.num_frames - 1) // 4 + 1
    chunks = -(-latent_frames // CHUNK)
    order: list[tuple[Phase, int]] = [("text", 0)] + [("encode", 0)] * (job.init is not None)
    order += [("denoise", i) for i in range(job.steps - job.start_step)]
    for chunk in range(chunks):
        order += [("decode", chunk), ("write", chunk)]
    seconds: dict[Phase, float] = {"text": 0.5, "denoise": 2.0}
    return [
        Run(id=job.id, phase=phase, index=index, seconds=seconds if (phase, index) == ("write", chunks - 1) else None)
        for phase, index in order
    ]


def finish(stage: Stage, run: Run) -> list[Parts]:
    """Run a quantum until no part of it is left; what it said after each part."""
    said = []
    while isinstance(parts := stage.step(run), Parts):
        said.append(parts)
        if not parts.left:
            break
    return said


class Rig:
    """The supervisor's side of the shared memory, and stages in this process that are attached to it."""

    def __init__(self, checkpoint: Path, model: ModelParams = MODEL) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.memory = EngineMemory(model, CHUNK)
        self.beats = 0
        self.placing: list[str] = []
        """Tasks whose files were about to be put in place."""
        self.weights = WeightStore()
        """What the stages have placed; a stage that is loaded again without other fields binds to it."""
        self.loaded: dict[str, tuple[int, int]] = {}
        """Component -> the bytes read last and all there are."""
        self.unlocked: list[tuple[str, str, str]] = []
        """What the stages said of pages that could not be locked."""
        self.chosen: list[Chosen | VaeChosen] = []
        """What the dits and the vaes said they compute with."""
        self._epoch = 0
        self._epochs: dict[StageName, int] = {}
        """Of the newest process of each stage."""

    def start(self, stages: tuple[StageName, ...] = STAGES, **fields: Any) -> Start:
        """What a process with these stages is told."""
        self._epoch += 1
        self._epochs.update(dict.fromkeys(stages, self._epoch))
        components = [Component(name=name, files=self._files(name)) for name in self.model.components]
        defaults: dict[str, Any] = {
            "stages": list(stages), "epoch": self._epoch, "supervisor_pid": os.getpid(), "model": self.model.name,
            "transformer": self.model.transformer, "vae": self.model.vae, "text_encoder": self.model.text_encoder,
            "image_encoder": self.model.image_encoder, "conditioning": self.model.conditioning,
            "boundary": self.model.boundary, "components": components,
            "tokenizer": str(self.checkpoint / "tokenizer" / "tokenizer.json"),
            "devices": {stage: "cpu" for stage in stages if stage != "writer"},
            "threads": dict.fromkeys(stages, 1), "dtype": "float32", "decode_latents": CHUNK,
            "queues": self.memory.specs(stages), "state": self.memory.state_spec(stages),
        }  # fmt: skip
        if not fields:
            defaults["placed"] = [version for version, _ in self._placed(stages)]
        return Start(**{**defaults, **fields})

    def fds(self, start: Start) -> list[int]:
        """What goes with `start`, but for the progress counter."""
        placed = self._placed(start.stages) if start.placed else []
        return self.memory.fds(tuple(start.stages)) + [fd for _, fd in placed]

    def links(self, start: Start) -> Links:
        return attach_links(
            start, self.fds(start), self._beat, self._loading, self._place, self._note_unlocked, self.chosen.append,
            self.placing.append, self._deliver,
        )  # fmt: skip

    def load(self, name: StageName, **fields: Any) -> Stage:
        """This stage, as in a process of its own. Loading it again stands for a new process: `reclaim` comes before."""
        start = self.start((name,), **fields)
        return load_stage(name, start, self.links(start))

    def reclaim(self, *stages: StageName) -> None:
        """What the supervisor does when the process of these stages is dead."""
        for stage in stages:
            self.memory.reclaim((stage,), self._epochs.get(stage, 0))

    def _files(self, component: str) -> list[str]:
        return [str(file) for file in sorted((self.checkpoint / component).glob("*.safetensors"))]

    def _place(self, version: WeightVersion, device: str, fd: int) -> None:
        self.weights.keep(device, version, os.dup(fd))

    def _placed(self, stages: Collection[StageName]) -> list[tuple[WeightVersion, int]]:
        return self.weights.of("cpu", [name for name, stage in STAGE_OF_COMPONENT.items() if stage in stages])

    def _note_unlocked(self, component: str, content: str, why: str) -> None:
        self.unlocked.append((component, content, why))

    def _beat(self) -> None:
        self.beats += 1

    def _deliver(self, delivery: Delivery) -> None:
        delivery()

    def _loading(self, component: str, done: int, total: int) -> None:
        self.loaded[component] = (done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.memory.close()
        self.weights.close()

    def depths(self) -> dict[str, int]:
        """Slots in use, by queue and for the states."""
        depths = {queue.name: queue.depth for queue in self.memory.statistics()}
        return {**depths, "states": self.memory.state.statistics().depth}


def is_empty(rig: Rig) -> bool:
    """Every slot is free and every rule of the shared memory holds."""
    return not any(rig.depths().values()) and not rig.memory.check_integrity()
