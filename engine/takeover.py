"""New processes in the places of those that serve, with the code that is on disk now, or with other settings.

Each first proves itself beside its predecessor (`engine/successor.py`), which then leaves after the quantum in hand;
the crew starts the new one in its place as it does after a death. Whatever fails before that leaves the old one to go
on. Where other stages are to share a process than before, all leave before the first new one is started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import msgspec

from engine.devices import compute_threads, resolve_devices
from engine.params import SystemParams
from engine.posts import Posts, groups_of
from engine.process import Body
from engine.settings import Change, Settings, changed
from engine.start_messages import StartMessages
from engine.successor import successor
from ipc.errors import StageFailed
from ipc.messages.names import Placement, Seat, stage_of
from ipc.messages.server import Replaced
from ipc.messages.stage import Rehearse


class Takeover:
    """Replaces processes of a crew, one after the other.

    Resource handling: owns the processes that have proved themselves, until the crew takes them or `end`.
    """

    def __init__(
        self, params: SystemParams, posts: Posts, starts: StartMessages, all_up: Callable[[], Awaitable[None]]
    ) -> None:
        """`all_up` returns when every stage is up; raises what keeps one from being."""
        self._params, self._posts, self._starts, self._all_up = params, posts, starts, all_up
        self._turn = asyncio.Lock()
        self._successors: dict[tuple[Seat, ...], Body] = {}
        """Processes that have proved themselves, and take over when their predecessor has left."""
        self.moving_to: Placement | None = None
        """All processes leave; when the last has, those of this placement are started."""
        self.ended = False
        """The crew stops: nobody takes over any more."""

    @property
    def is_busy(self) -> bool:
        """A process is taking the place of another."""
        return self._turn.locked() or bool(self._successors) or self.moving_to is not None

    async def replace(self, asked: Change) -> Replaced:
        """New processes in the places of these stages'. Raises `StageFailed` for the first that is not fit; its
        predecessor goes on, and so do the replaced ones.

        With other settings (`engine/settings.py`) or another placement, all of them prove themselves before the first
        takes over, so that either all have them, or none. Raises `BadConfig` for settings that cannot be."""
        default = compute_threads(msgspec.structs.replace(self._params, threads=0), len(self._posts.siblings("dit")))
        async with self._turn, AsyncExitStack() as undo:
            wanted = changed(self._starts.settings, asked, default)
            proven: dict[tuple[Seat, ...], Body] = {}
            undo.callback(_end_all, proven)
            if asked.placement is not None:
                resolve_devices(msgspec.structs.replace(self._params, placement=asked.placement))
                groups = groups_of([post.name for post in self._posts], asked.placement)
                if groups != self._posts.groups:
                    for seats in groups:
                        proven[seats] = await self._prove(seats, wanted)
                    taken = await self._move(asked.placement, proven, wanted)
                    return self._replaced({post.name: taken for post in self._posts})
            stages = set(asked.stages)
            groups = [g for g in self._posts.groups if not stages or {stage_of(seat) for seat in g} & stages]
            if wanted != self._starts.settings:
                for seats in groups:
                    proven[seats] = await self._prove(seats, wanted)
                self._starts.change(wanted)
            seconds: dict[Seat, float] = {}
            for seats in groups:
                body = proven.pop(seats) if seats in proven else await self._prove(seats)
                seconds |= dict.fromkeys(seats, await self._replace(seats, body))
            return self._replaced(seconds)

    def _replaced(self, seconds: dict[Seat, float]) -> Replaced:
        """Of these seats, the new processes."""
        pids = {seat: process.pid for seat in seconds if (process := self._posts[seat].process) is not None}
        assert pids.keys() == seconds.keys(), "all are up"
        return Replaced(pids=pids, seconds=seconds)

    async def _prove(self, seats: tuple[Seat, ...], wanted: Settings | None = None) -> Body:
        """A process that could take these seats, with the settings that there are, or the `wanted` ones."""
        fds = [fd for _, fd in self._starts.placed(seats)]
        start = msgspec.structs.replace(self._starts.message(seats, 0, wanted), queues=[], state=None)
        if not start.outliving and wanted is not None:
            raise StageFailed(
                "this GPU's driver has no memory that outlives a process, so the weights do not fit beside the old one "
                "to try this; start the engine with these options"
            )
        if not start.outliving:
            start = msgspec.structs.replace(start, stages=[])  # the weights do not fit twice: only its code is tried
        return await successor(Rehearse(start=start), fds, self._params.start_deadline)

    async def _replace(self, seats: tuple[Seat, ...], body: Body) -> float:
        """Seconds from the end of the old process until the new one was ready."""
        if self.ended:
            body.end()
            raise StageFailed("the engine is stopping")
        self._successors[seats] = body
        for process in {post.process for post in self._posts.of(seats) if post.process is not None}:
            process.leave()
            await process.exited.wait()
        return await self._seconds_until_up()

    async def _move(self, placement: Placement, proven: dict[tuple[Seat, ...], Body], wanted: Settings) -> float:
        """All processes leave, then the proven ones take their places; what follows the last end is the crew's part, so
        that it is done whoever waits for it. Seconds from there until all new ones were ready."""
        await self._all_up()
        if self.ended:
            raise StageFailed("the engine is stopping")
        self._starts.change(wanted)
        self._successors.update(proven)
        proven.clear()
        self.moving_to = placement
        leaving = self._posts.processes()
        for process in leaving:
            process.leave()
        for process in leaving:
            await process.exited.wait()
        return await self._seconds_until_up()

    async def _seconds_until_up(self) -> float:
        """How long it took from now until every stage was up."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._all_up()
        return loop.time() - began

    def has(self, seats: tuple[Seat, ...]) -> bool:
        """A process waits to take these seats."""
        return seats in self._successors

    def successor_of(self, seats: tuple[Seat, ...]) -> Body | None:
        """The process that is to have these seats now, if one has proved itself and lives; the caller's from now on."""
        body = self._successors.pop(seats, None)
        if body is None or body.lives():
            return body
        body.end()
        return None

    def end(self) -> None:
        """Nobody takes over any more. Kills and reaps; waits for milliseconds."""
        self.ended = True
        _end_all(self._successors)


def _end_all(bodies: dict[tuple[Seat, ...], Body]) -> None:
    while bodies:
        bodies.popitem()[1].end()
