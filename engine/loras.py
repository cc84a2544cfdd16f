"""LoRA adapters while requests run: read by a process of their own, then offered by name.

Nothing waits for a reader but who asked for it, and whatever fails leaves the names as they were. What is added or
removed is on disk before it is answered, and an engine that is started again reads the same files: what is not there
any more, or holds something else, is not offered, and the requests that wanted it are told so.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from engine.adapters import Adapter, Adapters, KeptAdapter, Key, Part, keys_of, running
from engine.checkpoint import EXPERTS
from engine.loader import Loader
from engine.params import ModelParams
from engine.roots import check_weights_root
from ipc.errors import BadConfig, EngineError, NotFound, ServerUnavailable
from ipc.freeing import close_memory
from ipc.messages.job import Job, JobLora
from ipc.messages.loader import ReadLora
from ipc.messages.status import LoraInfo

log = logging.getLogger(__name__)

MAX_PATH = 4096
"""Bytes; PATH_MAX of Linux."""


class Loras:
    """Adds and removes adapters, one at a time.

    Resource handling: owns the `adapters` until `close`; what is being read then is let go.
    """

    def __init__(
        self,
        model: ModelParams,
        root: str,
        known_jobs: Callable[[], Iterable[Job]],
        keep: Callable[[list[KeptAdapter]], Awaitable[None]],
    ) -> None:
        """`root`: files are only read below it. `known_jobs`: those that a stage may know. `keep` returns when these,
        and no others, are on disk."""
        self.adapters = Adapters()
        self._model, self._root, self._known_jobs, self._keep = model, root, known_jobs, keep
        self._turn = asyncio.Lock()
        self._closed = False
        self._taking_back: asyncio.Task[None] | None = None
        self._unfit: dict[frozenset[Key], str] = {}
        """What could not be taken back, and why."""
        self._to_read: list[Adapter] = []
        """What is still to be taken back, of that which has a name."""

    @property
    def is_busy(self) -> bool:
        """A file is being read, or a change written down."""
        return self._turn.locked() or self.is_taking_back

    @property
    def is_taking_back(self) -> bool:
        """What an earlier run has kept is being read."""
        return self._taking_back is not None and not self._taking_back.done()

    def take_back(self, kept: Sequence[KeptAdapter], wanted: Sequence[Job], then: Callable[[], None]) -> None:
        """Begin to read what an earlier run has kept: all that has a name, and what the `wanted` jobs use; `then` is
        called at the end, whatever became of it."""
        used = frozenset[Key]().union(*(keys_of(job) for job in wanted))
        needed = [each for each in kept if each.named or each.adapter.keys & used]
        if kept:
            self._to_read = [each.adapter for each in needed if each.named]
            self._taking_back = asyncio.get_running_loop().create_task(self._take_back(needed, then))

    async def taken_back(self) -> None:
        """Wait for the end of that."""
        if self.is_taking_back:
            assert self._taking_back is not None
            await asyncio.wait([self._taking_back])

    async def _take_back(self, kept: Sequence[KeptAdapter], then: Callable[[], None]) -> None:
        loader = Loader()
        try:
            async with self._turn:
                for each in kept:
                    await self._take_back_one(each, loader)
                    self._to_read = [adapter for adapter in self._to_read if adapter != each.adapter]
                await self._keep(self.adapters.kept())
        except Exception:
            log.exception("what was kept of the LoRAs could not be taken back, or not be written down again")
        finally:
            self._to_read = []
            loader.end()
            await loader.ended()
        then()

    async def _take_back_one(self, kept: KeptAdapter, loader: Loader) -> None:
        adapter, parts = kept.adapter, list[Part]()
        try:
            if not self.adapters.has(adapter.keys):
                parts = await loader.read_lora(self._asked(adapter.files))
                if (found := dict(part.key for part in parts)) != adapter.content:
                    close_memory(part.fd for part in parts)
                    raise NotFound(f"it holds something else now, {_contents(found)}: the file was changed")
        except EngineError as error:
            changed = isinstance(error, NotFound)
            then = "is not offered any more" if changed else "is tried again at the next start"
            log.error("the LoRA %s cannot be loaded again, and %s: %s", adapter.name, then, error)
            self._unfit[adapter.keys] = str(error)
            if kept.named and not changed:
                self.adapters.set_aside(adapter)
            return
        self.adapters.take_back(kept, parts)
        log.info("the LoRA %s is there again", adapter.name)

    async def add(self, name: str, files: Sequence[str]) -> LoraInfo:
        """Read files and offer them as `name`. Raises `BadConfig` for a name or a number of files that cannot be,
        `BadCheckpoint` for a file, `OutOfMemory`; nothing has changed then."""
        for file in files:
            if "\0" in file or len(os.fsencode(file)) > MAX_PATH:
                raise BadConfig(f"a path has at most {MAX_PATH} bytes and no NUL character, got {file[:100]!r}")
        if len(files) not in (1, 2):
            raise BadConfig(f"a LoRA is one file, or that of each expert, high noise first; got {len(files)} files")
        asked = self._asked(files)
        async with self._turn:
            self.adapters.check_name(name)
            parts = await self._read(asked)
            adapter = Adapter(name, tuple(asked.files), dict(part.key for part in parts))
            try:
                self._check_open()
                await self._keep(self.adapters.kept(added=adapter))
                self._check_open()
            except BaseException:
                close_memory(part.fd for part in parts)
                raise
            self.adapters.add(adapter, parts)
        log.info("the LoRA %s is %s", name, _contents(adapter.content))
        info = self.adapters.info(name)
        self.let_go()
        return info

    def _check_open(self) -> None:
        if self._closed:
            raise ServerUnavailable("the engine stopped meanwhile")

    def _asked(self, files: Sequence[str]) -> ReadLora:
        """`BadConfig` for a file outside the root."""
        for file in files:
            check_weights_root("LoRA", file, self._root)
        return ReadLora(
            supervisor_pid=os.getpid(), files=list(map(os.path.abspath, files)), transformer=self._model.transformer,
            components=[component for component in self._model.components if component in EXPERTS],
        )  # fmt: skip

    async def _read(self, asked: ReadLora) -> list[Part]:
        loader = Loader()
        try:
            return await loader.read_lora(asked)
        finally:
            loader.end()
            await loader.ended()

    async def remove(self, name: str) -> None:
        """`NotFound` if nothing has this name."""
        async with self._turn:
            self._check_open()
            self.adapters.check_known(name)
            await self._keep(self.adapters.kept(without=name))
            self.adapters.remove(name)
        log.info("the LoRA %s is removed", name)
        self.let_go()

    def infos(self, jobs: Sequence[Job]) -> list[LoraInfo]:
        """Those in memory, and those of an earlier run that are about to be; `jobs`: the unfinished ones."""
        return self.adapters.infos(jobs) + [
            LoraInfo(
                name=adapter.name, state="reading", files=list(map(os.path.basename, adapter.files)),
                content=adapter.content, rank=0, tensors=0, bytes=0, running=running(adapter, jobs),
            )
            for adapter in sorted(self._to_read, key=lambda adapter: adapter.name)
        ]  # fmt: skip

    def let_go(self) -> None:
        """Free the adapters that nobody needs. To be called whenever a task has ended."""
        self.adapters.let_go(self._known_jobs())

    def lost(self, lora: JobLora) -> NotFound:
        """A request that was accepted cannot be computed: the engine was restarted, and does not have its adapter."""
        why = self._unfit.get(frozenset(lora.content.items()), "nothing on disk says where it was read from")
        return NotFound(
            f"the LoRA {lora.name} ({_contents(lora.content)}) that this request was accepted with could not be loaded "
            f"again when the engine was restarted: {why}; add it with `engine lora add`, and submit the request again"
        )

    async def end(self) -> None:
        """Read nothing more; what was kept stays kept."""
        if self._taking_back is not None:
            self._taking_back.cancel()
            await asyncio.wait([self._taking_back])

    def close(self) -> None:
        self._closed = True
        self.adapters.close()


def _contents(content: Mapping[str, str]) -> str:
    return ", ".join(f"{component} {content[:12]}" for component, content in content.items())
