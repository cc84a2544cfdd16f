"""Sampling: noise, schedule, expert, guidance."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline

from engine.models import load_model
from stages.sampling import (
    Context,
    expert_index,
    first_sample,
    get_noise,
    guided,
    image_channels,
    latent_shape,
    pin_first_frame,
    predict,
    schedule_of,
    timesteps_of,
)
from stages.solvers import make_schedule
from tests.stages.rig import MODEL, make_job, modules


def test_the_seed_decides_the_noise() -> None:
    """The same seed gives the same standard normal noise, whatever was drawn before; another seed another one."""
    torch.manual_seed(1)
    first = get_noise(7, (4, 3, 16, 16))
    torch.rand(5)
    assert torch.equal(first, get_noise(7, (4, 3, 16, 16)))
    assert not torch.equal(first, get_noise(8, (4, 3, 16, 16)))
    assert first.dtype == torch.float32
    assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.1


def test_the_size_of_the_latents() -> None:
    """9 frames of 32x48 pixels: 3 latent frames of 4x6."""
    assert latent_shape(make_job(), MODEL.vae) == (4, 3, 4, 6)


def test_an_init_video_enters_the_schedule_late_with_the_noise_of_that_step() -> None:
    """With start step 3 of 4, the first sample is mostly the init latents; without an init it is the noise itself."""
    schedule = schedule_of(make_job(start_step=3, flow_shift=1.0))
    assert (schedule.start, schedule.steps) == (3, 4)
    noise, init = get_noise(0, (4, 3, 4, 6)), torch.full((4, 3, 4, 6), 10.0)
    sigma = schedule.sigmas[3]
    assert 0.2 < sigma < 0.3
    torch.testing.assert_close(first_sample(schedule, noise, init), (1 - sigma) * init + sigma * noise)
    assert first_sample(schedule_of(make_job()), noise, None) is noise


@pytest.mark.parametrize(
    ("steps", "shift", "boundary", "high"),
    [(4, 5.0, 0.875, 2), (4, 5.0, 0.9, 2), (40, 3.0, 0.875, 12), (40, 8.0, 0.9, 19), (50, 5.0, None, 50)],
)
def test_the_timestep_chooses_the_expert(steps: int, shift: float, boundary: float | None, high: int) -> None:
    """The counts of high-noise steps that the original has for its schedules; one expert takes them all."""
    timesteps = schedule_of(make_job(steps=steps, flow_shift=shift)).timesteps
    assert [expert_index(t, boundary) for t in timesteps] == [0] * high + [1] * (steps - high)


@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_the_boundary_itself_is_high_noise(boundary: float) -> None:
    """The timestep at the boundary goes to the high-noise expert, the one below to the other."""
    timestep = round(1000 * boundary)
    assert [expert_index(t, boundary) for t in (timestep, timestep - 1)] == [0, 1]


@pytest.mark.parametrize(("name", "high", "low"), [("wan2.2-t2v-a14b", 26, 14), ("wan2.2-i2v-a14b", 15, 25)])
def test_the_steps_of_each_expert_by_default(name: str, high: int, low: int) -> None:
    """With the published models' own steps, shift, solver and boundary: the counts of the original."""
    model = load_model(name)
    job = make_job(steps=model.defaults.steps, flow_shift=model.defaults.flow_shift, solver=model.defaults.solver)
    experts = [expert_index(t, model.boundary) for t in schedule_of(job).timesteps]
    assert experts == [0] * high + [1] * low


@pytest.mark.gpu
def test_noise_drawn_on_cuda() -> None:
    """On CUDA a seed gives the same noise every time, another one than on the CPU, with one draw for the clip."""
    noise = get_noise(7, (4, 3, 4, 6), "cuda")
    assert noise.device.type == "cuda" and noise.dtype == torch.float32
    assert torch.equal(noise, get_noise(7, (4, 3, 4, 6), "cuda"))
    generator = torch.Generator("cuda").manual_seed(7)
    assert torch.equal(noise, torch.randn(4, 3, 4, 6, generator=generator, device="cuda"))
    assert not torch.equal(noise.cpu(), get_noise(7, (4, 3, 4, 6)))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_mask_is_one_on_the_first_latent_frame(frames: int) -> None:
    """The latents of the image get four channels before them, ones on the first latent frame and zeros on the others:
    what Diffusers' image-to-video pipeline makes with the same latents, for one frame and for many."""
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
    )
    pipeline = WanImageToVideoPipeline(None, None, vae, UniPCMultistepScheduler())
    with torch.no_grad():
        condition = pipeline.prepare_latents(
            torch.randn(1, 3, 32, 48), 1, 4, 32, 48, frames, torch.float32, torch.device("cpu")
        )[1][0]
    assert condition.shape == (8, (frames - 1) // 4 + 1, 4, 6)
    assert torch.equal(image_channels(condition[4:], 4), condition)
    assert bool((condition[:4, 0] == 1).all()) and not condition[:4, 1:].any()


def test_a_pinned_first_frame() -> None:
    """The first latent frame is the image's, the others stay; without an image everything stays."""
    latents, frame = torch.randn(3, 5, 2, 2), torch.randn(3, 1, 2, 2)
    pinned = pin_first_frame(latents, frame)
    assert torch.equal(pinned[:, :1], frame) and torch.equal(pinned[:, 1:], latents[:, 1:])
    assert pin_first_frame(latents, None) is latents
    assert torch.equal(pin_first_frame(latents[:, :1], frame), frame)


def test_guidance() -> None:
    """Off at 1 and below; at scale s the velocity is the negative's plus s times the difference; nothing is random."""
    assert [guided(scale) for scale in (0.0, 1.0, 1.01, 5.0)] == [False, False, True, True]
    model = modules(MODEL)["transformer"].eval()
    embeds, latents = torch.randn(2, 1, 12, 16), torch.randn(4, 3, 4, 6)
    with torch.inference_mode():
        prompt, negative = (model.encode_prompt(e) for e in embeds)
        rope, times = model.rope(3, 4, 6), model.encode_time(torch.tensor([900, 500]))
        alone = [predict(model, latents, 1, Context(side, rope, times), 1.0) for side in (prompt, negative)]
        both = predict(model, latents, 1, Context(torch.cat((prompt, negative), dim=2), rope, times), 3.0)
    assert both.shape == latents.shape and both.dtype == torch.float32
    torch.testing.assert_close(both, alone[1] + 3 * (alone[0] - alone[1]))


def test_the_tokens_of_a_given_first_frame_have_timestep_0() -> None:
    """With a first frame, the velocity is that of the model at timesteps (0, t); without one, at t for every token."""
    model = modules(MODEL)["transformer"].eval()
    latents = torch.randn(4, 3, 4, 6)
    with torch.inference_mode():
        schedule = make_schedule("euler", 2, 3.0)
        prompts, rope = model.encode_prompt(torch.randn(1, 12, 16)), model.rope(3, 4, 6)
        times = [model.encode_time(timesteps_of(schedule, pinned, "cpu")) for pinned in (True, False)]
        given, plain = (predict(model, latents, 1, Context(prompts, rope, time), 1.0) for time in times)
        pair = torch.tensor([[0, schedule.timesteps[1]]])
        expected = model(latents.unsqueeze(0), pair, prompts, rope)[0]
    torch.testing.assert_close(given, expected)
    assert not torch.equal(given, plain)
