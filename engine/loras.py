"""LoRA adapters while requests run: read by a process of their own, then offered by name.

Nothing waits for a reader but who asked for it, and whatever fails leaves the names as they were.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Sequence

from engine.adapters import Adapters, Part
from engine.checkpoint import EXPERTS
from engine.loader import Loader
from engine.params import ModelParams
from ipc.channel import close_fds
from ipc.errors import BadConfig, NotFound, ServerUnavailable
from ipc.messages import Job, JobLora, LoraInfo, ReadLora

log = logging.getLogger(__name__)

MAX_PATH = 4096
"""Bytes; PATH_MAX of Linux."""


class Loras:
    """Adds and removes adapters, one at a time.

    Resource handling: owns the `adapters` until `close`; what is being read then is let go.
    """

    def __init__(self, model: ModelParams, known_jobs: Callable[[], Iterable[Job]]) -> None:
        """`known_jobs`: those that a stage may know."""
        self.adapters = Adapters()
        self._model, self._known_jobs = model, known_jobs
        self._turn = asyncio.Lock()
        self._closed = False

    @property
    def is_busy(self) -> bool:
        """A file is being read."""
        return self._turn.locked()

    async def add(self, name: str, files: Sequence[str]) -> LoraInfo:
        """Read files and offer them as `name`. Raises `BadConfig` for a name or a number of files that cannot be,
        `BadCheckpoint` for a file, `OutOfMemory`; nothing has changed then."""
        for file in files:
            if "\0" in file or len(os.fsencode(file)) > MAX_PATH:
                raise BadConfig(f"a path has at most {MAX_PATH} bytes and no NUL character, got {file[:100]!r}")
        if len(files) not in (1, 2):
            raise BadConfig(f"a LoRA is one file, or that of each expert, high noise first; got {len(files)} files")
        asked = ReadLora(
            supervisor_pid=os.getpid(), files=list(files), transformer=self._model.transformer,
            components=[component for component in self._model.components if component in EXPERTS],
        )  # fmt: skip
        async with self._turn:
            self.adapters.check_name(name)
            parts = await self._read(asked)
            if self._closed:
                close_fds(part.fd for part in parts)
                raise ServerUnavailable("the engine stopped while the LoRA was read")
            adapter = self.adapters.add(name, [os.path.basename(file) for file in files], parts)
        log.info("the LoRA %s is %s", name, ", ".join(f"{c} {h[:12]}" for c, h in adapter.content.items()))
        info = self.adapters.info(name)
        self.let_go()
        return info

    async def _read(self, asked: ReadLora) -> list[Part]:
        loader = Loader()
        try:
            return await loader.read_lora(asked)
        finally:
            loader.end()
            await loader.ended()

    def remove(self, name: str) -> None:
        """`NotFound` if nothing has this name."""
        self.adapters.remove(name)
        log.info("the LoRA %s is removed", name)
        self.let_go()

    def let_go(self) -> None:
        """Free the adapters that nobody needs. To be called whenever a task has ended."""
        self.adapters.let_go(self._known_jobs())

    def close(self) -> None:
        self._closed = True
        self.adapters.close()


def lost(lora: JobLora) -> NotFound:
    """A request that was accepted cannot be computed: the engine was restarted, and does not have its adapter."""
    content = ", ".join(f"{component} {content[:12]}" for component, content in lora.content.items())
    return NotFound(
        f"the LoRA {lora.name} ({content}) that this request was accepted with is not in memory since the engine was "
        "restarted; add it with `engine lora add`, and submit the request again"
    )
