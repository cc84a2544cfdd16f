"""Sampling: noise, schedule, expert, guidance."""

from __future__ import annotations

import pytest
import torch

from stages.sampling import Context, expert_index, first_sample, get_noise, guided, latent_shape, predict, schedule_of
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
    [(40, 12.0, 0.875, 26), (40, 5.0, 0.9, 15), (4, 5.0, 0.875, 2), (40, 3.0, 0.875, 12), (50, 5.0, None, 50)],
)
def test_the_timestep_chooses_the_expert(steps: int, shift: float, boundary: float | None, high: int) -> None:
    """The counts of high-noise steps that the original has for its schedules; one expert takes them all."""
    timesteps = make_schedule("unipc", steps, shift).timesteps
    assert [expert_index(t, boundary) for t in timesteps] == [0] * high + [1] * (steps - high)


def test_guidance() -> None:
    """Off at 1 and below; at scale s the velocity is the negative's plus s times the difference; nothing is random."""
    assert [guided(scale) for scale in (0.0, 1.0, 1.01, 5.0)] == [False, False, True, True]
    model = modules(MODEL)["transformer"].eval()
    embeds, latents = torch.randn(2, 1, 12, 16), torch.randn(4, 3, 4, 6)
    with torch.inference_mode():
        prompt, negative = (model.encode_prompt(e) for e in embeds)
        rope = model.rope(3, 4, 6)
        alone = [predict(model, latents, 500, Context(side, None, rope), 1.0) for side in (prompt, negative)]
        both = predict(model, latents, 500, Context(prompt, negative, rope), 3.0)
    assert both.shape == latents.shape and both.dtype == torch.float32
    torch.testing.assert_close(both, alone[1] + 3 * (alone[0] - alone[1]))
