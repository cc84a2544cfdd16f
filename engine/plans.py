"""Which memory plan the processes of each device keep to, and where that needs their weights to be.

A pure object; `engine/crew.py` has the processes keep to what it says, `engine/levels.py` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from engine.states import State
from ipc.messages.memory import OFFLOADED, MemoryPlan
from ipc.messages.names import StageName
from ipc.messages.stage import SetMemory

HOST = "cpu"
"""Where host memory is, as `WeightStore` calls it."""


Limits = Callable[[str, MemoryPlan], dict[StageName, int]]


class PlansState(State, frozen=True, kw_only=True):
    """A `Plans` with no change under way."""

    held: dict[str, MemoryPlan]
    copies: bool


class Plans:
    """The plan of each device that a stage computes on."""

    def __init__(self, held: Mapping[str, MemoryPlan]) -> None:
        self.held = dict(held)
        """What every process of a device keeps to, or is about to when it is up."""
        self.coming: dict[str, MemoryPlan] = {}
        """What they are changing to."""
        self.limits: Limits = lambda device, plan: {}
        """What the stages on a device may allocate with a plan: `engine.footprint.allocation_limits`; empty: all."""
        self.copies = False
        """Host memory has, or is getting, what the GPUs have: every version is placed there, too."""

    @classmethod
    def all_alike(cls, devices: Iterable[str], plan: MemoryPlan) -> Plans:
        return cls(dict.fromkeys(devices, plan))

    def state(self) -> PlansState:
        assert not self.coming, "nothing is handed over in the middle of a change"
        return PlansState(held=self.held, copies=self.copies)

    def put_back(self, state: PlansState) -> None:
        """ValueError if it is of other devices."""
        if state.held.keys() != self.held.keys():
            raise ValueError(f"there are memory plans for {list(state.held)}; expected {list(self.held)}")
        self.held, self.copies = dict(state.held), state.copies

    def at_start(self, device: str) -> MemoryPlan:
        """What a process begins with. While a plan is changing, the higher level: all that it needs is placed."""
        held, coming = self.held[device], self.coming.get(device)
        return held if coming is None or coming.level < held.level else coming

    def order(self, device: str, plan: MemoryPlan) -> SetMemory:
        """What a process on a device is told, to keep to this plan."""
        return SetMemory(plan=plan, limits=self.limits(device, plan))

    def home(self, device: str) -> str:
        """Where the weights are that a process begins with."""
        return HOST if self.at_start(device).level >= OFFLOADED else device

    def places(self, device: str) -> list[str]:
        """Where a version has to be for the processes of this device, the first for them to compute with it."""
        home = self.home(device)
        return [home, HOST] if self.copies and home != HOST else [home]
