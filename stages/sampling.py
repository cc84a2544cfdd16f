"""Sampling as pure functions over tensors: the noise, the schedule, the image, the choice of expert, guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipc.architecture import VaeConfig
from ipc.messages.job import Job
from stages.models.conditioning import Time
from stages.models.transformer import WanTransformer
from stages.solvers import TRAIN_TIMESTEPS, Schedule, add_noise, make_schedule

BATCHED_TOKENS = 2048
"""Tokens of a clip up to which both branches of guidance are one forward on a GPU, whose time is then that of reading
the weights. On 2 cores a batch of 2 was 13 % faster at 180 tokens, 5 % slower at 1296: there it is never one."""
GRAPH_TOKENS = 4096
"""Tokens of a clip up to which a CUDA graph is used."""


class Context(NamedTuple):
    """What one expert attends to in a request, made once for all its steps."""

    prompts: Tensor
    """`WanTransformer.encode_prompt`, [layers, 2, 1 or 2, text_len, heads, head_dim]: of the prompt, then of the
    negative prompt unless guidance is off for this expert."""
    rope: Tensor
    times: Time
    """Of all steps of the schedule."""
    image: Tensor | None = None
    """`encode_image` of the image's tokens, the same for both prompts. None: the model sees none."""

    @property
    def tensors(self) -> list[Tensor]:
        return [self.prompts, self.rope, *self.times, *(() if self.image is None else (self.image,))]


class ImageLatents(NamedTuple):
    """How the DiT gets the latents of the request's image; both None without one."""

    channels: Tensor | None = None
    """[4 + C, T, H, W] of `image_channels`: behind the channels of the latents, at every forward."""
    first_frame: Tensor | None = None
    """[C, 1, H, W]: in place of the first latent frame, before the first step and after each."""


NO_IMAGE = ImageLatents()


def schedule_of(job: Job) -> Schedule:
    """The request's noise levels, from the step its init video enters at."""
    return make_schedule(job.solver, job.steps, job.flow_shift, job.start_step)


def timesteps_of(schedule: Schedule, pinned: bool, device: torch.device | str) -> Tensor:
    """Of every step, for `WanTransformer.encode_time`: [steps], or [steps, 2] with 0 for a pinned first frame."""
    steps = [[0, t] if pinned else t for t in schedule.timesteps]
    return torch.tensor(steps, device=device)


def latent_shape(job: Job, vae: VaeConfig) -> tuple[int, int, int, int]:
    """[C, T, H, W] of the request's latents."""
    frames = (job.num_frames - 1) // vae.temporal_stride + 1
    return vae.z_dim, frames, job.height // vae.spatial_stride, job.width // vae.spatial_stride


def get_noise(seed: int, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Standard normal float32, drawn on the device and there. A seed means the same video everywhere only if that is
    the CPU; the original programs draw it on CUDA, [C, T, H, W] at once, as here."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)


def first_sample(schedule: Schedule, noise: Tensor, init: Tensor | None) -> Tensor:
    """What the first step starts from: pure noise, or the init latents with the noise of that step."""
    return noise if init is None else add_noise(init, noise, schedule.sigmas[schedule.start])


def image_channels(latents: Tensor, temporal_stride: int) -> Tensor:
    """[C, T, H, W], the latents of the image and of grey frames behind it -> [stride + C, T, H, W]: the mask before
    them says with ones which frames are given. It has a channel for each video frame of a latent frame; the first
    latent frame is one video frame, repeated, so its ones fill all channels."""
    mask = latents.new_zeros((temporal_stride, *latents.shape[1:]))
    mask[:, 0] = 1
    return torch.cat((mask, latents))


def pin_first_frame(latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """[C, T, H, W] with [C, 1, H, W], if there is one, as its first frame."""
    return latents if first_frame is None else torch.cat((first_frame, latents[:, 1:]), dim=1)


def expert_index(timestep: int, boundary: float | None) -> int:
    """0: `transformer`, which takes the high noise; 1: `transformer_2`. The timestep decides, not the step's number."""
    return 0 if boundary is None or timestep >= boundary * TRAIN_TIMESTEPS else 1


def guided(scale: float) -> bool:
    """Whether guidance of this scale does anything; as in diffusers, 1 and below switch it off."""
    return scale > 1


def guide(prompt: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: from the velocity of the negative prompt towards, and past, that of the prompt."""
    return negative + scale * (prompt - negative)


Run = Callable[[Callable[..., Tensor], Sequence[Tensor | None]], Tensor]
"""Calls a function with tensors: plainly, or as a CUDA graph."""


def plainly(function: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> Tensor:
    return function(*inputs)


def predict(
    model: WanTransformer,
    latents: Tensor,
    step: int,
    context: Context,
    scale: float,
    image: ImageLatents = NO_IMAGE,
    run: Run = plainly,
) -> Tensor:
    """Guided velocity [C, T, H, W] float32 at latents [C, T, H, W], before step number `step` of the schedule."""
    batch = (latents if image.channels is None else torch.cat((latents, image.channels))).unsqueeze(0)
    time = context.times.row(step)
    inputs = (batch, time.embedding, time.modulation, context.prompts, context.rope, context.image)
    velocities = run(partial(branches, model), inputs)
    if len(velocities) == 1:
        return velocities[0]
    return guide(velocities[0], velocities[1], scale)


def branches(
    model: WanTransformer,
    latents: Tensor,
    embedding: Tensor,
    modulation: Tensor,
    prompts: Tensor,
    rope: Tensor,
    image: Tensor | None,
) -> Tensor:
    """Velocities [N, C, T, H, W] for latents [1, C, T, H, W] at one `Time`, of N prompts: as one forward or as N."""
    time, number = Time(embedding, modulation), prompts.shape[2]
    if are_one(prompts, rope, image):
        return model.velocity(latents.expand(number, -1, -1, -1, -1), time, prompts, rope)
    each = (prompts[:, :, i : i + 1] for i in range(number))
    return torch.cat([model.velocity(latents, time, prompt, rope, image) for prompt in each])


def are_one(prompts: Tensor, rope: Tensor, image: Tensor | None) -> bool:
    """Whether the branches of these prompts are computed as one batch: where that is faster."""
    return prompts.shape[2] > 1 and image is None and prompts.is_cuda and len(rope) <= BATCHED_TOKENS


def forwards(context: Context) -> int:
    """How often a step goes through the blocks."""
    return 1 if are_one(context.prompts, context.rope, context.image) else context.prompts.shape[2]
