"""What the process of some seats is started with: model and files, queues and states, weights that are in memory
already, and what it is to compute with.

The last is the same for all processes of a stage, as it is part of the result's identity: what the operator leaves to
the engine, the first of them finds out, and the others are told.
"""

from __future__ import annotations

import logging
import os
from typing import Literal

from engine.devices import compute_dtype, compute_threads
from engine.memory import DECODE_LATENTS, EngineMemory
from engine.params import ModelParams, SystemParams
from engine.plans import Plans
from engine.posts import Posts
from engine.settings import Settings
from engine.weights import Versions, WeightStore
from hotreload.checkpoint import Checkpoint
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import STAGE_OF_COMPONENT, Seat, number_of, stage_of
from ipc.messages.reports import Chosen, VaeChosen
from ipc.messages.stage import Start
from ipc.messages.weights import WeightVersion

log = logging.getLogger(__name__)


class StartMessages:
    """Writes the `Start` of every process of one engine, from what holds at the moment."""

    def __init__(
        self,
        params: SystemParams,
        model: ModelParams,
        checkpoint: Checkpoint,
        device: str,
        memory: EngineMemory,
        posts: Posts,
        placed: WeightStore,
        weights: Versions,
        plans: Plans,
    ) -> None:
        self._model, self._checkpoint, self._memory = model, checkpoint, memory
        self._posts, self._placed, self._weights, self._plans = posts, placed, weights, plans
        self.dtype = compute_dtype(params, device)
        """That the engine computes in."""
        self.outliving: Literal["host", "gpu", "no"] = "host"
        """Where there is memory that outlives the stages; no: not where they compute."""
        if device.startswith("cuda"):
            self.outliving = "gpu" if memory.on_device else "no"
        self.settings = Settings(
            attention=params.attention_backend, threads=compute_threads(params, len(posts.siblings("dit")))
        )  # fmt: skip
        self.chosen: Chosen | None = None
        """What the dits compute with, once the first of them has said so; kept until the attention is changed."""
        self.vae_chosen: VaeChosen | None = None
        """As `chosen`, of the vae; kept for the life of the engine."""

    def handle_chosen(self, report: Chosen) -> None:
        if self.chosen is None:
            log.info("dit computes with attention %s and kernels %s", report.attention, report.kernels)
            self.chosen = report

    def handle_vae_chosen(self, report: VaeChosen) -> None:
        if self.vae_chosen is None:
            log.info("vae computes with kernels %s", report.kernels)
            self.vae_chosen = report

    def change(self, wanted: Settings) -> None:
        """All processes are started with these settings from now on."""
        if wanted.attention != self.settings.attention:
            self.chosen = None  # the first dit says what it is
        self.settings = wanted

    def message(self, seats: tuple[Seat, ...], epoch: int, wanted: Settings | None = None) -> Start:
        """With the settings that there are, or the `wanted` ones."""
        settings = self.settings if wanted is None else wanted
        chosen = self.chosen if settings.attention == self.settings.attention else None
        stages = [stage_of(seat) for seat in seats]
        device = self._posts.device_of(seats)
        plan = self._plans.at_start(device) if device in self._plans.held else MemoryPlan()
        return Start(
            stages=stages, number=max(map(number_of, seats)), epoch=epoch, supervisor_pid=os.getpid(),
            model=self._model.name,
            transformer=self._model.transformer, vae=self._model.vae, text_encoder=self._model.text_encoder,
            image_encoder=self._model.image_encoder, conditioning=self._model.conditioning,
            boundary=self._model.boundary, components=list(self._checkpoint.components.values()),
            tokenizer=str(self._checkpoint.tokenizer),
            devices={stage_of(p.name): p.device for p in self._posts.of(seats) if p.device is not None},
            threads={stage: settings.threads[stage] for stage in stages}, dtype=self.dtype,
            decode_latents=DECODE_LATENTS, queues=self._memory.specs(stages), state=self._memory.state_spec(stages),
            placed=[version for version, _ in self.placed(seats)], serving=self._weights.serving,
            outliving=self.outliving != "no",
            attention=settings.attention if chosen is None else chosen.attention,
            kernels="auto" if chosen is None else chosen.kernels,
            vae_kernels="auto" if self.vae_chosen is None else self.vae_chosen.kernels,
            memory=plan, limits=self._plans.limits(device, plan),
        )  # fmt: skip

    def fds(self, seats: tuple[Seat, ...]) -> list[int]:
        """What goes with `message`, in its order; they stay their owners'."""
        return self._memory.fds([stage_of(seat) for seat in seats]) + [fd for _, fd in self.placed(seats)]

    def placed(self, seats: tuple[Seat, ...]) -> list[tuple[WeightVersion, int]]:
        """The weights that these seats find in memory, where they have them."""
        components = self._components_of(seats)
        return self._placed.of(self._plans.home(self._posts.device_of(seats)), components) if components else []

    def must_wait(self, seats: tuple[Seat, ...]) -> bool:
        """A sibling is about to place or to find out what these seats are to be started with."""
        return self._is_being_placed(seats) or self._is_being_chosen(seats)

    def _is_being_placed(self, seats: tuple[Seat, ...]) -> bool:
        """A sibling on the same device is reading the weights of these seats."""
        placed = {version.component for version, _ in self.placed(seats)}
        missing = not placed.issuperset(self._components_of(seats))
        return missing and self._posts.is_loading_for(seats, self._plans.home)

    def _is_being_chosen(self, seats: tuple[Seat, ...]) -> bool:
        """A sibling, on whatever device, is finding out what all dits are to compute with: two that measure could find
        different things, and then a result would depend on which of them it came from."""
        dits = self._posts.siblings("dit")
        undecided = self.chosen is None and any(post.name in seats for post in dits)
        return undecided and any(post.process is not None and not post.process.ready for post in dits)

    def _components_of(self, seats: tuple[Seat, ...]) -> list[str]:
        stages = [stage_of(seat) for seat in seats]
        return [name for name in self._checkpoint.components if STAGE_OF_COMPONENT[name] in stages]
