"""What every stage is to the worker loop, and what the loop gives it. No torch here."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec

from ipc.messages.job import Job
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import StageName
from ipc.messages.reports import Chosen, Parts, VaeChosen
from ipc.messages.stage import Run, Start
from ipc.messages.status import Copied
from ipc.messages.weights import Component, WeightVersion
from ipc.slot_table import Side
from ipc.state import FDS_PER_STATE, StateSlots
from ipc.tensor_queue import FDS_PER_QUEUE, TensorQueue
from stages.outbox import Delivery

PRODUCERS: dict[str, StageName] = {"prompts": "text", "init_latents": "vae", "latents": "dit", "frames": "vae"}
CONSUMERS: dict[str, StageName] = {"prompts": "dit", "init_latents": "dit", "latents": "vae", "frames": "writer"}
"""Queue -> the stage at that end of it."""

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
    loading: Callable[[str, int, int], None]
    """To be called as weights are read: the component, the bytes read, the bytes there are."""
    placed: Mapping[str, Sequence[tuple[WeightVersion, int]]]
    """Component -> its versions that are in memory already, with their descriptors, which are the caller's."""
    place: Callable[[WeightVersion, str, int], None]
    """Hands the supervisor a component that was read to a device, with its descriptor, which stays the caller's."""
    unlocked: Callable[[str, str, str], None]
    """Tells the supervisor, from any thread, of a version of a component in host memory whose pages could not be locked
    for the GPU, and why."""
    choose: Callable[[Chosen | VaeChosen], None]
    """Tells the supervisor what the dit, or the vae, computes with."""
    placing: Callable[[str], None]
    """Tells the supervisor that the file of a task is given its name now."""
    deliver: Callable[[Delivery], None]
    """Has the result of a quantum brought to where it is read, after its step; while the next quantum computes, if
    there is one. The quantum counts as done after that."""


Left: TypeAlias = list[tuple[str, str]]
"""Component and content hash of versions."""


class StageState(msgspec.Struct, frozen=True):
    """What a stage holds: for integrity checks and tests."""

    tasks: frozenset[str]
    bytes: int
    """Held for those tasks beside shared memory: caches, latents, compressed video."""


class AnyNetwork(Protocol):
    """What the worker loop knows of a `stages.weights.Network`."""

    def adopt(self, version: WeightVersion, fd: int) -> None: ...

    def forget(self, content: str) -> None: ...

    def lend(self, version: WeightVersion, fd: int) -> None: ...


class Stage(Protocol):
    """One stage, loaded. For each task `begin`, `step` per quantum, `drop`; any number of tasks at once.

    A `step` may come again for a quantum that was done (after a crash, or to start over) and then leaves the same
    result. After an error in `step` the stage goes on with other tasks; `drop` follows for the failed one.
    """

    @property
    def weights(self) -> Mapping[str, str]:
        """Component -> content hash, of what this stage has bound."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Library -> version, of those that the result depends on."""

    @property
    def networks(self) -> Mapping[str, AnyNetwork]:
        """By component: whose versions can change while this stage lives."""

    def begin(self, job: Job) -> None:
        """Know a task; or its `changes`, if it is known."""

    def step(self, run: Run) -> dict[str, Any] | Parts | None:
        """Run one quantum. The last `write` returns the metadata of the file; a quantum of a phase that is done in
        parts, how many are done: while some are left, it has left nothing, and comes again."""

    def drop(self, identity: str) -> None:
        """Forget the task, free its input slots. Of a task that it does not know, too."""

    def rehearse(self) -> None:
        """Compute something small, without queues; raises what a quantum would."""

    def set_memory(self, plan: MemoryPlan, left: Left) -> None:
        """Keep so much of the weights on the device from now on. What was mapped there, and is not any more, is added
        to `left`. Raises `OutOfMemory`, and what `Network.offload` does; the plan before holds then, and what is in
        `left` is true as well."""

    def copied(self) -> Copied | None:
        """What was copied to the device beside its quanta and was not told of yet."""

    def state(self) -> StageState: ...


def attach_links(
    start: Start,
    fds: list[int],
    beat: Callable[[], None],
    loading: Callable[[str, int, int], None],
    place: Callable[[WeightVersion, str, int], None],
    unlocked: Callable[[str, str, str], None],
    choose: Callable[[Chosen | VaeChosen], None],
    placing: Callable[[str], None],
    deliver: Callable[[Delivery], None],
) -> Links:
    """Map what `start` names. `fds`: those of each queue, then those of the state slots, then one of each placed
    component; they stay the caller's."""
    inputs = _attach(start, fds, "consumer", CONSUMERS)
    outputs = _attach(start, fds, "producer", PRODUCERS)
    states = None
    fds = fds[len(start.queues) * FDS_PER_QUEUE :]
    if start.state is not None:
        states = StateSlots.attach(start.state, fds[:FDS_PER_STATE], start.epoch)
        fds = fds[FDS_PER_STATE:]
    placed: dict[str, list[tuple[WeightVersion, int]]] = collections.defaultdict(list)
    for version, fd in zip(start.placed, fds, strict=True):
        placed[version.component].append((version, fd))
    return Links(inputs, outputs, states, beat, loading, placed, place, unlocked, choose, placing, deliver)


def _attach(start: Start, fds: list[int], side: Side, stages: Mapping[str, StageName]) -> dict[str, TensorQueue]:
    """The ends on this side of the queues, of those whose stage is in this process."""
    return {
        spec.name: TensorQueue.attach(
            spec, fds[i * FDS_PER_QUEUE : (i + 1) * FDS_PER_QUEUE], side, start.epoch, start.number
        )
        for i, spec in enumerate(start.queues)
        if stages[spec.name] in start.stages
    }


def component(start: Start, name: str) -> Component:
    """The component of this name; the supervisor sends all that the model has."""
    return next(c for c in start.components if c.name == name)
