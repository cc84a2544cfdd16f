"""The solvers against the original's grids and trajectories, and against Diffusers' schedulers in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings, strategies as st
from torch import Tensor

from stages.solvers import (
    STATE_TENSORS,
    Schedule,
    SolverName,
    add_noise,
    make_schedule,
    new_state,
    step,
)
from tests.stages.reference import make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' DPM++

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "wan_facts.json").read_text())
FACT_NAMES: dict[SolverName, str] = {"unipc": "unipc", "dpm++": "dpmpp"}
"""The solvers of the original."""
SOLVERS: list[SolverName] = ["unipc", "dpm++", "euler"]


def field(x: Tensor, timestep: int) -> Tensor:
    """A velocity that depends on the sample, as the regression vectors have it."""
    return torch.sin(3 * x) + 0.1 * timestep / 1000


def run(schedule: Schedule, sample: Tensor) -> Tensor:
    state = new_state(schedule, sample)
    for i in range(schedule.start, schedule.steps):
        sample, state = step(schedule, i, field(sample, schedule.timesteps[i]), sample, state)
    return sample


def run_diffusers(schedule: Schedule, sample: Tensor) -> Tensor:
    """The same sigmas and timesteps in Diffusers' scheduler, in float64: what rounding-free arithmetic would give."""
    scheduler = make_scheduler(schedule, torch.float64)
    scheduler.set_timesteps(schedule.steps)
    scheduler.set_begin_index(schedule.start)
    sample = sample.double()
    for i in range(schedule.start, schedule.steps):
        velocity = field(sample, schedule.timesteps[i])
        sample = scheduler.step(velocity, scheduler.timesteps[i], sample, return_dict=False)[0]
    return sample


def noise() -> Tensor:
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("solver", FACT_NAMES)
@pytest.mark.parametrize("grid", FACTS["schedules"])
def test_original_grids(solver: SolverName, grid: str) -> None:
    """Sigmas (as float32) and timesteps of the original's eight grids: equal, to the last bit."""
    steps, shift = grid.split("@")
    schedule = make_schedule(solver, int(steps), float(shift))
    fact = FACTS["schedules"][grid]
    assert list(schedule.sigmas) == fact[f"{FACT_NAMES[solver]}_sigmas"]
    assert list(schedule.timesteps) == fact[f"{FACT_NAMES[solver]}_timesteps"]


@pytest.mark.parametrize("solver", FACT_NAMES)
@pytest.mark.parametrize("grid", ["10@5", "20@3"])
def test_original_trajectories(solver: SolverName, grid: str) -> None:
    """The original's results on a nonlinear field, known to 7 decimals."""
    steps, shift = grid.split("@")
    actual = run(make_schedule(solver, int(steps), float(shift)), torch.linspace(-1, 1, 8))
    expected = torch.tensor(FACTS["regression"][f"{FACT_NAMES[solver]}_{grid}"])
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 15, 20, 40, 60])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0, 16.0])
@pytest.mark.parametrize("part", [1.0, 0.6])
def test_trajectories_equal_diffusers(solver: SolverName, steps: int, shift: float, part: float) -> None:
    """Whole trajectories, also from the middle of the grid with an empty history, within 2e-6 of Diffusers'."""
    schedule = make_schedule(solver, steps, shift, start=int(steps - steps * part))
    assert relative_error(run(schedule, noise()), run_diffusers(schedule, noise())) <= 2e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    solver=st.sampled_from(SOLVERS), steps=st.integers(4, 60), shift=st.floats(1, 16), part=st.floats(0.01, 1)
)  # fmt: skip
def test_any_trajectory_equals_diffusers(solver: SolverName, steps: int, shift: float, part: float) -> None:
    """Any number of steps, any shift, any entry into the grid: within 2e-6 of Diffusers' on the same sigmas."""
    schedule = make_schedule(solver, steps, shift, start=steps - max(1, int(steps * part)))
    assert relative_error(run(schedule, noise()), run_diffusers(schedule, noise())) <= 2e-6


def test_the_grid_of_distilled_checkpoints() -> None:
    """4 Euler steps at shift 5 are the base steps 1000, 750, 500, 250, shifted: the sigmas and timesteps that the
    checkpoints were trained at, and, to the last bit, what Diffusers' Euler makes of those base steps."""
    schedule = make_schedule("euler", 4, 5.0)
    assert schedule.timesteps == (1000, 937, 833, 625)
    assert schedule.sigmas == pytest.approx((1.0, 0.9375, 0.83333333, 0.625, 0.0), abs=1e-7)
    reference = FlowMatchEulerDiscreteScheduler(shift=5.0)
    reference.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert list(schedule.sigmas) == reference.sigmas.tolist()
    assert list(schedule.timesteps) == reference.timesteps.long().tolist()


@pytest.mark.parametrize("grid", FACTS["schedules"])
def test_euler_has_the_grid_of_dpm(grid: str) -> None:
    """The original has no Euler solver: ours starts at pure noise, on the grid of its dpm++."""
    steps, shift = grid.split("@")
    schedule = make_schedule("euler", int(steps), float(shift))
    assert list(schedule.sigmas) == FACTS["schedules"][grid]["dpmpp_sigmas"]
    assert list(schedule.timesteps) == FACTS["schedules"][grid]["dpmpp_timesteps"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_perfect_velocity_ends_at_the_data(solver: SolverName, steps: int) -> None:
    """A velocity that points straight at the data, whatever the sample: it is reached, from pure noise too, where
    lambda is infinite."""
    schedule = make_schedule(solver, steps, 5.0)
    x0 = torch.linspace(-1, 1, 8)
    sample, state = noise()[0, :8], new_state(schedule, x0)
    for i in range(schedule.steps):
        sample, state = step(schedule, i, (sample - x0) / schedule.sigmas[i], sample, state)
    assert torch.allclose(sample, x0, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_converges(solver: SolverName) -> None:
    """On dx/dsigma = x the exact flow multiplies by exp(-sigma): 200 steps come within 1 %, and 400 come closer."""
    errors = []
    for steps in (200, 400):
        schedule = make_schedule(solver, steps, 1.0)
        sample = torch.ones(1)
        state = new_state(schedule, sample)
        for i in range(steps):
            sample, state = step(schedule, i, sample, sample, state)
        errors.append(abs(float(sample) / math.exp(-schedule.sigmas[0]) - 1))
    assert errors[1] < errors[0] < 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_can_be_stored(solver: SolverName) -> None:
    """The state has a fixed shape, and step leaves its arguments alone: a step can be done again from stored copies."""
    schedule = make_schedule(solver, 6, 5.0)
    sample = noise()
    state = new_state(schedule, sample)
    for i in range(schedule.steps):
        assert state.shape == (STATE_TENSORS[solver], *sample.shape)
        assert state.dtype == torch.float32
        kept = sample.clone(), state.clone()
        velocity = field(sample, schedule.timesteps[i])
        first = step(schedule, i, velocity, sample, state)
        assert torch.equal(sample, kept[0])
        assert torch.equal(state, kept[1])
        sample, state = step(schedule, i, velocity, *kept)
        assert torch.equal(sample, first[0])
        assert torch.equal(state, first[1])


def test_half_precision_velocity() -> None:
    """A bf16 velocity or sample: the arithmetic and the results are float32."""
    schedule = make_schedule("unipc", 4, 5.0)
    sample = noise().bfloat16()
    following, state = step(schedule, 0, sample, sample, new_state(schedule, sample))
    assert following.dtype == state.dtype == torch.float32


def test_add_noise() -> None:
    """Straight-line interpolation between data and noise."""
    data, noises = torch.tensor([2.0]), torch.tensor([-2.0])
    assert add_noise(data, noises, 0.25).tolist() == [1.0]


def test_longest_grid() -> None:
    """1000 steps at a high shift still decrease strictly and give finite samples."""
    schedule = make_schedule("unipc", 1000, 16.0)
    assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))
    assert run(schedule, noise()).isfinite().all()


def test_wrong_arguments() -> None:
    """Values out of range: ValueError that says what was expected and what came."""
    with pytest.raises(ValueError, match="steps must be 1 to 1000, got 0"):
        make_schedule("unipc", 0, 5.0)
    with pytest.raises(ValueError, match="shift must be above 0 and at most 100, got 0"):
        make_schedule("unipc", 4, 0)
    with pytest.raises(ValueError, match=r"start must be 0 to 3, got 4"):
        make_schedule("unipc", 4, 5.0, start=4)
    with pytest.raises(ValueError, match=r"solver must be one of unipc, dpm\+\+, euler, got 'heun'"):
        make_schedule("heun", 4, 5.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be 2 to 3, got 1"):
        step(make_schedule("euler", 4, 5.0, start=2), 1, noise(), noise(), noise())
