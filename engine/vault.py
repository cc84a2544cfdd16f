"""The weights, in the descriptor store of the service manager (`FileDescriptorStoreMax` of systemd): a service that is
started again, after a crash, too, maps what the one before it has read.

What a descriptor is, its name says: component, place, hashes, and the identity of what it was read from. That is the
files, by what changes when they are replaced or written to, their LoRAs, and what they are computed in. An engine takes
only what it would now read to the same bytes, and has the manager let go of the rest. What a stage cannot bind to after
all, as another program may lay out its memory differently, is let go of, too, and read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from engine.cuda import visible_devices
from engine.states import State
from engine.systemd import Notify
from engine.weights import Placed, WeightStore
from hotreload.files import stamp
from ipc.messages.weights import Component, WeightVersion

KIND = "weights"
SETTLED = 2.0
"""Seconds since the last change of a file, below which another one could be of the same moment by the file system's
clock, and would not be seen."""

log = logging.getLogger(__name__)


class Origin(NamedTuple):
    """What the weights of a component on a device are read from, and for what."""

    model: str
    device: str
    dtype: str
    component: Component


class VaultState(State, frozen=True, kw_only=True):
    """A `Vault`; the fields have its names."""

    names: list[tuple[tuple[str, str, str], str]]
    stored: list[str]


class Vault:
    """What the service manager keeps for the next start.

    Resource handling: owns the descriptors it was made with until `open`. Error handling: what the manager does not
    hear is not kept; nothing else depends on it.
    """

    def __init__(self, notify: Notify, stored: Mapping[str, int] | None = None) -> None:
        """`stored`: name -> descriptor of what the manager has passed to this process."""
        self._notify = notify
        self._given = dict(stored or {})
        self._stored = set(self._given)
        """Names of what the manager has."""
        self._names: dict[tuple[str, str, str], str] = {}
        """(device, component, content hash) -> name of what is worth keeping."""
        self._identities: dict[tuple[str, str], str] = {}
        """(device, component) -> what it was to be read from at the start."""

    def state(self) -> VaultState:
        return VaultState(names=list(self._names.items()), stored=sorted(self._stored))

    @classmethod
    def restored(cls, state: VaultState, notify: Notify, store: WeightStore) -> Vault:
        """That of the program before this one."""
        made = cls(notify)
        made._names, made._stored = dict(state.names), set(state.stored)
        store.on_change = made.follow
        return made

    async def open(self, store: WeightStore, origins: Sequence[Origin]) -> None:
        """Before any stage is started: put what is still right into `store`, let go of the rest."""
        identities = await asyncio.to_thread(lambda: [identity_of(origin) for origin in origins])
        for origin, identity in zip(origins, identities, strict=True):
            if identity is not None:
                self._identities[origin.device, origin.component.name] = identity
        for name, fd in self._given.items():
            found = parse(name)
            if found is not None and self._identities.get((found.device, found.version.component)) == found.identity:
                store.take_back(found.device, found.version, fd)
                self._names[found.device, found.version.component, found.version.content] = name
                log.info("%s %s was kept by the service manager", found.version.component, found.version.content[:12])
            else:
                os.close(fd)
        self._given.clear()
        self.follow(store)
        store.on_change = self.follow

    async def settle(self, store: WeightStore, origins: Sequence[Origin]) -> None:
        """All stages are up: have the manager keep what they have read, unless its files have changed meanwhile."""
        identities = await asyncio.to_thread(lambda: [identity_of(origin) for origin in origins])
        for origin, identity in zip(origins, identities, strict=True):
            component = origin.component.name
            if identity is None or self._identities.get((origin.device, component)) != identity:
                continue
            for placed in store:
                if (placed.device, placed.version.component) == (origin.device, component):
                    key = (placed.device, component, placed.version.content)
                    self._names.setdefault(key, name_of(placed, identity))
        self.follow(store)

    def follow(self, store: WeightStore) -> None:
        """Have the manager keep what is in `store` and worth it, and nothing else."""
        named = ((self._names.get((p.device, p.version.component, p.version.content)), p.fd) for p in store)
        wanted = {name: fd for name, fd in named if name is not None}
        for name in self._stored - wanted.keys():
            self._notify.let_go(name)
        self._stored = {n for n, fd in wanted.items() if n in self._stored or self._notify.keep(n, fd)}


class Named(NamedTuple):
    """What a name says."""

    device: str
    version: WeightVersion
    identity: str


def name_of(placed: Placed, identity: str) -> str:
    """Up to 255 printable ASCII characters, no colon: `sd_pid_notify_with_fds(3)`."""
    v = placed.version
    number = "-" if v.device is None else str(v.device)
    device = placed.device.replace(":", "=")
    return "/".join((KIND, v.component, device, number, v.content, v.fingerprint, str(v.bytes), identity))


def parse(name: str) -> Named | None:
    """None for a name of something else, or of another program's."""
    match name.split("/"):
        case [kind, component, device, number, content, fingerprint, size, identity] if kind == KIND:
            pass
        case _:
            return None
    if not size.isdigit() or not (number == "-" or number.isdigit()):
        return None
    version = WeightVersion(
        component=component, content=content, fingerprint=fingerprint, bytes=int(size),
        device=None if number == "-" else int(number),
    )  # fmt: skip
    return Named(device.replace("=", ":"), version, identity)


def identity_of(origin: Origin) -> str | None:
    """Hash of all that the placed bytes depend on, in hex; None if that cannot be known now."""
    component = origin.component
    files = [*component.files, *(lora.file for lora in component.loras)]
    try:
        stamps = [stamp(Path(file)) for file in files]
        card = visible_devices()[int(origin.device.partition(":")[2])] if origin.device.startswith("cuda") else ""
    except (OSError, IndexError):
        return None  # who reads them says more
    if any(time.time() - each.changed_ns / 1e9 < SETTLED for each in stamps):
        return None
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode((origin, card, stamps)))
