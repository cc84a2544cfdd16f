"""The memory of one engine that its processes share: every queue and the DiT's state slots, on the host or on a GPU.

The supervisor holds it: stages come and go, this memory stays. Sizes follow from the model's limits, so nothing is
allocated per request.

Resource handling: owns all memfds and eventfds until `close`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

from engine.events import Capacity
from engine.params import ModelParams
from ipc.messages import QueueSpec, QueueStatistics, StageName, StateSpec
from ipc.payload import DeviceFd, payload_bytes
from ipc.state import StateSlots, state_payload_bytes
from ipc.tensor_queue import TensorQueue

DECODE_LATENTS = 1
"""Latent frames per decode quantum. Two at a time take nearly twice the memory: at 1280x720 in float32, 36 GiB."""

PROMPTS, INIT_LATENTS, STATES, LATENTS, FRAMES = 4, 2, 2, 3, 4
"""Bounds, in tasks (frames: in chunks). Text may run ahead of the dit by `PROMPTS` tasks."""

STATE_TENSORS = 5
"""Latents and the longest solver history (UniPC: two x0, the sample kept before the predictor), with one to spare."""

QueueName = Literal["prompts", "init_latents", "latents", "frames"]

DeviceSizes = Mapping[str, int]
"""Queue, or "state" -> bytes of its payload."""

ON_DEVICE: tuple[QueueName, ...] = ("prompts", "init_latents", "latents")
"""Queues whose both ends compute on the GPU."""


class _Route(msgspec.Struct, frozen=True):
    producer: StageName
    consumer: StageName


ROUTES: dict[QueueName, _Route] = {
    "prompts": _Route("text", "dit"),
    "init_latents": _Route("vae", "dit"),
    "latents": _Route("dit", "vae"),
    "frames": _Route("vae", "writer"),
}


def capacity(devices: dict[StageName, str | None]) -> Capacity:
    """The bounds of the queues, for the scheduler."""
    return Capacity(
        devices=devices, prompts=PROMPTS, init_latents=INIT_LATENTS, states=STATES, latents=LATENTS, frames=FRAMES
    )


class SlotSizes(NamedTuple):
    """Slots and bytes per slot, of each queue and of the states."""

    queues: dict[QueueName, tuple[int, int]]
    states: tuple[int, int]

    @property
    def total(self) -> int:
        """Bytes of host memory, headers aside. A state slot has two halves."""
        slots, slot_bytes = self.states
        return sum(count * size for count, size in self.queues.values()) + 2 * slots * slot_bytes


def slot_sizes(model: ModelParams, decode_latents: int = DECODE_LATENTS) -> SlotSizes:
    """The largest request of the model fits into every slot."""
    limits, vae, transformer, image = model.limits, model.vae, model.transformer, model.image_encoder
    latent_frames = (limits.max_frames - 1) // vae.temporal_stride + 1
    latents = vae.z_dim * latent_frames * (limits.max_pixels // vae.spatial_stride**2) * 4
    image_tokens = image.tokens * image.hidden_size * 4 if image is not None else 0
    queues: dict[QueueName, tuple[int, int]] = {
        "prompts": (2 * PROMPTS, transformer.text_len * transformer.text_dim * 4),
        "init_latents": (INIT_LATENTS * (1 if image is None else 2), max(latents, image_tokens)),
        "latents": (LATENTS, latents),
        "frames": (FRAMES, decode_latents * vae.temporal_stride * limits.max_pixels * 3),
    }
    return SlotSizes(queues, (STATES, STATE_TENSORS * latents))


def device_sizes(model: ModelParams) -> DeviceSizes:
    """What the model takes of a GPU for queues and states."""
    sizes = slot_sizes(model)
    return {name: payload_bytes(*sizes.queues[name]) for name in ON_DEVICE} | {
        "state": state_payload_bytes(*sizes.states)
    }


class EngineMemory:
    """Queues and state slots of one engine. Making them raises OSError when memory or descriptors are lacking."""

    def __init__(
        self, model: ModelParams, decode_latents: int = DECODE_LATENTS, device: Mapping[str, DeviceFd] | None = None
    ) -> None:
        """`device`: GPU memory for those of `device_sizes`, which is taken over; the rest is host memory."""
        sizes, device = slot_sizes(model, decode_latents), device or {}
        self.queues: dict[QueueName, TensorQueue] = {}
        with contextlib.ExitStack() as undo:
            for name, (slots, slot_bytes) in sizes.queues.items():
                self.queues[name] = TensorQueue.create(name, slots, slot_bytes, device.get(name))
                undo.callback(self.queues[name].close)
            self.state = StateSlots.create(*sizes.states, device.get("state"))
            undo.pop_all()

    @property
    def on_device(self) -> bool:
        """There is GPU memory that outlives the processes, and what both ends of a queue compute with is in it."""
        return self.state.spec.device is not None

    def specs(self, stages: Collection[StageName]) -> list[QueueSpec]:
        """What a process with these stages attaches to; `fds` gives the descriptors in the same order."""
        return [self.queues[name].spec for name in self._names(stages)]

    def state_spec(self, stages: Collection[StageName]) -> StateSpec | None:
        return self.state.spec if "dit" in stages else None

    def fds(self, stages: Collection[StageName]) -> list[int]:
        fds = [fd for name in self._names(stages) for fd in self.queues[name].fds]
        return fds + (list(self.state.fds) if "dit" in stages else [])

    def reclaim(self, stages: Collection[StageName]) -> None:
        """The process of these stages is dead and reaped: give back what it was writing and reading."""
        for name, route in ROUTES.items():
            if route.producer in stages:
                self.queues[name].reclaim("producer")
            if route.consumer in stages:
                self.queues[name].reclaim("consumer")

    def purge(self, task: str, stage: StageName) -> None:
        """Free what is held of this task for this stage: the slots it would take, and the state if it is the dit."""
        for name, route in ROUTES.items():
            if route.consumer == stage:
                self.queues[name].purge(task)
        if stage == "dit":
            self.state.release(task)

    def statistics(self) -> list[QueueStatistics]:
        return [queue.statistics() for queue in self.queues.values()]

    def check_integrity(self) -> list[str]:
        """Problems found in the headers of all queues and states; empty when all is well."""
        problems = [p for queue in self.queues.values() for p in queue.check_integrity()]
        return problems + self.state.check_integrity()

    def close(self) -> None:
        for queue in self.queues.values():
            queue.close()
        self.state.close()

    @staticmethod
    def _names(stages: Iterable[StageName]) -> list[QueueName]:
        wanted = set(stages)
        return [name for name, route in ROUTES.items() if {route.producer, route.consumer} & wanted]
