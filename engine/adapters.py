"""LoRA adapters that requests name: which there are, and their memory, held by the supervisor so that it outlives every
other process.

A name is what it is at the moment when a request is accepted: from then on the request has the hash of its content, and
that stays in memory until the last request that has it is done, whatever becomes of the name.
"""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import msgspec

from engine.params import MAX_LORAS
from engine.states import Descriptors, State
from hotreload.lora_options import EXTENSION, MAX_STRENGTH
from ipc.errors import BadConfig, BadRequest, NotFound
from ipc.freeing import close_memory
from ipc.messages.job import Job, JobLora
from ipc.messages.status import Holding, LoraInfo
from ipc.messages.weights import AdapterVersion, WeightVersion

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Key = tuple[str, str]
"""(component, content hash)."""


class Part(NamedTuple):
    """What an adapter adds to one component, and the descriptor of its memory."""

    adapter: AdapterVersion
    fd: int

    @property
    def key(self) -> Key:
        return self.adapter.version.component, self.adapter.version.content


class Adapter(msgspec.Struct, frozen=True):
    """One adapter, as it was loaded."""

    name: str
    files: tuple[str, ...]
    """Absolute paths, to read them again after a restart; they may hold something else by now."""
    content: dict[str, str]
    """Component -> content hash."""

    @property
    def keys(self) -> frozenset[Key]:
        return frozenset(self.content.items())


class KeptAdapter(NamedTuple):
    """What the journal has of an adapter."""

    adapter: Adapter
    named: bool
    """Requests can name it; else only accepted ones use it."""


class AdaptersState(State, frozen=True, kw_only=True):
    """An `Adapters`; `fds` are the places of the descriptors of `parts`."""

    named: list[Adapter]
    nameless: list[Adapter]
    absent: list[Adapter]
    parts: list[AdapterVersion]
    fds: list[int]


class Adapters:
    """All adapters in memory, by name; and those that have no name any more but are used.

    Resource handling: owns one descriptor per component and content until nobody needs it (`let_go`), or `close`.
    """

    def __init__(self) -> None:
        self._named: dict[str, Adapter] = {}
        self._nameless: list[Adapter] = []
        """Replaced or removed, and used."""
        self._absent: dict[str, Adapter] = {}
        """By name: what a restarted engine could not read. It cannot be asked for; the next start tries again."""
        self._parts: dict[Key, Part] = {}
        self._lent: collections.Counter[Key] = collections.Counter()
        """To requests that are being accepted."""

    def state(self, fds: Descriptors) -> AdaptersState:
        """What is there, for the program that takes the place of this one."""
        parts = list(self._parts.values())
        return AdaptersState(
            named=list(self._named.values()), nameless=self._nameless, absent=list(self._absent.values()),
            parts=[part.adapter for part in parts],
            fds=fds.put_all(part.fd for part in parts),
        )  # fmt: skip

    def put_back(self, state: AdaptersState, fds: Descriptors) -> None:
        """Hold what the program before this one held. ValueError if something is missing."""
        parts = [Part(*pair) for pair in zip(state.parts, fds.take_all(state.fds), strict=True)]
        self._parts = {part.key: part for part in parts}
        self._named = {adapter.name: adapter for adapter in state.named}
        self._nameless = state.nameless
        self._absent = {adapter.name: adapter for adapter in state.absent}
        if any(not adapter.keys <= self._parts.keys() for adapter in (*state.named, *state.nameless)):
            raise ValueError("an adapter is handed over without its memory")

    def check_name(self, name: str) -> None:
        """`BadConfig` for a name that cannot be one, or is one too many."""
        if not NAME.fullmatch(name) or name.endswith(EXTENSION):
            raise BadConfig(
                f"the LoRA name {name[:100]!r} must be up to 64 letters, digits, '.', '-' and '_', beginning with a "
                f"letter or digit, and not end in {EXTENSION}"
            )
        if name not in self._named and len(self._named) >= MAX_LORAS:
            raise BadConfig(f"{MAX_LORAS} LoRAs are loaded, which is the limit; remove one first")

    def add(self, adapter: Adapter, parts: Iterable[Part]) -> None:
        """Offer these parts, which are its content; their descriptors are taken over. Whoever had the name loses it."""
        self._hold(parts)
        if adapter.name in self._named:
            self._nameless.append(self._named[adapter.name])
        self._named[adapter.name] = adapter
        self._absent.pop(adapter.name, None)

    def _hold(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if part.key in self._parts:
                os.close(part.fd)
            else:
                self._parts[part.key] = part

    def remove(self, name: str) -> None:
        """Take the name away. `NotFound` if nothing has it."""
        self.check_known(name)
        if self._absent.pop(name, None) is None:
            self._nameless.append(self._named.pop(name))

    def set_aside(self, adapter: Adapter) -> None:
        """It could not be read now."""
        self._absent[adapter.name] = adapter

    def check_known(self, name: str) -> None:
        """`NotFound` if nothing has this name."""
        if name not in self._named and name not in self._absent:
            raise NotFound(f"no LoRA has the name {name[:100]!r}; {self._choice()}")

    def resolve(self, texts: Sequence[str]) -> list[JobLora]:
        """What a request asks for, NAME or NAME:STRENGTH each. `BadRequest` for what is not loaded."""
        loras = [self._resolve(text) for text in texts]
        names = [lora.name for lora in loras]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadRequest(f"the LoRA {twice[0]} is asked for twice; add the strengths")
        return loras

    def _resolve(self, text: str) -> JobLora:
        name, colon, tail = text.rpartition(":")
        if not colon:
            name, tail = text, "1"
        if (found := self._named.get(name)) is None:
            raise BadRequest(f"no LoRA has the name {name[:100]!r}; {self._choice()}")
        try:
            strength = float(tail)
        except ValueError:
            raise BadRequest(f"LoRA {text[:100]!r}: {tail[:20]!r} is not a strength; expected NAME:0.8") from None
        if not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
            raise BadRequest(
                f"LoRA {text[:100]!r}: the strength must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, got {tail[:20]}"
            )
        return JobLora(name=name, strength=strength, content=found.content)

    def kept(self, without: str = "", added: Adapter | None = None) -> list[KeptAdapter]:
        """What a restarted engine needs of these: all that have a name, and those that requests may still use. As it
        will be once the name `without` is taken away, or `added` has its own."""
        named = self._absent | self._named | ({} if added is None else {added.name: added})
        named.pop(without, None)
        nameless = [a for a in (*self._nameless, *self._named.values()) if a not in named.values()]
        return [KeptAdapter(adapter, True) for adapter in named.values()] + [KeptAdapter(a, False) for a in nameless]

    def take_back(self, kept: KeptAdapter, parts: Iterable[Part]) -> None:
        """Offer, or hold for the requests that use it, what was kept; the descriptors are taken over."""
        self._hold(parts)
        if kept.named:
            self._named[kept.adapter.name] = kept.adapter
        else:
            self._nameless.append(kept.adapter)

    def has(self, keys: frozenset[Key]) -> bool:
        """All of these are in memory."""
        return keys <= self._parts.keys()

    def _choice(self) -> str:
        loaded = f"loaded are {', '.join(sorted(self._named))}" if self._named else "none is loaded"
        return f"{loaded}: see `engine lora list`, `engine lora add NAME FILE`"

    def missing(self, job: Job) -> list[JobLora]:
        """Those of a job that are not in memory any more."""
        return [lora for lora in job.loras if not self._parts.keys() >= set(lora.content.items())]

    @contextmanager
    def lend(self, job: Job) -> Iterator[None]:
        """Keep those of a job in memory. `BadRequest` if one has gone since it was resolved."""
        if gone := self.missing(job):
            raise BadRequest(f"the LoRA {gone[0].name} was removed just now; {self._choice()}")
        keys = keys_of(job)
        self._lent.update(keys)
        try:
            yield
        finally:
            self._lent.subtract(keys)

    def of(self, job: Job) -> list[tuple[WeightVersion, int]]:
        """What a dit needs for a job, each once; the descriptors stay owned by this object."""
        parts = [self._parts[key] for key in sorted(keys_of(job))]
        return [(part.adapter.version, part.fd) for part in parts]

    def let_go(self, jobs: Iterable[Job]) -> None:
        """Free what has neither a name nor a user. `jobs`: all that a stage may know."""
        self._lent = +self._lent
        used = set(self._lent).union(*(keys_of(job) for job in jobs))
        self._nameless = [adapter for adapter in self._nameless if adapter.keys <= used]
        kept = used.union(*(adapter.keys for adapter in self._named.values()))
        close_memory(self._parts.pop(key).fd for key in self._parts.keys() - kept)

    def infos(self, jobs: Sequence[Job]) -> list[LoraInfo]:
        """Those that have a name, by name, then those that only some of the unfinished `jobs` have."""
        named = [self._info(adapter, "loaded", jobs) for _, adapter in sorted(self._named.items())]
        draining: list[Adapter] = []
        for adapter in self._nameless:
            if adapter not in draining and adapter != self._named.get(adapter.name):
                draining.append(adapter)
        return named + [info for a in draining if (info := self._info(a, "draining", jobs)).running]

    def info(self, name: str) -> LoraInfo:
        """Of one that was added just now."""
        return self._info(self._named[name], "loaded", [])

    def _info(self, adapter: Adapter, state: Literal["loaded", "draining"], jobs: Sequence[Job]) -> LoraInfo:
        parts = [self._parts[key].adapter for key in adapter.keys]
        return LoraInfo(
            name=adapter.name, state=state, files=list(map(os.path.basename, adapter.files)), content=adapter.content,
            rank=max(part.rank for part in parts), tensors=sum(part.tensors for part in parts),
            bytes=sum(part.version.bytes for part in parts),
            running=running(adapter, jobs),
        )  # fmt: skip

    def holdings(self) -> list[Holding]:
        return [
            Holding(
                name=f"LoRA of {part.adapter.version.component}", where="host", state="placed",
                bytes=part.adapter.version.bytes, generation=part.adapter.version.content,
            )
            for part in self._parts.values()
        ]  # fmt: skip

    def close(self) -> None:
        while self._parts:
            os.close(self._parts.popitem()[1].fd)


def running(adapter: Adapter, jobs: Iterable[Job]) -> int:
    """How many of these jobs use it under its name."""
    mine = (adapter.name, adapter.content)
    return sum(any((lora.name, lora.content) == mine for lora in job.loras) for job in jobs)


def keys_of(job: Job) -> frozenset[Key]:
    """What a job's adapters add, to which component."""
    return frozenset(key for lora in job.loras for key in lora.content.items())


def adapter_metadata(job: Job) -> dict[str, Any]:
    """What the metadata of a result says about its adapters, if there are any."""
    return {"adapters": msgspec.to_builtins(job.loras)} if job.loras else {}
