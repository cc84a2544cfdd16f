"""Copies in host memory of the weights that GPUs have: the memory levels that compute from there need them.

They are read by a process of its own (`engine/loader.py`), in the background, one component after another, and mapped
by the stages that compute with them; from then on a reload places every new version there, too. On a CPU, and at a
level that has its weights in host memory already, there is nothing to copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from engine.checkpoint import file_bytes
from engine.crew import Crew
from engine.loader import Loader, read_of
from engine.monitor import Sample, why_no_copies
from engine.params import ModelParams
from engine.plans import HOST
from ipc.errors import BadCheckpoint, EngineError, OutOfMemory, StageFailed
from ipc.freeing import close_memory
from ipc.messages.status import HostCopies as Progress, LoadProgress
from ipc.messages.weights import Component

MAP_TIMEOUT = 600.0
"""Seconds for every process to map a copy; one that is loading maps it when it is up."""

log = logging.getLogger(__name__)


class Missing(NamedTuple):
    """A version that is on a GPU only."""

    component: str
    content: str
    bytes: int


class HostCopies:
    """Makes the copies, and says how far they are.

    Resource handling: owns the process that reads, until `end`; what it has placed is the crew's. Error handling:
    `ensure` raises why there can be no copies; in the background that becomes the `problem` of the status. Either way
    the engine goes on without them.
    """

    def __init__(
        self, model: ModelParams, crew: Crew, sample: Callable[[], Sample], on_change: Callable[[], None]
    ) -> None:
        """`sample`: of the host's memory at present. `on_change` hears when the copies
        are complete, or cannot be."""
        self._model, self._crew = model, crew
        self._sample, self._on_change = sample, on_change
        self._turn = asyncio.Lock()
        self._loader = Loader()
        self._background: asyncio.Task[None] | None = None
        self._loading: LoadProgress | None = None
        self.problem = ""
        """Why there are none."""

    @property
    def complete(self) -> bool:
        """Every version that a process computes with is in host memory; False until all processes are up."""
        served = self._crew.weights.serving.keys()
        return not self._crew.on_gpu or (served >= set(self._model.components) and not self._missing())

    def status(self) -> Progress:
        missing = self._missing()
        if self._turn.locked():
            total = sum(v.bytes for v in missing) + self._present()
            here = self._loading.done if self._loading is not None else 0
            return Progress(state="reading", done=min(total, self._present() + here), total=total)
        return Progress(state="complete" if self.complete else "none", problem=self.problem if missing else "")

    def start(self) -> None:
        """Make them, once every stage is up. No effect while that is under way."""
        if self._background is not None and not self._background.done():
            return
        self._crew.plans.copies = True
        self._background = asyncio.get_running_loop().create_task(self._in_background(), name="host-copies")

    async def end(self) -> None:
        """Stop, whatever is being read; `start` begins anew with what is missing."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.wait([self._background])
            self._background = None
        self._loader.end()
        await self._loader.ended()

    async def _in_background(self) -> None:
        # Of the stages it is said elsewhere; of the copies it is noted.
        with contextlib.suppress(EngineError):
            await self.ensure()

    async def ensure(self) -> None:
        """Return when every version has its copy, and every process has mapped it. Raises `OutOfMemory`,
        `BadCheckpoint`, `StageFailed`, and what keeps a stage from being up."""
        await self._crew.ready(lambda loading: None)
        async with self._turn:
            self._crew.plans.copies, self.problem = True, ""
            try:
                self._check_room()
                while missing := self._missing():
                    await self._copy(missing[0])
            except EngineError as error:
                self._crew.plans.copies, self.problem = False, str(error)
                log.warning("the weights are not copied to host memory: %s", error)
                raise
            finally:
                self._loading = None
                self._on_change()

    def make_way(self, components: Iterable[str]) -> None:
        """Other versions of these are about to be read: if host memory has no room for copies of them, too, there are
        to be none from now on, as those of some versions only are of no use."""
        plans = self._crew.plans
        if not plans.copies or all(plans.home(device) == HOST for device in plans.held):
            return
        sizes = {p.version.component: p.version.bytes for p in self._crew.placed}
        wanted = sum(sizes.get(name, 0) for name in components)
        if why := why_no_copies(self._sample(), wanted):
            plans.copies, self.problem = False, f"new weights are not copied: {why}"
            log.warning("%s; memory levels 2 and 3 cannot be had", self.problem)
            self._on_change()

    def _missing(self) -> list[Missing]:
        crew, found = self._crew, []
        if not crew.on_gpu:
            return []
        on_gpus = {(p.version.component, p.version.content): p.version.bytes for p in crew.placed if p.device != HOST}
        for key in dict.fromkeys([*crew.weights.serving.items(), *on_gpus]):
            if crew.placed.find(HOST, *key) is None:
                found.append(Missing(*key, on_gpus.get(key) or self._file_bytes(key)))
        return found

    def _file_bytes(self, key: tuple[str, str]) -> int:
        """About as much as a version takes that lies in no memory of ours."""
        source = self._crew.weights.sources[key].component
        return 0 if source is None else file_bytes(source)

    def _present(self) -> int:
        return sum(p.version.bytes for p in self._crew.placed if p.device == HOST)

    def _check_room(self) -> None:
        """Before anything is read, since some of the copies are of no use."""
        wanted = sum(v.bytes for v in self._missing())
        if wanted and (why := why_no_copies(self._sample(), wanted)):
            raise OutOfMemory(f"{why}; memory levels 2 and 3 cannot be had")

    async def _copy(self, version: Missing) -> None:
        component, content, _ = version
        asked = read_of(self._model, self._crew.dtype, [self._source(component, content)], {component: [HOST]})
        placed = await self._loader.read(asked, (), self._note)
        try:
            if placed[0].version.content != content:
                raise BadCheckpoint(
                    f"the files of the {component} have changed since they were loaded, so it cannot be copied to host "
                    "memory; reload what they are now"
                )
            if not self._still_wanted(component, content):
                return
            self._crew.placed.keep(HOST, placed[0].version, os.dup(placed[0].fd))
        finally:
            close_memory(p.fd for p in placed)
        log.info("%s %s is in host memory, too", component, content[:12])
        try:
            async with asyncio.timeout(MAP_TIMEOUT):
                await self._crew.upkeep.adopt_copy(component, content)
        except TimeoutError as error:
            raise StageFailed(f"not every process has mapped the copy of the {component} in host memory") from error

    def _source(self, component: str, content: str) -> Component:
        source = self._crew.weights.sources[component, content].component
        if source is None:
            raise BadCheckpoint(f"the {component} was given by a program, and no file has it to be copied from")
        return source

    def _still_wanted(self, component: str, content: str) -> bool:
        """Nobody has let go of it meanwhile."""
        return any((v.component, v.content) == (component, content) for v in self._missing())

    def _note(self, progress: LoadProgress) -> None:
        self._loading = progress
