"""Whole tiny pipelines: text, vae and dit stage, one after the other, against Diffusers' pipelines over the same weight
files, the same seed, the same pixels and the original's noise levels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVideoToVideoPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.memory import QueueName
from engine.params import ModelParams
from ipc.architecture import ImageEncoderConfig
from ipc.messages.job import Job
from ipc.messages.names import Phase, StageName
from ipc.tensor_queue import TensorQueue
from ipc.tensors import slot_tensor
from stages.media import read_frames
from stages.sampling import expert_index, schedule_of
from tests.stages.reference import make_components, make_image_encoder, make_scheduler
from tests.stages.rig import MODEL, TWO_EXPERTS, Rig, is_empty, make_checkpoint, make_job, quanta

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' DPM++

Checkpoint = Callable[[ModelParams], Path]
MakeImage = Callable[..., Path]
IMAGE_ENCODER_FILE = "image_encoder/model.safetensors"
STAGE_OF: dict[Phase, StageName] = {"text": "text", "encode": "vae", "denoise": "dit", "decode": "vae"}
replace = msgspec.structs.replace

CHANNELS = replace(MODEL, conditioning="channels", transformer=replace(MODEL.transformer, in_channels=4 + 4 + 4))
IMAGE_MODELS = {
    "wan2.1-i2v": replace(
        CHANNELS,
        # Diffusers takes all rows but the last 512 for the image's.
        transformer=replace(CHANNELS.transformer, image_dim=8, text_len=512),
        image_encoder=ImageEncoderConfig(
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=16,
        ),
    ),
    "wan2.2-i2v-a14b": replace(CHANNELS, boundary=0.9),
    "wan2.2-ti2v-5b": replace(
        MODEL,
        conditioning="first_frame",
        vae=replace(MODEL.vae, is_residual=True, patch_size=2, decoder_base_dim=8),
        limits=replace(MODEL.limits, max_pixels=64 * 96),
    ),
}
"""Tiny models with every part of the published ones; those that see no image are `MODEL` and `TWO_EXPERTS`."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Makes the checkpoint of a model, once, with weights that hide nothing: norms around 1.5, biases and modulation
    well away from zero."""
    made: dict[ModelParams, Path] = {}

    def make(model: ModelParams) -> Path:
        if model not in made:
            made[model] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), model)
            if model.image_encoder is not None:  # with the last block, as it is published
                save_file(make_image_encoder(model.image_encoder).state_dict(), made[model] / IMAGE_ENCODER_FILE)
            for file in sorted(made[model].rglob("*.safetensors")):
                save_file(hardened(load_file(file)), file)
        return made[model]

    torch.set_num_threads(1)
    return make


def hardened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(map(torch.Tensor.numel, state.values())))
    result = {}
    for name in sorted(state):
        noise = torch.randn(state[name].shape, generator=generator)
        if not state[name].is_floating_point():
            result[name] = state[name]
        elif "norm" in name and not name.endswith("bias"):
            result[name] = 1.5 + 0.2 * noise
        elif name.endswith("scale_shift_table") or "relative_attention_bias" in name:
            result[name] = 0.5 * noise
        elif name.endswith("bias"):
            result[name] = 0.2 * noise
        else:
            result[name] = noise / state[name][0].numel() ** 0.5
    return result


@pytest.fixture
def image(tmp_path: Path) -> MakeImage:
    """Writes a picture of this height and width."""

    def write(height: int, width: int, seed: int = 3) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = tmp_path / f"{seed}.png"
        PIL.Image.fromarray(pixels).save(path)
        return path

    return write


def run_stages(checkpoint: Path, model: ModelParams, job: Job) -> tuple[Tensor, Tensor]:
    """The latents [1, C, T, H, W] that the dit hands to the vae, and the frames [F, H, W, 3] uint8 that the vae hands
    to the writer; all memory is free afterwards."""
    frames = []
    with Rig(checkpoint, model) as rig:
        names: tuple[StageName, ...] = ("text", "vae", "dit")
        stages = {name: rig.load(name) for name in names}
        for stage in stages.values():
            stage.begin(job)
        for run in quanta(job):
            if run.phase == "decode" and run.index == 0:
                latents = take(rig, "latents", job, 0)
            if run.phase != "write":
                stages[STAGE_OF[run.phase]].step(run)
            if run.phase == "decode":
                frames.append(take(rig, "frames", job, run.index))
                rig.memory.purge(job.id, "writer")
        for stage in stages.values():
            stage.drop(job.id)
        assert is_empty(rig)
    return latents.unsqueeze(0), torch.cat(frames)


def take(rig: Rig, name: QueueName, job: Job, sequence: int) -> Tensor:
    """A copy of what the consumer of the queue would find; it stays there."""
    queue = rig.memory.queues[name]
    with TensorQueue.attach(queue.spec, queue.fds, "consumer", 1) as consumer:
        found = slot_tensor(consumer.take(job.id, sequence, 1)).clone()
    queue.reclaim("consumer", 1)
    return found


def run_diffusers(pipeline: Any, job: Job, model: ModelParams, **inputs: Any) -> Any:
    """The latents of Diffusers' pipeline, from the same seed; the pixels if `inputs` say `output_type`."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"output_type": "latent"} | inputs
    return pipeline(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        height=job.height,
        width=job.width,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(job.seed),
        max_sequence_length=model.transformer.text_len,
        **settings,
    ).frames


def text_to_video(checkpoint: Path, model: ModelParams, job: Job, output_type: str = "latent") -> Any:
    parts = make_components(checkpoint, model)
    pipeline = WanPipeline(
        scheduler=make_scheduler(schedule_of(job)),
        boundary_ratio=model.boundary,
        expand_timesteps=model.conditioning == "first_frame",
        **parts,
    )
    second = {} if model.boundary is None else {"guidance_scale_2": job.guidance_scale_2}
    return run_diffusers(pipeline, job, model, num_frames=job.num_frames, output_type=output_type, **second)


def video_to_video(checkpoint: Path, model: ModelParams, job: Job, strength: float) -> Any:
    assert job.init is not None
    frames = read_frames(job.init, job.num_frames, job.height, job.width)
    pipeline = WanVideoToVideoPipeline(
        scheduler=make_scheduler(schedule_of(job)), **make_components(checkpoint, model)
    )  # fmt: skip
    return run_diffusers(
        pipeline, job, model, video=[PIL.Image.fromarray(frame) for frame in frames], strength=strength
    )


def image_to_video(checkpoint: Path, model: ModelParams, job: Job) -> Any:
    assert job.init is not None
    pipeline = WanImageToVideoPipeline(
        scheduler=make_scheduler(schedule_of(job)),
        boundary_ratio=model.boundary,
        expand_timesteps=model.conditioning == "first_frame",
        **make_components(checkpoint, model),
    )
    picture = PIL.Image.fromarray(next(read_frames(job.init, 1, job.height, job.width)))
    second = {} if model.boundary is None else {"guidance_scale_2": job.guidance_scale_2}
    return run_diffusers(pipeline, job, model, image=picture, num_frames=job.num_frames, **second)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "fields",
    [
        {"solver": "unipc"},
        {"solver": "dpm++"},
        {"solver": "euler"},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0},
        {"num_frames": 1, "flow_shift": 12.0},
    ],
    ids=str,
)
def test_text_to_video(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    """Every solver, both branches of guidance, with a negative prompt and an empty one, guidance off, a single frame:
    the latents are within 1e-4 of those of `WanPipeline`, and another prompt's are not."""
    job = make_job(steps=6, **fields)
    expected = text_to_video(checkpoint(MODEL), MODEL, job)
    assert relative_error(run_stages(checkpoint(MODEL), MODEL, job)[0], expected) <= 1e-4
    other = replace(job, prompt="a black square")
    assert relative_error(run_stages(checkpoint(MODEL), MODEL, other)[0], expected) > 1e-2


def test_the_frames_of_text_to_video(checkpoint: Checkpoint) -> None:
    """From prompt to frames: no 8-bit value is more than one off those of `WanPipeline`."""
    job = make_job()
    frames = run_stages(checkpoint(MODEL), MODEL, job)[1]
    expected = text_to_video(checkpoint(MODEL), MODEL, job, "np")[0]
    assert frames.shape == expected.shape == (9, 32, 48, 3)
    assert float(frames.float().std()) > 10
    assert np.abs(frames.numpy() - 255 * expected).max() <= 1


@pytest.mark.parametrize(
    "fields",
    [
        {"flow_shift": 3.0},
        {"flow_shift": 12.0, "solver": "dpm++", "guidance_scale_2": 1.0},
        {"solver": "euler", "steps": 4, "flow_shift": 5.0, "guidance_scale": 1.0, "guidance_scale_2": 1.0},
    ],
    ids=str,
)
def test_text_to_video_with_two_experts(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    """Some steps by each expert with its own guidance scale, guidance off for the second one alone, and the distilled
    schedule, two steps each: within 1e-4 of `WanPipeline` with a boundary."""
    job = make_job(**{"steps": 8, "guidance_scale": 4.0, "guidance_scale_2": 2.0} | fields)
    experts = [expert_index(timestep, TWO_EXPERTS.boundary) for timestep in schedule_of(job).timesteps]
    assert 2 <= sum(experts) <= job.steps - 2
    expected = text_to_video(checkpoint(TWO_EXPERTS), TWO_EXPERTS, job)
    assert relative_error(run_stages(checkpoint(TWO_EXPERTS), TWO_EXPERTS, job)[0], expected) <= 1e-4
    for name in ("guidance_scale", "guidance_scale_2"):
        other = replace(job, **{name: 6.0})
        assert relative_error(run_stages(checkpoint(TWO_EXPERTS), TWO_EXPERTS, other)[0], expected) > 1e-3


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize(("strength", "start_step"), [(0.8, 2), (0.5, 4), (0.13, 7), (1.0, 0)])
def test_video_to_video(
    checkpoint: Checkpoint, image: MakeImage, solver: str, strength: float, start_step: int
) -> None:
    """From the middle of the schedule, with the noise of that step over the input: within 1e-4 of
    `WanVideoToVideoPipeline` at the strength that enters there."""
    job = make_job(solver=solver, steps=8, start_step=start_step, init=str(image(32, 48)))
    expected = video_to_video(checkpoint(MODEL), MODEL, job, strength)
    assert relative_error(run_stages(checkpoint(MODEL), MODEL, job)[0], expected) <= 1e-4


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize(
    "fields", [{}, {"solver": "euler", "guidance_scale": 1.0, "guidance_scale_2": 1.0}, {"num_frames": 1}], ids=str
)
def test_image_to_video(checkpoint: Checkpoint, image: MakeImage, name: str, fields: dict[str, Any]) -> None:
    """An image as channels behind the noise and as CLIP tokens (Wan2.1), as channels with two experts (Wan2.2), as
    the first latent frame with a timestep of its own (TI2V-5B); with guidance, without, and for a single frame: within
    1e-4 of `WanImageToVideoPipeline`, and another image's latents are not."""
    model = IMAGE_MODELS[name]
    # Square and of the size of the CLIP tower, so that neither side resizes: they do that differently on purpose.
    side = 64 if model.conditioning == "first_frame" else 32
    job = make_job(
        **{"steps": 6, "height": side, "width": side, "init": str(image(side, side)), "guidance_scale_2": 2.0,
           "init_as": model.conditioning} | fields
    )  # fmt: skip
    expected = image_to_video(checkpoint(model), model, job)
    assert relative_error(run_stages(checkpoint(model), model, job)[0], expected) <= 1e-4
    other = replace(job, init=str(image(side, side, seed=4)))
    assert relative_error(run_stages(checkpoint(model), model, other)[0], expected) > 1e-2


def test_ti2v_without_an_image(checkpoint: Checkpoint) -> None:
    """TI2V-5B from text alone: within 1e-4 of `WanPipeline` with a timestep per token, here the same for all."""
    model = IMAGE_MODELS["wan2.2-ti2v-5b"]
    job = make_job(steps=6, height=64, width=96)
    expected = text_to_video(checkpoint(model), model, job)
    assert relative_error(run_stages(checkpoint(model), model, job)[0], expected) <= 1e-4
