"""The training loop shared by all stages of `tools/train_demo.py`: AdamW, EMA, and the whole step as one CUDA graph.

The networks are so small that launching their kernels takes longer than running them; replaying a recorded step does
not launch. So a loss function must draw its own batch with the default generator, never ask the GPU for a value, and
always use the same shapes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WARMUP_CALLS = 4
"""Ordinary steps before recording: they compile kernels, create the optimizer's state and count as training."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Length and learning rate of one phase. Ends at `steps` or after `seconds`, whichever comes first.

    The learning rate rises over `warmup` steps and falls by a cosine to `final` of its peak; it follows whichever of
    steps and seconds is further along, so that a slow machine also ends with a low rate.
    """

    steps: int
    seconds: float
    rate: float
    warmup: int = 200
    final: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999

    def rate_at(self, step: int, elapsed: float) -> float:
        """Learning rate before step `step` (from 0), `elapsed` seconds after the start."""
        progress = min(1.0, max(step / self.steps, elapsed / self.seconds))
        cosine = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.rate * min(1.0, (step + 1) / self.warmup) * cosine


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a phase did."""

    steps: int
    seconds: float
    loss: float


class Ema:
    """Exponential moving averages of named parameters, float32, on their device."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.live = list(parameters.values())
        self.average = [parameter.detach().clone() for parameter in self.live]
        self.weight = torch.ones((), device=self.live[0].device)
        """Share of the live value in the next update; a tensor, so that a recorded step can follow it."""

    def update(self) -> None:
        """Move the averages towards the live values."""
        change = torch._foreach_sub([parameter.detach() for parameter in self.live], self.average)
        torch._foreach_mul_(change, self.weight)
        torch._foreach_add_(self.average, change)

    def copy_to_live(self) -> None:
        """Overwrite the live parameters with their averages."""
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.average)


def train(
    name: str, parameters: Mapping[str, nn.Parameter], loss: Callable[[], Tensor], schedule: Schedule, every: int = 500
) -> Outcome:
    """Run one phase; on return the parameters hold their EMA. Prints the mean loss `every` so many steps."""
    device = next(iter(parameters.values())).device
    stepper = _Stepper(parameters, loss, schedule, device)
    start = window = time.monotonic()
    step, mean = 0, math.nan
    while step < schedule.steps and time.monotonic() - start < schedule.seconds:
        stepper.rate.fill_(schedule.rate_at(step, time.monotonic() - start))
        stepper.ema.weight.fill_(1 - min(schedule.ema, (1 + step) / (10 + step)))
        stepper.step()
        step += 1
        if step % every == 0 or step == schedule.steps:
            count = step % every or every
            mean = float(stepper.loss_sum) / count
            stepper.loss_sum.zero_()
            now = time.monotonic()
            print(
                f"{name}: step {step} loss {mean:.5f} {count / (now - window):.1f} steps/s {now - start:.0f} s",
                flush=True,
            )
            window = now
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name}: loss is {mean} at step {step}")
        elif step % 20 == 0 and device.type == "cuda":
            torch.cuda.synchronize(device)  # Keeps the host at most 20 replays ahead, so that the time limit holds.
    stepper.ema.copy_to_live()
    return Outcome(step, time.monotonic() - start, mean)


class _Stepper:
    """One training step, recorded as a CUDA graph after `WARMUP_CALLS` ordinary ones."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[], Tensor],
        schedule: Schedule,
        device: torch.device,
    ) -> None:
        self.parameters, self.loss, self.schedule = list(parameters.values()), loss, schedule
        self.rate = torch.tensor(schedule.rate, device=device)
        self.loss_sum = torch.zeros((), device=device)
        self.ema = Ema(parameters)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.on_cuda = device.type == "cuda"
        matrices = [p for p in self.parameters if p.ndim >= 2]
        rest = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=self.rate if self.on_cuda else schedule.rate,
            betas=schedule.betas,
            capturable=self.on_cuda,
            fused=True,
        )
        self.stream = torch.cuda.Stream(device) if self.on_cuda else None

    def step(self) -> None:
        """Train on one batch."""
        if not self.on_cuda:
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rate)
            self._compute()
            return
        if self.graph is None and self.calls >= WARMUP_CALLS:
            self._record()
        if self.graph is not None:
            self.graph.replay()
            return
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._compute()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.calls += 1

    def _record(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._compute()

    def _compute(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip, foreach=True)
        self.optimizer.step()
        self.ema.update()
        self.loss_sum += loss.detach().float()


def save_module(module: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a module's parameters, each once, in `dtype`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().to("cpu", dtype).contiguous() for name, parameter in module.named_parameters()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_module(module: nn.Module, path: Path) -> None:
    """Read what `save_module` wrote; the names must match exactly."""
    parameters = dict(module.named_parameters())
    tensors = load_file(path)
    if tensors.keys() != parameters.keys():
        raise ValueError(f"{path.name} does not fit: {sorted(tensors.keys() ^ parameters.keys())[:4]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
