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
from engine.states import Descriptors, State
from ipc.messages.memory import QueueSpec, StateSpec
from ipc.messages.names import Seat, StageName, stage_of
from ipc.messages.status import Holding, QueueStatistics
from ipc.payload import DeviceFd, payload_bytes
from ipc.state import StateSlots, state_payload_bytes
from ipc.tensor_queue import TensorQueue

DECODE_LATENTS = 1
"""Latent frames per decode quantum. Two of 1280x720, in float32, do not fit beside a 14B model and its text encoder
into 80 GB."""

PROMPTS, INIT_LATENTS, STATES, LATENTS, FRAMES = 4, 2, 2, 3, 4
"""Bounds with one dit, in tasks (frames: in chunks). Text may run ahead of the dit by `PROMPTS` tasks."""

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


def capacity(devices: dict[Seat, str | None]) -> Capacity:
    """The bounds of the queues, for the scheduler. Each further dit has as many tasks in the middle of denoising, with
    their inputs, as the first, and may leave latents while the others have left theirs."""
    more = sum(stage_of(seat) == "dit" for seat in devices) - 1
    return Capacity(
        devices=devices, prompts=PROMPTS + more * STATES, init_latents=(1 + more) * INIT_LATENTS,
        states=(1 + more) * STATES, latents=LATENTS + more, frames=FRAMES,
    )  # fmt: skip


class SlotSizes(NamedTuple):
    """Slots and bytes per slot, of each queue and of the states."""

    queues: dict[QueueName, tuple[int, int]]
    states: tuple[int, int]

    @property
    def total(self) -> int:
        """Bytes of host memory, headers aside. A state slot has two halves."""
        slots, slot_bytes = self.states
        return sum(count * size for count, size in self.queues.values()) + 2 * slots * slot_bytes


def slot_sizes(model: ModelParams, decode_latents: int = DECODE_LATENTS, dits: int = 1) -> SlotSizes:
    """The largest request of the model fits into every slot. Each dit has a slot for all latents there may be, so that
    none waits while another has slots to spare."""
    bounds = capacity({"dit" if number == 0 else f"dit:{number}": None for number in range(dits)})
    limits, vae, transformer, image = model.limits, model.vae, model.transformer, model.image_encoder
    latent_frames = (limits.max_frames - 1) // vae.temporal_stride + 1
    latents = vae.z_dim * latent_frames * (limits.max_pixels // vae.spatial_stride**2) * 4
    image_tokens = image.tokens * image.hidden_size * 4 if image is not None else 0
    queues: dict[QueueName, tuple[int, int]] = {
        "prompts": (2 * bounds.prompts, transformer.text_len * transformer.text_dim * 4),
        "init_latents": (bounds.init_latents * (1 if image is None else 2), max(latents, image_tokens)),
        "latents": (dits * bounds.latents, latents),
        "frames": (bounds.frames, decode_latents * vae.temporal_stride * limits.max_pixels * 3),
    }
    return SlotSizes(queues, (bounds.states, STATE_TENSORS * latents))


def device_sizes(model: ModelParams) -> DeviceSizes:
    """What the model takes of a GPU for queues and states."""
    sizes = slot_sizes(model)
    return {name: payload_bytes(*sizes.queues[name]) for name in ON_DEVICE} | {
        "state": state_payload_bytes(*sizes.states)
    }


class MemoryState(State, frozen=True, kw_only=True):
    """An `EngineMemory`; of each queue and of the states, the places of their descriptors."""

    queues: list[QueueSpec]
    fds: list[list[int]]
    state: StateSpec
    state_fds: list[int]
    on_device: bool


class EngineMemory:
    """Queues and state slots of one engine. Making them raises OSError when memory or descriptors are lacking."""

    def __init__(
        self,
        model: ModelParams,
        decode_latents: int = DECODE_LATENTS,
        dits: int = 1,
        device: Mapping[str, DeviceFd] | None = None,
    ) -> None:
        """`device`: GPU memory for what both ends of compute with, if that is one GPU: the names of `device_sizes`,
        taken over. Empty: there is such memory, but not for this. None: there is none. The rest is host memory."""
        self.on_device = device is not None
        """There is GPU memory that outlives the processes."""
        sizes, device = slot_sizes(model, decode_latents, dits), device or {}
        processes: dict[StageName, int] = {"text": 1, "dit": dits, "vae": 1, "writer": 1}
        self.queues: dict[QueueName, TensorQueue] = {}
        with contextlib.ExitStack() as undo:
            for name, (slots, slot_bytes) in sizes.queues.items():
                producers, consumers = processes[ROUTES[name].producer], processes[ROUTES[name].consumer]
                queue = TensorQueue.create(name, slots, slot_bytes, producers, consumers, device.get(name))
                undo.callback(queue.close)
                self.queues[name] = queue
            self.state = StateSlots.create(*sizes.states, shared=dits > 1, on=device.get("state"))
            undo.pop_all()

    def state_of(self, fds: Descriptors) -> MemoryState:
        """What it is made of, for the program that takes the place of this one."""
        return MemoryState(
            queues=[queue.spec for queue in self.queues.values()],
            fds=[fds.put_all(queue.fds) for queue in self.queues.values()],
            state=self.state.spec, state_fds=fds.put_all(self.state.fds), on_device=self.on_device,
        )  # fmt: skip

    @classmethod
    def restored(cls, state: MemoryState, fds: Descriptors) -> EngineMemory:
        """The memory that the program before has made. ValueError if something of it does not fit."""
        made = cls.__new__(cls)
        made.on_device = state.on_device
        found = dict(zip((spec.name for spec in state.queues), zip(state.queues, state.fds, strict=True), strict=True))
        if found.keys() != ROUTES.keys():
            raise ValueError(f"the queues are {', '.join(found)}; expected {', '.join(ROUTES)}")
        made.queues = {
            name: TensorQueue.adopt(spec, fds.take_all(places)) for name in ROUTES for spec, places in (found[name],)
        }
        made.state = StateSlots.adopt(state.state, fds.take_all(state.state_fds))
        return made

    def specs(self, stages: Collection[StageName]) -> list[QueueSpec]:
        """What a process with these stages attaches to; `fds` gives the descriptors in the same order."""
        return [self.queues[name].spec for name in self._names(stages)]

    def state_spec(self, stages: Collection[StageName]) -> StateSpec | None:
        return self.state.spec if "dit" in stages else None

    def fds(self, stages: Collection[StageName]) -> list[int]:
        fds = [fd for name in self._names(stages) for fd in self.queues[name].fds]
        return fds + (list(self.state.fds) if "dit" in stages else [])

    def begin(self, task: str, stage: StageName) -> None:
        """A process of this stage is about to hear of the task: before the dit does, it has a state slot."""
        if stage == "dit":
            self.state.claim(task)

    def reclaim(self, stages: Collection[StageName], epoch: int) -> None:
        """The process of these stages and this epoch is dead and reaped: give back what it was writing and reading."""
        for name, route in ROUTES.items():
            if route.producer in stages:
                self.queues[name].reclaim("producer", epoch)
            if route.consumer in stages:
                self.queues[name].reclaim("consumer", epoch)

    def purge(self, task: str, stage: StageName) -> None:
        """Free what is held of this task for this stage: the slots it would take, and the state if it is the dit."""
        for name, route in ROUTES.items():
            if route.consumer == stage:
                self.queues[name].purge(task)
        if stage == "dit":
            self.state.release(task)

    def statistics(self) -> list[QueueStatistics]:
        return [queue.statistics() for queue in self.queues.values()]

    def holdings(self) -> list[Holding]:
        """What is in the queues and states, and who has it."""
        return [held for queue in self.queues.values() for held in queue.holdings()] + self.state.holdings()

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
