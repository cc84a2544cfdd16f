"""How a stage comes by its weights: from memory that is there already, else from disk into memory that will be; and how
it changes between versions of them, with and without LoRA adapters."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hotreload.device_placement import DevicePlacement
from hotreload.host_version import HostVersion
from hotreload.overlay import make_overlay
from hotreload.placement import Placement, Runs, Shapes, Slots, Table, lay_out, rebind, view_placed
from hotreload.weights import Allocate, load_weights
from ipc.errors import OutOfMemory, StageFailed
from ipc.messages.job import Job
from ipc.messages.memory import OFFLOADED
from ipc.messages.stage import Start
from ipc.messages.weights import Component, WeightVersion
from stages.adapters import Lent, Wanted, wanted_by
from stages.lanes import lane_of
from stages.models.joined import JoinedModule
from stages.offload import Offload, Pools, Source, source_of, unbind
from stages.stage import Left, Links, component

M = TypeVar("M", bound=nn.Module)


class Bound(NamedTuple):
    """What a module computes with: a version of its weights, and the adapters that are added to it."""

    content: str
    loras: Wanted = ()
    overlay: int = 0
    """Which of the overlays made so far: the same one, made again, is in other memory. 0: none."""


class Network(Generic[M]):
    """A module and the versions of its weights that are in memory. It computes with one of them at a time; to change
    makes every parameter and buffer a view of other memory, and copies nothing. With adapters, the tensors that they
    touch are made anew, in memory of this process (`hotreload/overlay.py`), and the others are the version's.

    Offloaded (`offload`), the module is on meta, the versions are in host memory, and `stages/offload.py` brings what
    is computed with to the device.

    Resource handling: a version stays mapped until `forget`, the last one for ever; an overlay is there until something
    else is bound.
    """

    def __init__(
        self,
        module: M,
        name: str,
        shapes: Shapes,
        aliases: Mapping[str, str],
        content: str,
        device: torch.device,
        unlocked: Callable[[str, str, str], None] = lambda component, content, why: None,
    ) -> None:
        """`module` is bound to version `content`; use `load`. `unlocked`: as in `Links`."""
        self.module = module
        self.bound = Bound(content)
        self.device = device
        self.lane = lane_of(device)
        """Where it computes."""
        self._unlocked = unlocked
        self._lent = Lent(pinned=device.type == "cuda")
        self._overlays = itertools.count(1)
        self._overlaid: tuple[str, ...] = ()
        """Names of the tensors that are not the version's."""
        self._name, self._shapes, self._aliases = name, shapes, aliases
        self._slots: Slots | None = None
        """Of the module, from when it is bound to another version."""
        self._versions: dict[str, dict[str, Tensor]] = {}
        """Content hash -> its tensors on the device."""
        self._on_host: dict[str, HostVersion] = {}
        """Content hash -> the version in host memory."""
        self._offload: Offload | None = None
        self._source: Source | None = None
        """The last one that was made."""

    @property
    def content(self) -> str:
        """Hash of the version that is bound."""
        return self.bound.content

    @classmethod
    def load(
        cls,
        module: M,
        start: Start,
        links: Links,
        name: str,
        *,
        device: str,
        dtype: Callable[[str], torch.dtype],
        aliases: Mapping[str, str] | None = None,
    ) -> Network[M]:
        """Bind `module` (on meta) to the weights of component `name`.

        Its tensors are views of memory that outlives this process: of what the supervisor holds, or of what is read
        here and handed to it. Only where the GPU has no such memory (`start.outliving`) are they this process's own.
        Raises `BadCheckpoint`, `OutOfMemory` if there is no room for them, and `StageFailed` for memory that is not
        what it is said to be.
        """
        aliases = aliases or {}
        shapes, where = shapes_of(module, dtype, aliases), torch.device(device)

        def progress(done: int, total: int) -> None:
            links.loading(name, done, total)

        network = cls(module, name, shapes, aliases, "", where, links.unlocked)
        if placed := links.placed.get(name):
            for version, fd in placed:
                try:
                    network.adopt(version, fd)
                except (OSError, ValueError) as error:
                    raise StageFailed(f"the weights that are in memory cannot be used: {error}") from error
            content = start.serving.get(name, placed[-1][0].content)
        elif start.outliving or start.memory.level >= OFFLOADED:
            home = "cpu" if start.memory.level >= OFFLOADED else device
            version, placement = place(
                module, component(start, name), device=home, dtype=dtype, aliases=aliases, progress=progress
            )
            links.place(version, home, placement.fd)
            network._keep(version, placement)
            placement.close()
            content = version.content
        else:
            content = load_weights(
                module, component(start, name), device=device, dtype=dtype, aliases=aliases, progress=progress,
                allocate=own_memory(shapes, runs_of(module), device),
            )  # fmt: skip
            network._versions[content] = {n: t for n, t in module.state_dict().items() if n not in aliases}
        if start.memory.level < OFFLOADED:
            network.use(content)
        else:
            unbind(module)
            network.bound = Bound(content)
        return network

    def adopt(self, version: WeightVersion, fd: int) -> None:
        """Map a version that another process has placed, and see that it is what it is said to be (ValueError). What is
        placed in host memory for a GPU is mapped in the background: nobody waits for it but who offloads."""
        if version.device is not None or self.device.type == "cpu":
            if version.content not in self._versions:
                placement = attach(version, fd, self._shapes, runs_of(self.module))
                self._keep(version, placement)
                placement.close()
        elif version.content not in self._on_host:
            self._on_host[version.content] = HostVersion.mapping(
                version, fd, self._shapes, runs_of(self.module), self.device.index or 0,
                functools.partial(self._unlocked, self._name, version.content),
            )  # fmt: skip

    def _keep(self, version: WeightVersion, placement: Placement | DevicePlacement) -> None:
        if isinstance(placement, Placement):
            if self.device.type == "cuda":
                placement.pin()
                if placement.unlocked:
                    self._unlocked(self._name, version.content, placement.unlocked)
            self._on_host[version.content] = HostVersion.of(placement)
        if isinstance(placement, DevicePlacement) or self.device.type == "cpu":
            self._versions[version.content] = placement.tensors

    def forget(self, content: str) -> None:
        """Unmap a version. If it is bound, another takes its place: its memory must not wait for the next task."""
        usable = self._versions if self._offload is None else self._on_host
        others = [other for other in usable if other != content]
        if content == self.content and others:
            self.release()
            if self._offload is None:
                self.use(others[-1])
            else:
                self.bound = Bound(others[-1])
        self._source = None  # it may be of that version
        self._versions.pop(content, None)
        if (host := self._on_host.pop(content, None)) is not None:
            host.let_go()

    def lend(self, version: WeightVersion, fd: int) -> None:
        """Know an adapter that a task is about to want. The descriptor is duplicated."""
        self._lent.lend(version, fd)

    def keep_adapters(self, jobs: Collection[Job]) -> None:
        """Let go of the adapters, and of the overlay, that none of these tasks wants."""
        wanted = {wanted_by(job, self._name) for job in jobs}
        self._lent.keep({content for loras in wanted for content, _ in loras})
        if self.bound.loras not in wanted:
            self.drop_overlay()

    def drop_overlay(self) -> None:
        """Bind the version without adapters."""
        if self.bound.loras and self._offload is not None:
            self._offload.release()
            self._source = None  # it has the adapters' tensors
            self.bound = Bound(self.content)
        elif self.bound.loras:
            base = self._versions[self.content]
            rebind(self.module, {name: base[name] for name in self._overlaid})
            fuse(self.module)
            self.bound, self._overlaid = Bound(self.content), ()

    def use(self, content: str, loras: Wanted = ()) -> M:
        """The module, bound to a version that was adopted (KeyError) or is bound already, with these adapters, which
        were lent. When it raises, for want of memory, the version without adapters is bound."""
        if self._offload is not None:
            self._offload.bind(self._made_source(content, loras))
            self.bound = Bound(content, loras)
            return self.module
        if (content, loras) == self.bound[:2] and content in self._versions:
            return self.module
        # First without adapters: what the overlay that was bound takes is free for the next.
        if content == self.content:
            self.drop_overlay()
        else:
            if self._slots is None:
                self._slots = Slots(self.module, self._aliases)
            self._slots.bind(self._versions[content])
            fuse(self.module)
            self.bound, self._overlaid = Bound(content), ()
        if loras:
            made = make_overlay(self._versions[content], self._lent.applied(loras), runs_of(self.module))
            rebind(self.module, made)
            fuse(self.module)
            self.bound, self._overlaid = Bound(content, loras, next(self._overlays)), tuple(made)
        return self.module

    def offload(self, pools: Pools, left: Left) -> None:
        """Compute from the versions in host memory from now on, with these pools. What was mapped on the device, and is
        not any more, is added to `left`. Raises OSError or ValueError, and `StageFailed` if a version is not in host
        memory; nothing has changed then.

        Takes no memory of the device, of which there may be none: what is asked of it first is the next use."""
        tables = self.tables_on_host()
        content = self.content
        if self._offload is not None:
            self._offload.end()
        unbind(self.module)
        if isinstance(self.module, JoinedModule):
            self.module.fuse()  # lets go of the tensors that were fused
        if self.device.type != "cpu":
            left += [(self._name, each) for each in self._versions]
            self._versions.clear()
        self._offload = Offload(self.module, tables[0], self._aliases, pools)
        self.bound, self._overlaid = Bound(content), ()

    def tables_on_host(self) -> list[Table]:
        """Of the versions in host memory, once they are mapped. Raises what `offload` does."""
        if missing := self._versions.keys() - self._on_host.keys():
            raise StageFailed(f"{self._name}: version {min(missing)} is not in host memory yet; wait until it is there")
        return [host.placement().table for host in self._on_host.values()]

    def onload(self, links: Links, left: Left, *, outliving: bool) -> None:
        """Compute with weights on the device from now on: all versions are brought there, to memory that outlives this
        process, which is handed over, and are not in `left` any more. Raises `OutOfMemory`, and is offloaded still."""
        if self._offload is None:
            return
        self._offload.release()
        if self.device.type == "cpu":
            self._versions = {content: host.placement().tensors for content, host in self._on_host.items()}
        elif outliving:
            self._versions = self._placed_on_device(links, left)
        else:
            self._versions = {content: self._copied(host.placement()) for content, host in self._on_host.items()}
        self._offload.end()
        self._offload, content = None, self.content
        self.bound = Bound("")
        self.use(content)

    def _placed_on_device(self, links: Links, left: Left) -> dict[str, dict[str, Tensor]]:
        """All of them, or none."""
        made: dict[str, DevicePlacement] = {}
        with contextlib.ExitStack() as descriptors:
            for content, host in self._on_host.items():
                placement = create(self._name, str(self.device), self._shapes, runs_of(self.module))
                assert isinstance(placement, DevicePlacement), f"{self._name} computes on a GPU"
                descriptors.callback(placement.close)
                placement.flat.copy_(host.placement().flat[: len(placement.flat)])
                made[content] = placement
            for content, placement in made.items():
                links.place(placement.seal(self._name, content), str(self.device), placement.fd)
                if (self._name, content) in left:
                    left.remove((self._name, content))
        return {content: placement.tensors for content, placement in made.items()}

    def _copied(self, host: Placement) -> dict[str, Tensor]:
        """A version in memory of this process."""
        allocate = own_memory(self._shapes, runs_of(self.module), str(self.device))
        made = {name: allocate(name, tensor.shape, tensor.dtype) for name, tensor in host.tensors.items()}
        for name, tensor in made.items():
            tensor.copy_(host.tensors[name])
        return made

    def release(self) -> None:
        """If offloaded, give back what is on the device beside the pools, until it is used again."""
        if self._offload is not None:
            self._offload.release()

    @property
    def pools(self) -> Pools | None:
        """Of an offloaded network."""
        return None if self._offload is None else self._offload.pools

    @property
    def bound_source(self) -> Source:
        """What is bound, of an offloaded network."""
        assert self._offload is not None and self._offload.source is not None, f"{self._name} is bound to nothing"
        return self._offload.source

    def _made_source(self, content: str, loras: Wanted) -> Source:
        """A version, with adapters, to be brought to the device."""
        key = (self._name, content, loras)
        if self._source is None or self._source.key != key:
            self._source = None
            host = self._on_host[content].placement()
            self._source = source_of(key, host, self._lent.applied(loras), self.device)
        return self._source

    def of(self, job: Job, step: int = 0) -> M:
        """The module as a task wants it, at its step `step`."""
        return self.use(version_of(job, self._name, step) or self.content, wanted_by(job, self._name))


def hold(
    networks: Sequence[Network[Any]], pools: Sequence[Pools] | None, links: Links, left: Left, *, outliving: bool
) -> None:
    """Have all networks of a stage, or none, compute with what is in host memory, with these pools, one for each; or,
    without pools, with what is on the device. Raises what `offload` and `onload` do."""
    if pools is not None:
        for network in networks:
            network.tables_on_host()
        for network, its in zip(networks, pools, strict=True):
            network.offload(its, left)
        return
    before = [network.pools for network in networks]
    for number, network in enumerate(networks):
        try:
            network.onload(links, left, outliving=outliving)
        except Exception:
            for moved, former in zip(networks[:number], before, strict=False):
                if former is not None:
                    moved.offload(former, left)
            raise


def version_of(job: Job, name: str, step: int) -> str | None:
    """Content hash of the version of a component that a task is computed with at a step; None: whichever there is."""
    changed = [c.content for c in job.changes if c.component == name and c.step <= step]
    return changed[-1] if changed else job.weights.get(name)


def shapes_of(module: nn.Module, dtype: Callable[[str], torch.dtype], aliases: Mapping[str, str]) -> Shapes:
    """Of the tensors that are placed: each once, by its first name."""
    return {n: (dtype(n), tuple(t.shape)) for n, t in module.state_dict().items() if n not in aliases}


def runs_of(module: nn.Module) -> Runs:
    """Tensors that are to lie one right behind the other."""
    return module.runs() if isinstance(module, JoinedModule) else ()


def fuse(module: nn.Module) -> None:
    """Have a module that was bound use its runs as one tensor each."""
    if isinstance(module, JoinedModule):
        fused = module.fuse()
        assert fused or not module.runs(), "the tensors of its runs do not lie together"


def place(
    module: nn.Module,
    source: Component,
    *,
    device: str,
    dtype: Callable[[str], torch.dtype],
    aliases: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> tuple[WeightVersion, Placement | DevicePlacement]:
    """Read a component into memory that outlives this process, and bind `module` (on meta) to it.

    Raises `BadCheckpoint` before anything is allocated, or for what shows only as it is read; `OutOfMemory`.
    """
    shapes = shapes_of(module, dtype, aliases)
    room: list[Placement | DevicePlacement] = []

    def allocate(tensor: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        # Only now: by the first call the files are known to fit the model.
        if not room:
            room.append(create(source.name, device, shapes, runs_of(module)))
        return room[0].tensors[tensor]

    try:
        content = load_weights(
            module, source, device=device, dtype=dtype, aliases=aliases, progress=progress, allocate=allocate
        )
        fuse(module)
        return room[0].seal(source.name, content), room[0]
    except BaseException:
        for placement in room:
            placement.close()
        raise


def own_memory(shapes: Shapes, runs: Runs, device: str) -> Allocate:
    """Memory of this process, a piece for each run and for each other tensor, taken when first asked for."""
    run_of = {name: tuple(run) for run in runs for name in run}
    rooms: dict[str, Tensor] = {}

    def allocate(name: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        if name not in rooms:
            run = run_of.get(name, (name,))
            table = lay_out({n: shapes[n] for n in run}, [run])
            flat = torch.empty(table.size, dtype=torch.uint8, device=device)
            rooms.update((tensor.name, view_placed(flat, tensor)) for tensor in table.tensors)
        return rooms.pop(name)

    return allocate


def attach(version: WeightVersion, fd: int, shapes: Shapes, runs: Runs) -> Placement | DevicePlacement:
    """What was placed, wherever that is."""
    kind = Placement if version.device is None else DevicePlacement
    return kind.attach(version, fd, shapes, runs)


def create(name: str, device: str, shapes: Shapes, runs: Runs) -> Placement | DevicePlacement:
    """Room for the weights of a component on a device. Raises `OutOfMemory`."""
    where = torch.device(device)
    try:
        if where.type == "cpu":
            return Placement.create(name, shapes, runs)
        return DevicePlacement.create(where.index or 0, shapes, runs)
    except OSError as error:
        size = lay_out(shapes, runs).size / 2**30
        raise OutOfMemory(
            f"there is no room on {device} for the {size:.1f} GiB of {name}; free memory there, or take a smaller model"
        ) from error
