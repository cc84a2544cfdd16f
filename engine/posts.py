"""What the crew knows of each seat, and of the seats together: which share a process, which are siblings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from engine.process import StageProcess
from engine.states import State
from ipc.errors import Failure
from ipc.messages.memory import MemoryPlan
from ipc.messages.names import Placement, Seat, stage_of
from ipc.messages.status import LoadProgress, StageStatus

StageState = Literal["starting", "up", "restarting", "failed", "stopped"]


class Changes:
    """Wakes those who wait for something about the processes to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def next(self) -> asyncio.Event:
        """Set at the next change. To be taken before looking at what may change."""
        return self._event

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()


class Post(msgspec.Struct, eq=False):
    """One seat."""

    name: Seat
    device: str | None
    state: StageState = "stopped"
    process: StageProcess | None = None
    restarts: int = -1
    """Processes that were started, but for the first and those that took over because that was asked for."""
    quanta: int = 0
    busy_seconds: float = 0.0
    error: Failure | None = None
    loading: LoadProgress | None = None
    """What its process reads, until it is up."""
    was_up: bool = False
    """A process of it has been up: what the next one lacks to start, there was before."""

    def has(self, component: str, content: str, place: str) -> bool:
        """Its process has this version of weights where it was placed, and is up."""
        return self.process is not None and self.state == "up" and (component, content, place) in self.process.knows

    def keeps(self, plan: MemoryPlan) -> bool:
        """Its process keeps to this plan, and is up."""
        return self.process is not None and self.state == "up" and self.process.memory == plan

    def status(self) -> StageStatus:
        return StageStatus(
            name=self.name, state=self.state, pid=self.process.pid if self.process else None,
            device=self.device or "-", epoch=self.process.epoch if self.process else 0,
            restarts=max(0, self.restarts),
            resident_bytes=self.process.resident.bytes() if self.process else 0,
            busy_seconds=self.busy_seconds, quanta=self.quanta, loading=self.loading, computes=self.computes,
        )  # fmt: skip

    @property
    def computes(self) -> dict[str, str]:
        """What its results depend on, if its process is up."""
        return {} if self.process is None else self.process.computes.get(stage_of(self.name), {})


class PostState(State, frozen=True, kw_only=True):
    """A `Post` without its process; the fields have its names."""

    name: Seat
    device: str | None
    state: StageState
    restarts: int
    quanta: int
    busy_seconds: float
    error: Failure | None
    loading: LoadProgress | None
    was_up: bool


def groups_of(seats: Iterable[Seat], placement: Placement) -> list[tuple[Seat, ...]]:
    """The seats of each process. fused: one has all; split: each has its own."""
    return [tuple(seats)] if placement == "fused" else [(seat,) for seat in seats]


class Posts:
    """All seats of one engine, in the order of the stages."""

    def __init__(self, devices: Mapping[Seat, str | None], placement: Placement) -> None:
        self._posts = {seat: Post(seat, device) for seat, device in devices.items()}
        self.groups = groups_of(devices, placement)
        """Seats that share a process."""

    def __iter__(self) -> Iterator[Post]:
        return iter(self._posts.values())

    def __getitem__(self, seat: Seat) -> Post:
        return self._posts[seat]

    def state(self) -> list[PostState]:
        return [
            PostState(
                name=post.name, device=post.device, state=post.state, restarts=post.restarts, quanta=post.quanta,
                busy_seconds=post.busy_seconds, error=post.error, loading=post.loading, was_up=post.was_up,
            )
            for post in self
        ]  # fmt: skip

    def put_back(self, state: Sequence[PostState]) -> None:
        """Know of the seats what the program before this one knew. ValueError if those were others."""
        if [(post.name, post.device) for post in state] != [(post.name, post.device) for post in self]:
            raise ValueError(f"the seats are {[post.name for post in state]}; expected {list(self._posts)}")
        for post, known in zip(self, state, strict=True):
            post.state, post.restarts, post.quanta = known.state, known.restarts, known.quanta
            post.busy_seconds, post.error, post.loading = known.busy_seconds, known.error, known.loading
            post.was_up = known.was_up

    def of(self, seats: tuple[Seat, ...]) -> list[Post]:
        return [self._posts[seat] for seat in seats]

    def group_of(self, seat: Seat) -> tuple[Seat, ...]:
        return next(group for group in self.groups if seat in group)

    def device_of(self, seats: tuple[Seat, ...]) -> str:
        """Where the process of these seats has its weights."""
        return next((post.device for post in self.of(seats) if post.device is not None), "-")

    def processes(self) -> list[StageProcess]:
        """Each once, however many seats it has."""
        return list({p.process.epoch: p.process for p in self if p.process is not None}.values())

    def siblings(self, seat: Seat) -> list[Post]:
        """The seats that are the same stage, this one too."""
        return [post for post in self if stage_of(post.name) == stage_of(seat)]

    def waited_for(self) -> list[Post]:
        """Those that must be up before the engine is: all but FAILED ones that have a sibling which is not."""
        return [post for post in self if post.error is None or not self._is_done_without(post)]

    def _is_done_without(self, post: Post) -> bool:
        return any(other.error is None for other in self.siblings(post.name))

    def is_loading_for(self, seats: tuple[Seat, ...], home: Callable[[str], str]) -> bool:
        """A sibling is coming up, and places the weights where these seats have them too. `home`: where the weights of
        the processes on a device are."""
        where = home(self.device_of(seats))
        return any(
            post.process is not None and not post.process.ready and post.device is not None
            and home(post.device) == where
            for post in self.siblings(seats[0])
        )  # fmt: skip

    def on(self, device: str) -> list[Post]:
        """The seats that compute there."""
        return [post for post in self if post.device == device]

    def settled(self) -> bool:
        """Each is up or given up, and not all are given up: no process is starting."""
        states = {post.state for post in self}
        return "up" in states and states <= {"up", "failed"}
