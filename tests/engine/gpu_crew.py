"""A crew of a machine with a GPU, where there is none: the weights of the model that ships, said to be on cuda:0, and
processes that keep to every plan at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import msgspec

from engine.checkpoint import open_model
from engine.loader import Loader, read_of
from engine.models import load_model
from engine.params import SystemParams
from engine.plans import HOST, Plans
from engine.posts import Changes, Posts
from engine.upkeep import Unlocked, Upkeep
from engine.weights import Versions, WeightStore
from ipc.errors import EngineError
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import Seat
from ipc.messages.weights import WeightVersion

GPU = "cuda:0"


class GpuCrew:
    """What `HostCopies`, `Levels` and `Reloader` need of a `Crew`."""

    outliving = "gpu"

    def __init__(self) -> None:
        params = SystemParams()
        self.model = load_model(params.model)
        self.components = open_model(self.model, params).components
        self.placed, self.weights, self.plans = WeightStore(), Versions(), Plans({GPU: MemoryPlan()})
        self.on_gpu, self.dtype = True, "float32"
        self.upkeep = self
        posts = Posts({"text": GPU, "dit": GPU, "vae": GPU, "writer": None}, "fused")
        places = Upkeep(posts, self.placed, self.plans, Changes(), deadline=60.0)
        self.homes_of, self.places_of, self.needs = places.homes_of, places.places_of, places.needs
        self.adopted: list[tuple[str, str]] = []
        self.not_locked: Unlocked | None = None
        self.refusal: EngineError | None = None
        """Of the next change of plan."""

    async def load(self) -> None:
        """Read the weights, once, and say that they are on the GPU."""
        loader = Loader()
        for name, component in self.components.items():
            (placed,) = await loader.read(
                read_of(self.model, self.dtype, [component], {name: [HOST]}), (), lambda loading: None
            )  # fmt: skip
            version = msgspec.structs.replace(placed.version, device=0)
            self.placed.keep(GPU, version, placed.fd)
            self.weights.loaded({name: version.content}, "demo", {name: component})
        loader.end()
        await loader.ended()

    def pretend(self, components: Iterable[str]) -> None:
        """Of another model: its weights are on the GPU and in host memory, and take nothing."""
        for name in components:
            for place, number in ((GPU, 0), (HOST, None)):
                version = WeightVersion(component=name, content="c", fingerprint="f", bytes=0, device=number)
                self.placed.keep(place, version, os.memfd_create(name))
            self.weights.serving[name] = "c"

    def close(self) -> None:
        self.placed.close()

    async def ready(self, on_loading: Any) -> None:
        return None

    async def adopt(self, component: str, content: str) -> None:
        assert self.placed.find(self.plans.home(GPU), component, content) is not None
        self.adopted.append((component, content))

    def forget(self, component: str, content: str) -> None:
        self.placed.let_go(component, content)

    async def adopt_copy(self, component: str, content: str) -> None:
        assert self.placed.find(HOST, component, content) is not None
        self.adopted.append((component, content))

    async def set_memory(self, device: str, plan: MemoryPlan) -> None:
        if (refusal := self.refusal) is not None:
            self.refusal = None
            raise refusal
        self.plans.held[device] = plan

    def unlocked(self, device: str) -> Unlocked | None:
        return self.not_locked

    def pids(self) -> list[int]:
        return [os.getpid()]

    def device_of(self, seat: Seat) -> str | None:
        return None if seat == "writer" else GPU

    def seats_on(self, device: str) -> list[Seat]:
        return ["text", "dit", "vae"]
