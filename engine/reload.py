"""New weights while requests run: read by a process of their own, mapped by the stages, tried, then given to new tasks.

Until the last of these steps nobody computes with the new version, so whatever fails leaves what is served as it was.
Every task keeps the versions that it began with (`Job.weights`); so the flip is one assignment, and nothing waits for
it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from engine.checkpoint import given_component, open_all_components, open_components
from engine.crew import Crew
from engine.decode import decode_strictly
from engine.judge import judge
from engine.levels import Levels
from engine.loader import Loader, read_of
from engine.params import ModelParams, SystemParams, UserParams
from engine.roots import below_root, check_weights_root
from engine.running import RunningTasks
from engine.turns import Turns
from engine.weights import Placed, Source, Versions
from ipc.errors import (
    BadConfig,
    BadRequest,
    CanaryFailed,
    EngineError,
    NotFound,
    OutOfMemory,
    StageFailed,
)
from ipc.freeing import close_memory
from ipc.messages.client import Canary, Reload, When
from ipc.messages.loader import Read
from ipc.messages.server import Reloaded
from ipc.messages.status import LoadProgress, VersionInfo
from ipc.messages.weights import Component

log = logging.getLogger(__name__)

ADOPT_TIMEOUT = 120.0
"""Seconds for every process to map a version; one that is loading maps it when it is up."""

GIVEN = "given in memory"
"""Where weights are from that a program has given."""


class Order(NamedTuple):
    """What is to be read, and what then."""

    components: dict[str, Component]
    label: str
    """Where from, for people."""
    when: When
    canary: Canary | None = None
    manifest: str | None = None
    dry_run: bool = False
    in_memory: Mapping[str, int] = MappingProxyType({})
    """Component -> descriptor of a memfd with its one file."""


class Reloader:
    """Carries out reloads, one at a time: the last to come wins, and one before it that has not flipped is told so. A
    dry run, which changes nothing, waits for those before it."""

    def __init__(
        self,
        model: ModelParams,
        params: SystemParams,
        crew: Crew,
        levels: Levels,
        tasks: RunningTasks,
        try_weights: Callable[[UserParams, dict[str, str]], Awaitable[str]],
    ) -> None:
        """`try_weights` makes a video with other versions than those that are served, and returns its path. It raises
        what a request raises."""
        self._model, self._params = model, params
        self._crew, self._levels, self._tasks, self._try_weights = crew, levels, tasks, try_weights
        self._turns = Turns()
        self._candidates: set[tuple[str, str]] = set()
        """(component, content hash) of what is to be served and is not yet."""
        self._loader = Loader()
        self.loading: dict[str, LoadProgress] = {}
        """Of the reload that is under way."""

    @property
    def is_busy(self) -> bool:
        """A reload is under way, or waits."""
        return self._turns.is_taken

    @property
    def _versions(self) -> Versions:
        return self._crew.weights

    async def reload(self, asked: Reload) -> Reloaded:
        """What `engine reload --checkpoint` asks for. Raises `BadCheckpoint`, `BadConfig`, `BadRequest`,
        `OutOfMemory`, `CanaryFailed`, `StageFailed`, `Superseded`; nothing has changed then."""
        arrival = self._turns.arrive()
        directory = Path(asked.checkpoint)
        model, params = self._model, self._params
        if asked.manifest is not None:
            check_weights_root("manifest", asked.manifest, params.checkpoint_root)
        if asked.canary is not None and asked.canary.reference is not None:
            below_root("reference", asked.canary.reference, params)
        if asked.components:
            components = await asyncio.to_thread(open_components, model, params, directory, asked.components)
        else:
            components = await asyncio.to_thread(open_all_components, model, params, directory)
        return await self.carry_out(
            Order(components, directory.name, asked.when, asked.canary, asked.manifest, asked.dry_run), arrival
        )

    async def take(self, component: str, fd: int, when: When) -> Reloaded:
        """Serve the weights that a program gives in memory (`hotreload/given.py`); `fd` stays the caller's. Raises as
        `reload`."""
        arrival = self._turns.arrive()
        found = await asyncio.to_thread(given_component, self._model, self._params, component, fd)
        return await self.carry_out(Order({component: found}, GIVEN, when, in_memory={component: fd}), arrival)

    async def rollback(self, when: When) -> Reloaded:
        """Serve what was served before; read it again if it is not in memory. Raises `NotFound` if there is nothing to
        return to, and as `reload`."""
        async with self._turns.take(self._turns.arrive()):
            try:
                before = self._versions.before()
            except ValueError as error:
                raise NotFound(f"{error}; there is nothing to return to") from error
            with self._kept(before):
                missing = {name: content for name, content in before.items() if not self._is_placed(name, content)}
                if not missing:
                    return self._flip(before, when, [], 0.0)
                began = time.monotonic()
                async with self._read(self._once_more(missing, when)) as placed:
                    seconds = time.monotonic() - began
                    found = {p.version.component: p.version.content for p in placed}
                    if changed := [name for name, content in missing.items() if found[name] != content]:
                        raise NotFound(
                            f"the files of the {changed[0]} before have changed since; reload what they are now"
                        )
                    await self._adopt(placed)
                self._turns.check()
                return self._flip(before, when, placed, seconds)

    def _once_more(self, versions: Mapping[str, str], when: When) -> Order:
        """To read what was read before."""
        components: dict[str, Component] = {}
        for name, content in versions.items():
            source = self._versions.sources[name, content]
            if source.component is None:
                raise NotFound(f"the {name} before was given by a program, and is no longer in memory; give it again")
            components[name] = source.component
        return Order(components, self._versions.sources[next(iter(versions.items()))].label, when)

    async def carry_out(self, order: Order, arrival: int | None = None) -> Reloaded:
        """Read, map, try, flip. `arrival` is its number in the order of their coming (default: it comes now)."""
        if self._crew.outliving == "no":
            raise BadConfig(
                "this GPU's driver has no memory that outlives a process, which weights are exchanged through; restart "
                "the engine with the new checkpoint"
            )
        arrival = self._turns.arrive() if arrival is None else arrival
        async with self._turns.take(arrival, overtakes=not order.dry_run):
            began = time.monotonic()
            with ExitStack() as keeping:
                async with self._read(order) as placed:
                    seconds = time.monotonic() - began
                    found = {p.version.component: p.version.content for p in placed}
                    serving = self._versions.serving
                    same = {name: content for name, content in found.items() if serving.get(name) == content}
                    new = {name: content for name, content in found.items() if name not in same}
                    fresh = [p for p in placed if p.version.component in new]
                    if order.dry_run or not new:
                        return Reloaded(weights=new, unchanged=same, seconds=seconds, dry_run=order.dry_run)
                    for name, content in new.items():
                        read = None if name in order.in_memory else order.components[name]
                        self._versions.sources[name, content] = Source(order.label, read)
                    keeping.enter_context(self._kept(new))
                    await self._adopt(fresh)
                if order.canary is not None:
                    await self._try(order.canary, new)
                self._turns.check()
                report = self._flip(new, order.when, fresh, seconds)
            return msgspec.structs.replace(report, unchanged=same)

    async def end(self) -> None:
        """End the process that reads, whatever it is doing."""
        self._loader.end()
        await self._loader.ended()

    def let_go(self) -> None:
        """Free the versions that nobody needs. To be called whenever a task has ended."""
        in_use = {key for versions in self._tasks.weights_in_use() for key in versions} | self._candidates
        for component, content in self._versions.surplus(self._crew.placed, in_use):
            log.info("%s %s is let go", component, content[:12])
            self._crew.upkeep.forget(component, content)
        self._versions.forget_sources({(p.version.component, p.version.content) for p in self._crew.placed} | in_use)

    def versions(self) -> list[VersionInfo]:
        """What is served, was before, or is still used, of each component."""
        running = self._tasks.weights_in_use()
        return [
            self._info(name, content, source.label, running)
            for (name, content), source in self._versions.sources.items()
        ]

    def _info(
        self, component: str, content: str, label: str, running: Sequence[frozenset[tuple[str, str]]]
    ) -> VersionInfo:
        key, versions = (component, content), self._versions
        placed = [p for p in self._crew.placed if (p.version.component, p.version.content) == key]
        before = (versions.previous or {}).get(component) == content
        serving = versions.serving.get(component) == content
        return VersionInfo(
            component=component, content=content, source=label,
            state="serving" if serving else "previous" if before else "draining",
            placed=[p.device for p in placed], bytes=max((p.version.bytes for p in placed), default=0),
            served=versions.served[key], running=sum(key in used for used in running),
        )  # fmt: skip

    def _is_placed(self, component: str, content: str) -> bool:
        """Wherever it is needed."""
        places = self._crew.upkeep.places_of(component)
        return all(self._crew.placed.find(place, component, content) is not None for place in places)

    # The steps.

    @asynccontextmanager
    async def _read(self, order: Order) -> AsyncIterator[list[Placed]]:
        """What the loader has placed, where it is needed; until the end that stays so, as no memory level is changed by
        hand. If one was while it was read, it is read once more. The descriptors are closed at the end, but for those
        that were kept."""
        while True:
            placed = await self._read_once(order)
            try:
                async with self._levels.kept():
                    if order.dry_run or self._is_where_needed(placed):
                        yield placed
                        return
            finally:
                close_memory(p.fd for p in placed)
            log.info("a memory level has changed: the new weights are read again, to where they are needed now")
            self._turns.check()

    async def _read_once(self, order: Order) -> list[Placed]:
        self.loading = {}
        try:
            return await self._placed(order)
        finally:
            self.loading = {}

    def _is_where_needed(self, placed: Sequence[Placed]) -> bool:
        places: dict[str, set[str]] = {}
        for p in placed:
            places.setdefault(p.version.component, set()).add(p.device)
        return all(found >= self._crew.upkeep.homes_of(component) for component, found in places.items())

    async def _placed(self, order: Order) -> list[Placed]:
        """Have it placed. Where there is no room, what was pinned goes first, and then all that is on the GPUs."""
        ways = [self._unpin, self._levels.make_room]
        while True:
            asked = read_of(
                self._model, self._crew.dtype, list(order.components.values()), self._places_for(order.components),
                list(order.in_memory), order.manifest,
            )  # fmt: skip
            try:
                return await self._load(asked, list(order.in_memory.values()))
            except OutOfMemory:
                if asked.devices != self._places_for(order.components):
                    continue  # a memory level has changed while it was read: what has no room is not needed there
                while ways:
                    if await ways.pop(0)():
                        break
                else:
                    raise

    def _places_for(self, components: Collection[str]) -> dict[str, list[str]]:
        """Where new versions of these are to be placed: where they are computed with, and, if there is room, where the
        level may need them."""
        self._levels.copies.make_way(components)
        return {name: self._crew.upkeep.places_of(name) for name in components}

    async def _unpin(self) -> bool:
        """Let go of what was pinned; False if nothing was."""
        if not self._versions.pinned:
            return False
        log.info("there is no room for another version: what was pinned is let go")
        self._versions.pinned = False
        self.let_go()
        return True

    async def _load(self, asked: Read, fds: Sequence[int]) -> list[Placed]:
        """Run the loader, until it is done or another reload comes."""
        reading = asyncio.ensure_future(self._loader.read(asked, fds, self._note_loading))
        overtaken = asyncio.ensure_future(self._turns.overtaken())
        try:
            await asyncio.wait({reading, overtaken}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                self._turns.check()
            return await reading
        finally:
            overtaken.cancel()
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})

    def _note_loading(self, progress: LoadProgress) -> None:
        self.loading[progress.component] = progress

    @contextmanager
    def _kept(self, versions: Mapping[str, str]) -> Iterator[None]:
        """These versions stay in memory, whoever else needs them; those that are not served at the end are let go."""
        self._candidates = set(versions.items())
        try:
            yield
        finally:
            self._candidates = set()
            self.let_go()

    async def _adopt(self, placed: Sequence[Placed]) -> None:
        """Keep what was placed where it is still needed, and have every process map it. Raises `StageFailed` if one
        cannot."""
        for p in placed:
            known = self._crew.placed.find(p.device, p.version.component, p.version.content) is not None
            if not known and self._crew.upkeep.needs(p.version.component, p.device):
                self._crew.placed.keep(p.device, p.version, os.dup(p.fd))
        try:
            async with asyncio.timeout(ADOPT_TIMEOUT):
                for component, content in sorted({(p.version.component, p.version.content) for p in placed}):
                    await self._crew.upkeep.adopt(component, content)
        except TimeoutError as error:
            raise StageFailed(
                f"not every process has mapped the new weights within {ADOPT_TIMEOUT:g} s: one is busy with a long "
                "quantum or does not come up; the old ones go on, reload again"
            ) from error

    def _flip(self, new: dict[str, str], when: When, placed: Sequence[Placed], seconds: float) -> Reloaded:
        """New tasks get these from now on."""
        self._versions.flip(new, pin=when == "pin")
        if when == "now":
            self._tasks.change_weights(new)
        for name, content in new.items():
            log.info("%s is now %s of %s", name, content[:12], self._versions.sources[name, content].label)
        size = sum(p.version.bytes for p in placed)
        return Reloaded(weights=new, bytes=size, seconds=seconds, running=self._tasks.ending_with_others(new))

    async def _try(self, canary: Canary, new: dict[str, str]) -> None:
        """Raises `CanaryFailed` unless its video is what the operator expects."""
        try:
            given = msgspec.msgpack.decode(canary.params)
        except (msgspec.DecodeError, ValueError) as error:
            raise BadRequest(f"the params of the canary are not MessagePack: {error}") from error
        user = decode_strictly(UserParams, given, BadRequest, "the canary")
        try:
            path = await self._try_weights(user, new)
        except (BadRequest, asyncio.CancelledError):
            raise
        except EngineError as error:
            raise CanaryFailed(f"the canary failed with the new weights: {error}; the old ones go on") from error
        await asyncio.to_thread(judge, path, canary.reference, canary.psnr)
