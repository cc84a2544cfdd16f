"""Solvers of the flow ODE: from noise (sigma 1) to latents (sigma 0) along the velocities that the DiT predicts.

A latent at noise level sigma is x = (1 - sigma) * x0 + sigma * noise, and the DiT predicts v = noise - x0, so that
x0 = x - sigma * v. With alpha = 1 - sigma and lambda = log(alpha / sigma), the exponential integrators below step from
sigma to the next sigma by h, the difference of the lambdas.

Everything is pure. `make_schedule` gives the grid, `new_state` an empty history, and `step` maps (velocity, sample,
state) to (sample, state); how much of the history is valid follows from the step index, so a state is one tensor of
fixed shape that can be stored between any two steps. Scalars are float64, tensors float32.

Sources: the Wan2.1 repository (`wan/utils/fm_solvers_unipc.py`, `fm_solvers.py`); UniPC, Zhao et al. 2023;
DPM-Solver++, Lu et al. 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

SolverName = Literal["unipc", "dpm++", "euler"]

TRAIN_TIMESTEPS = 1000
MAX_SHIFT = 100.0
STATE_TENSORS: dict[SolverName, int] = {"unipc": 3, "dpm++": 1, "euler": 0}
"""Tensors of history: unipc (x0 one step ago, x0 two steps ago, sample before the last prediction); dpm++ (x0 one step
ago)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The noise levels of one request. Step i goes from sigmas[i] to sigmas[i + 1]; the first one is `start`."""

    solver: SolverName
    sigmas: tuple[float, ...]
    """steps + 1 values, each a float32, strictly decreasing, the last one 0: for the solver."""
    timesteps: tuple[int, ...]
    """What the DiT is given at each step: 1000 * sigma, truncated (of the float64 sigma, as in the original)."""
    start: int = 0
    """First step to run: above 0 when the sample starts from a noised input (an init video)."""

    @property
    def steps(self) -> int:
        """Steps of the whole grid, those before `start` included."""
        return len(self.timesteps)


def make_schedule(solver: SolverName, steps: int, shift: float, start: int = 0) -> Schedule:
    """The original's grid: uniform sigmas, then s' = shift * s / (1 + (shift - 1) * s).

    unipc starts at 1 - 1/1000, dpm++ and euler at 1; all end one uniform step above 0. 4 euler steps at shift 5 are the
    grid that step-distilled checkpoints were trained for.
    """
    if not 1 <= steps <= TRAIN_TIMESTEPS:
        raise ValueError(f"steps must be 1 to {TRAIN_TIMESTEPS}, got {steps}")
    if not 0 < shift <= MAX_SHIFT:
        raise ValueError(f"shift must be above 0 and at most {MAX_SHIFT:g}, got {shift}")
    if solver not in STATE_TENSORS:
        raise ValueError(f"solver must be one of {', '.join(STATE_TENSORS)}, got {solver!r}")
    if not 0 <= start < steps:
        raise ValueError(f"start must be 0 to {steps - 1}, got {start}")
    # The original keeps the first sigma of unipc in a float32.
    first = float(np.float32(1 - 1 / TRAIN_TIMESTEPS)) if solver == "unipc" else 1.0
    uniform = np.linspace(first, 0, steps + 1)[:-1]
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    timesteps = tuple((sigmas * TRAIN_TIMESTEPS).astype(np.int64).tolist())
    return Schedule(solver, (*sigmas.astype(np.float32).tolist(), 0.0), timesteps, start)


def add_noise(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma) * latents + sigma * noise."""
    return (1 - sigma) * latents + sigma * noise


def new_state(schedule: Schedule, sample: Tensor) -> Tensor:
    """An empty history for this sample: [STATE_TENSORS, *sample.shape] float32 zeros."""
    return sample.new_zeros((STATE_TENSORS[schedule.solver], *sample.shape), dtype=torch.float32)


def step(schedule: Schedule, index: int, velocity: Tensor, sample: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step `index`: the sample at sigmas[index] and the DiT's velocity there -> the sample at sigmas[index + 1].

    Steps run in order from `schedule.start`. Returns new float32 tensors; the arguments are left as they are.
    """
    if not schedule.start <= index < schedule.steps:
        raise ValueError(f"step must be {schedule.start} to {schedule.steps - 1}, got {index}")
    velocity, sample = velocity.float(), sample.float()
    match schedule.solver:
        case "euler":
            return sample + (schedule.sigmas[index + 1] - schedule.sigmas[index]) * velocity, state
        case "dpm++":
            return _dpm_step(schedule, index, sample - schedule.sigmas[index] * velocity, sample, state)
        case "unipc":
            return _unipc_step(schedule, index, sample - schedule.sigmas[index] * velocity, sample, state)


def _dpm_step(schedule: Schedule, index: int, x0: Tensor, sample: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """DPM-Solver++ 2M, midpoint; the first and the last step are of first order."""
    if schedule.start < index < schedule.steps - 1:
        ratio = _lambda_step(schedule, index) / _lambda_step(schedule, index - 1)
        target = x0 + (0.5 * ratio) * (x0 - state[0])
    else:
        target = x0
    return _integrate(schedule, index, sample, target), x0.unsqueeze(0)


def _unipc_step(schedule: Schedule, index: int, x0: Tensor, sample: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """UniPC (B2, data prediction, order 2): correct the sample with the x0 found at it, then predict the next one.

    The corrector does not run the DiT again: x0 stays the one found before the correction.
    """
    newest, older, before = state
    if index > schedule.start:
        sample = _unipc_correct(schedule, index, x0, newest, older, before)
    target = x0
    if _unipc_order(schedule, index) == 2:
        # (m1 - m0) / r with r = (lambda of m1 - lambda of m0) / h, negative.
        ratio = _lambda_step(schedule, index) / _lambda_step(schedule, index - 1)
        target = x0 + (0.5 * ratio) * (x0 - newest)
    return _integrate(schedule, index, sample, target), torch.stack((x0, newest, sample))


def _unipc_order(schedule: Schedule, index: int) -> int:
    """Order of the prediction from this step: limited by the history and by the steps left."""
    return min(2, schedule.steps - index, index - schedule.start + 1)


def _unipc_correct(schedule: Schedule, index: int, x0: Tensor, newest: Tensor, older: Tensor, before: Tensor) -> Tensor:
    """Redo the step that led to `index`, from the sample before it, now that x0 at its end is known."""
    previous = index - 1
    h = _lambda_step(schedule, previous)
    if _unipc_order(schedule, previous) == 1:
        return _integrate(schedule, previous, before, newest + 0.5 * (x0 - newest))
    # The weights solve [[1, 1], [r, 1]] rho = (b1, b2).
    r = -_lambda_step(schedule, previous - 1) / h
    phi1 = math.expm1(-h)
    phi2 = phi1 / -h - 1
    phi3 = phi2 / -h - 0.5
    b1, b2 = phi2 / phi1, 2 * phi3 / phi1
    rho_older = (b2 - b1) / (r - 1)
    target = newest + (rho_older / r) * (older - newest) + (b1 - rho_older) * (x0 - newest)
    return _integrate(schedule, previous, before, target)


def _integrate(schedule: Schedule, index: int, sample: Tensor, target: Tensor) -> Tensor:
    """Solve step `index` exactly for a constant x0 = `target`; at sigma 0 that is `target` itself."""
    sigma, following = schedule.sigmas[index], schedule.sigmas[index + 1]
    ratio = following / sigma
    return ratio * sample - (1 - following) * math.expm1(-_lambda_step(schedule, index)) * target


def _lambda_step(schedule: Schedule, index: int) -> float:
    """h = lambda(sigmas[index + 1]) - lambda(sigmas[index]); infinite when a side is pure noise or pure data."""
    return _lambda(schedule.sigmas[index + 1]) - _lambda(schedule.sigmas[index])


def _lambda(sigma: float) -> float:
    """log(alpha / sigma)."""
    if sigma == 0:
        return math.inf
    if sigma == 1:
        return -math.inf
    return math.log1p(-sigma) - math.log(sigma)
