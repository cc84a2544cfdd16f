"""Memory that processes share: how to attach to it, how much of a device they take, who makes it."""

from __future__ import annotations

from typing import Annotated

import msgspec


class QueueSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to attach to a `TensorQueue`: its descriptors travel with the message, in the order of the specs."""

    name: str
    slots: int
    slot_bytes: int
    device: int | None = None
    """Number of the GPU that the payload is on; None: host memory."""
    producers: int = 1
    consumers: int = 1


class StateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to attach to the DiT's `StateSlots`."""

    slots: int
    slot_bytes: int
    device: int | None = None
    """Number of the GPU that the payload is on; None: host memory."""
    shared: bool = False
    """Several processes compute: only the supervisor hands out free slots."""


OFFLOADED = 2
"""From this memory level on, weights are in host memory."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the weights a process keeps in its device's memory (docs/memory.md). No plan changes a result."""

    level: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    """0: all. 1: all, and the VAE in tiles. 2: what is not in use now is in host memory: text encoder, VAE, the expert
    that is not at work. 3: the DiT's blocks, too, come from there as they are needed."""
    blocks: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """At level 3: of the DiT's blocks, so many stay on the device. None: none."""


class MakeMemory(msgspec.Struct, frozen=True, tag_field="type", tag="make", kw_only=True):
    """Allocate pieces of these sizes on GPU number `device`, with a pattern in them; their descriptors come back."""

    device: int
    sizes: list[int]


class ProbeMemory(msgspec.Struct, frozen=True, tag_field="type", tag="probe", kw_only=True):
    """Map these pieces, whose descriptors come along, look for the pattern and clear it."""

    device: int
    sizes: list[int]


class MemoryReply(msgspec.Struct, frozen=True, kw_only=True):
    """`problem` is empty if all went well."""

    problem: str
