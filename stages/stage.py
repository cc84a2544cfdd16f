"""What every stage is to the worker loop, and what the loop gives it. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from ipc.messages import Component, Job, Run, Start
from ipc.state import StateSlots
from ipc.tensor_queue import TensorQueue

QUEUE_TIMEOUT = 30.0
"""Seconds to wait for a slot. The scheduler grants a quantum only when its slots are there, so a wait is a defect."""


class Links(NamedTuple):
    """The shared memory of this process and its sign of life."""

    inputs: Mapping[str, TensorQueue]
    """By name, attached as their consumer."""
    outputs: Mapping[str, TensorQueue]
    """By name, attached as their producer."""
    states: StateSlots | None
    beat: Callable[[], None]
    """To be called often enough that a long quantum does not look hung."""


class StageState(msgspec.Struct, frozen=True):
    """What a stage holds: for integrity checks and tests."""

    tasks: frozenset[str]
    bytes: int
    """Held for those tasks beside shared memory: caches, latents, compressed video."""


class Stage(Protocol):
    """One stage, loaded. `begin`, the quanta by `step`, `drop`: for each task in this order, any number of tasks at once.

    A `step` may come again for a quantum that was done (after a crash, or to start over) and then leaves the same result.
    After an `EngineError` from `step` the stage goes on with other tasks; `drop` follows for the failed one.
    """

    @property
    def weights(self) -> Mapping[str, str]:
        """Component -> content hash, of what this stage loaded."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Library -> version, of those that the result depends on."""

    def begin(self, job: Job) -> None: ...

    def step(self, run: Run) -> dict[str, Any] | None:
        """Run one quantum; the last `write` returns the metadata of the file."""

    def drop(self, identity: str) -> None:
        """Forget the task, free its input slots. Of a task that it does not know, too."""

    def state(self) -> StageState: ...


def component(start: Start, name: str) -> Component:
    """The component of this name; the supervisor sends all that the model has."""
    return next(c for c in start.components if c.name == name)
