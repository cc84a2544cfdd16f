"""A scheduler to play with: capacities, tasks, and stages that answer when a test says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.events import (
    Action,
    Capacity,
    Event,
    Fail,
    Finish,
    Grant,
    QuantumEnded,
    Report,
    StageLost,
    StageUp,
    Submitted,
    TaskDropped,
    TaskSpec,
)
from engine.params import STAGES
from engine.scheduler import Scheduler
from ipc.messages.names import STAGE_OF_PHASE, Phase, Seat
from tests.engine.simulator import World

ONE_GPU: dict[Seat, str | None] = {"text": "gpu", "dit": "gpu", "vae": "gpu", "writer": None}
FOUR_DEVICES: dict[Seat, str | None] = {"text": "gpu0", "dit": "gpu1", "vae": "gpu2", "writer": None}
TWO_DITS: dict[Seat, str | None] = {**FOUR_DEVICES, "dit:1": "gpu3"}


def capacity(devices: dict[Seat, str | None] = ONE_GPU, **bounds: int) -> Capacity:
    defaults = {"prompts": 4, "init_latents": 2, "states": 2, "latents": 3, "frames": 4}
    return Capacity(devices=devices, **(defaults | bounds))


def task(id: str = "a", *, denoise: int = 3, chunks: int = 2, step: float = 1.0, **rest: Any) -> TaskSpec:
    cost: dict[Phase, float] = {"text": 0.1, "encode": 0.1, "denoise": step, "decode": 0.2, "write": 0.1}
    fields: dict[str, Any] = {"encode": False, "cost": cost} | rest
    return TaskSpec(id=id, denoise=denoise, chunks=chunks, **fields)


class Stages:
    """A scheduler and the plainest of stages: every grant is answered when the test says so."""

    def __init__(self, bounds: Capacity | None = None, up: Iterable[Seat] = STAGES) -> None:
        self.scheduler = Scheduler(bounds or capacity())
        self.epochs: dict[Seat, int] = {}
        for epoch, stage in enumerate(up, 1):
            self.up(stage, epoch)

    def tell(self, event: Event, now: float = 0.0) -> list[Action]:
        """What the scheduler wants done, without its reports."""
        actions: list[Action] = [action for action in self.scheduler.on(event, now) if not isinstance(action, Report)]
        assert self.scheduler.check() == []
        return actions

    def up(self, stage: Seat, epoch: int) -> list[Action]:
        self.epochs[stage] = epoch
        return self.tell(StageUp(stage, epoch))

    def lost(self, stage: Seat, now: float = 0.0) -> list[Action]:
        return self.tell(StageLost(stage, self.epochs[stage]), now)

    def submit(self, spec: TaskSpec) -> list[Action]:
        return self.tell(Submitted(spec))

    def ended(self, id: str, phase: Phase, index: int = 0, seat: Seat | None = None, **rest: Any) -> list[Action]:
        stage = seat or STAGE_OF_PHASE[phase]
        return self.tell(QuantumEnded(stage, self.epochs[stage], id, phase, index, **rest))

    def dropped(self, id: str, stage: Seat) -> list[Action]:
        return self.tell(TaskDropped(stage, self.epochs[stage], id))

    def denoised(self, spec: TaskSpec) -> None:
        """Bring a task, alone, to its first decode grants."""
        self.submit(spec)
        self.ended(spec.id, "text")
        for step in range(spec.denoise):
            self.ended(spec.id, "denoise", step)


def ends(world: World) -> dict[str, float]:
    """When each task ended."""
    return {action.id: now for now, action in world.log if isinstance(action, Finish | Fail)}


def grants(world: World, stage: Seat) -> list[str]:
    """Task ids in the order in which this seat was granted quanta of them."""
    return [action.id for _, action in world.log if isinstance(action, Grant) and action.stage == stage]
