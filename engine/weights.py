"""The weights that are in memory, held by the supervisor so that they outlive the stage processes; and which of their
versions new tasks get."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from engine.states import Descriptors, State
from ipc.freeing import close_memory
from ipc.messages.status import Holding
from ipc.messages.weights import Component, WeightVersion
from ipc.payload import place_name


class Placed(NamedTuple):
    """One version of a component, in memory of a device ("cpu", "cuda:0")."""

    device: str
    version: WeightVersion
    fd: int


class PlacedState(State, frozen=True, kw_only=True):
    """A `Placed`; `fd` is the place of its descriptor."""

    device: str
    version: WeightVersion
    fd: int


class WeightStore:
    """Placed versions by device, component and content: the processes of one device share what is placed there.

    Resource handling: owns one descriptor per version and device until `let_go` or `close`; the memory is free when
    that and every mapping of it are gone.
    """

    def __init__(self) -> None:
        self._placed: dict[tuple[str, str, str], Placed] = {}
        self._doubted: set[tuple[str, str, str]] = set()
        """Taken back from an earlier run, and not bound to by any process yet."""
        self.on_change: Callable[[WeightStore], None] = lambda store: None
        """Called when something is placed or let go of; not by `close`."""

    def take_back(self, device: str, version: WeightVersion, fd: int) -> None:
        """As `keep`, of what an earlier run has left, until a process says that it is that."""
        self.keep(device, version, fd)
        self._doubted.add((device, version.component, version.content))

    def proven(self, known: Iterable[tuple[str, str, str]]) -> None:
        """A process has bound to these: component, content hash and where it is placed, each."""
        self._doubted.difference_update((place, component, content) for component, content, place in known)

    def refuted(self, known: Iterable[tuple[str, str, str]]) -> bool:
        """A process that was given these did not come up. Let go of those that nobody has bound to yet; False if there
        are none."""
        doubted = self._doubted & {(place, component, content) for component, content, place in known}
        close_memory(self._placed.pop(key).fd for key in doubted & self._placed.keys())
        if doubted:
            self.on_change(self)
        return bool(doubted)

    def keep(self, device: str, version: WeightVersion, fd: int) -> None:
        """Take over the descriptor of a version; another copy of it on this device is let go."""
        key = (device, version.component, version.content)
        if (old := self._placed.pop(key, None)) is not None:
            close_memory([old.fd])
        self._placed[key] = Placed(device, version, fd)
        self._doubted.discard(key)
        self.on_change(self)

    def of(self, device: str, components: Collection[str]) -> list[tuple[WeightVersion, int]]:
        """The versions of these components that are placed on a device, in the order in which they were placed; the
        descriptors stay owned by this object."""
        return [(p.version, p.fd) for p in self if p.device == device and p.version.component in components]

    def state(self, fds: Descriptors) -> list[PlacedState]:
        """What is placed, for the program that takes the place of this one."""
        return [PlacedState(device=p.device, version=p.version, fd=fds.put(p.fd)) for p in self]

    def put_back(self, state: Iterable[PlacedState], fds: Descriptors) -> None:
        """Hold what the program before this one held."""
        for placed in state:
            self.keep(placed.device, placed.version, fds.take(placed.fd))

    def find(self, device: str, component: str, content: str) -> Placed | None:
        return self._placed.get((device, component, content))

    def has(self, component: str, content: str) -> bool:
        """It is placed somewhere."""
        return any(key[1:] == (component, content) for key in self._placed)

    def let_go(self, component: str, content: str, device: str | None = None) -> None:
        """Close a version's descriptors, of one device, or of all."""
        keys = [key for key in self._placed if key[1:] == (component, content) and device in (None, key[0])]
        close_memory(self._placed.pop(key).fd for key in keys)
        self.on_change(self)

    def holdings(self) -> list[Holding]:
        return [
            Holding(
                name=placed.version.component, where=place_name(placed.version.device), state="placed",
                bytes=placed.version.bytes, generation=placed.version.content,
            )
            for placed in self
        ]  # fmt: skip

    def close(self) -> None:
        while self._placed:
            _, placed = self._placed.popitem()
            os.close(placed.fd)

    def __iter__(self) -> collections.abc.Iterator[Placed]:
        return iter(list(self._placed.values()))


class Source(NamedTuple):
    """Where a version was read from."""

    label: str
    """For people: the last name of the directory."""
    component: Component | None
    """Its files; None if it came from another program's memory."""


class VersionsState(State, frozen=True, kw_only=True):
    """A `Versions`; the fields have its names. Of `sources` and `served`, the keys are (component, content hash)."""

    serving: dict[str, str]
    previous: dict[str, str] | None
    pinned: bool
    sources: list[tuple[tuple[str, str], Source]]
    served: list[tuple[tuple[str, str], int]]


class Versions:
    """Which version of each component new tasks get, and which they got before. A pure object."""

    def __init__(self) -> None:
        self.serving: dict[str, str] = {}
        """Component -> content hash."""
        self.previous: dict[str, str] | None = None
        """What `serving` was before the last flip."""
        self.pinned = False
        """What `previous` names stays in memory."""
        self.sources: dict[tuple[str, str], Source] = {}
        """(component, content hash) -> where it was read from."""
        self.served: collections.Counter[tuple[str, str]] = collections.Counter()
        """Videos made with a version."""

    def state(self) -> VersionsState:
        return VersionsState(
            serving=self.serving, previous=self.previous, pinned=self.pinned, sources=list(self.sources.items()),
            served=list(self.served.items()),
        )  # fmt: skip

    def put_back(self, state: VersionsState) -> None:
        """Serve what the program before this one served."""
        self.serving, self.previous, self.pinned = state.serving, state.previous, state.pinned
        self.sources = dict(state.sources)
        self.served.update(dict(state.served))

    def loaded(self, weights: Mapping[str, str], label: str, components: Mapping[str, Component]) -> None:
        """A stage is up, and has these bound: what it read itself, if nobody has flipped."""
        for name, content in weights.items():
            self.serving.setdefault(name, content)
            self.sources.setdefault((name, content), Source(label, components.get(name)))

    def flip(self, new: Mapping[str, str], *, pin: bool) -> None:
        """From now on new tasks get these, all at once; components that are not named stay."""
        self.previous, self.serving, self.pinned = self.serving, {**self.serving, **new}, pin

    def before(self) -> dict[str, str]:
        """The components that a rollback changes, and what to. ValueError if there is nothing to return to."""
        if self.previous is None:
            raise ValueError("nothing was reloaded since the engine was started")
        return {name: content for name, content in self.previous.items() if self.serving[name] != content}

    def surplus(self, placed: Iterable[Placed], in_use: Collection[tuple[str, str]]) -> set[tuple[str, str]]:
        """The placed versions that are neither served, nor pinned, nor used by a task. Of a component that is not
        served yet, its stage is about to say which it has."""
        pinned = (self.previous or {}).items() if self.pinned else ()
        known = {(p.version.component, p.version.content) for p in placed if p.version.component in self.serving}
        return known - {*in_use, *self.serving.items(), *pinned}

    def forget_sources(self, known: Collection[tuple[str, str]]) -> None:
        """Keep what is said of the versions that are `known`, served, or were before."""
        kept = {*known, *self.serving.items(), *(self.previous or {}).items()}
        self.sources = {key: source for key, source in self.sources.items() if key in kept}
        self.served = collections.Counter({key: count for key, count in self.served.items() if key in kept})
