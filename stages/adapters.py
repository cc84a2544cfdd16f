"""The LoRA adapters that the tasks of a process are computed with, of one component."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TypeAlias

from hotreload.adapters import Adapter, attach_adapter
from hotreload.overlay import Applied
from ipc.messages.job import Job
from ipc.messages.weights import WeightVersion

Wanted: TypeAlias = tuple[tuple[str, float], ...]
"""Content hash and strength of each adapter of a task, in the order in which they are added."""


def wanted_by(job: Job, component: str) -> Wanted:
    """What a task wants added to a component. A strength of 0 adds nothing."""
    loras = [lora for lora in job.loras if lora.strength and component in lora.content]
    return tuple((lora.content[component], lora.strength) for lora in loras)


class Lent:
    """Adapters that the supervisor has lent this process, by content hash; mapped when they are first used.

    Resource handling: owns a descriptor, or a mapping, of each until `keep` leaves it out.
    """

    def __init__(self, *, pinned: bool) -> None:
        """`pinned`: a GPU adds them. It copies from page-locked memory at ten times the rate."""
        self._pinned = pinned
        self._unmapped: dict[str, tuple[WeightVersion, int]] = {}
        self._mapped: dict[str, Adapter] = {}

    def lend(self, version: WeightVersion, fd: int) -> None:
        """Know an adapter. The descriptor is duplicated."""
        if version.content not in self._unmapped and version.content not in self._mapped:
            self._unmapped[version.content] = (version, os.dup(fd))

    def applied(self, wanted: Wanted) -> Sequence[Applied]:
        """ValueError for memory that is not what the supervisor says."""
        return [Applied(self._map(content), strength) for content, strength in wanted]

    def keep(self, contents: Collection[str]) -> None:
        """Let go of all others."""
        for content in self._unmapped.keys() - contents:
            os.close(self._unmapped.pop(content)[1])
        for content in self._mapped.keys() - contents:
            del self._mapped[content]

    def _map(self, content: str) -> Adapter:
        if content in self._unmapped:
            version, fd = self._unmapped[content]
            self._mapped[content] = attach_adapter(version, fd, pinned=self._pinned)
            os.close(self._unmapped.pop(content)[1])
        return self._mapped[content]
