"""Sampling as pure functions over tensors: the noise, the schedule, the choice of expert, guidance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipc.architecture import VaeConfig
from ipc.messages import Job
from stages.models.transformer import WanTransformer
from stages.solvers import TRAIN_TIMESTEPS, Schedule, add_noise, make_schedule


class Context(NamedTuple):
    """What one expert attends to in a request: `WanTransformer.encode_prompt` of each prompt; its rotation table."""

    prompt: Tensor
    negative: Tensor | None
    """None: guidance is off for this expert."""
    rope: Tensor


def schedule_of(job: Job) -> Schedule:
    """The request's noise levels, from the step its init video enters at."""
    return make_schedule(job.solver, job.steps, job.flow_shift, job.start_step)


def latent_shape(job: Job, vae: VaeConfig) -> tuple[int, int, int, int]:
    """[C, T, H, W] of the request's latents."""
    frames = (job.num_frames - 1) // vae.temporal_stride + 1
    return vae.z_dim, frames, job.height // vae.spatial_stride, job.width // vae.spatial_stride


def get_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32. Drawn on the CPU whatever the device, so that a seed means the same video everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def first_sample(schedule: Schedule, noise: Tensor, init: Tensor | None) -> Tensor:
    """What the first step starts from: pure noise, or the init latents with the noise of that step."""
    return noise if init is None else add_noise(init, noise, schedule.sigmas[schedule.start])


def expert_index(timestep: int, boundary: float | None) -> int:
    """0: `transformer`, which takes the high noise; 1: `transformer_2`. The timestep decides, not the step's number."""
    return 0 if boundary is None or timestep >= boundary * TRAIN_TIMESTEPS else 1


def guided(scale: float) -> bool:
    """Whether guidance of this scale does anything; as in diffusers, 1 and below switch it off."""
    return scale > 1


def guide(prompt: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: from the velocity of the negative prompt towards, and past, that of the prompt."""
    return negative + scale * (prompt - negative)


def predict(model: WanTransformer, latents: Tensor, timestep: int, context: Context, scale: float) -> Tensor:
    """Guided velocity [C, T, H, W] float32 at latents [C, T, H, W].

    Two forwards of batch 1, as in the original. One of batch 2 was 13 % faster at 180 tokens on 2 cores, 5 % slower
    at 1296, and takes twice the activations.
    """
    batch = latents.unsqueeze(0)
    time = torch.tensor([timestep], device=latents.device)
    velocity = model(batch, time, context.prompt, context.rope)
    if context.negative is not None:
        velocity = guide(velocity, model(batch, time, context.negative, context.rope), scale)
    return velocity.squeeze(0)
