"""How a stage comes by its weights: from memory that is there already, else from disk into memory that will be; and how
it changes between versions of them, with and without LoRA adapters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hotreload.device_placement import DevicePlacement
from hotreload.overlay import make_overlay
from hotreload.placement import Placement, Runs, Shapes, bind, lay_out, rebind, view_placed
from hotreload.weights import Allocate, load_weights
from ipc.errors import OutOfMemory
from ipc.messages import Component, Job, Start, WeightVersion
from stages.adapters import Lent, Wanted, wanted_by
from stages.models.joined import JoinedModule
from stages.stage import Links, component

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

    Resource handling: a version stays mapped until `forget`, the last one for ever; an overlay is there until something
    else is bound.
    """

    def __init__(self, module: M, name: str, shapes: Shapes, aliases: Mapping[str, str], content: str) -> None:
        """`module` is bound to version `content`; use `load`."""
        self.module = module
        self.bound = Bound(content)
        self._lent = Lent()
        self._overlays = itertools.count(1)
        self._overlaid: tuple[str, ...] = ()
        """Names of the tensors that are not the version's."""
        self._name, self._shapes, self._aliases = name, shapes, aliases
        self._versions: dict[str, dict[str, Tensor]] = {}
        """Content hash -> its tensors."""

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
        Raises `BadCheckpoint`, and `OutOfMemory` if there is no room for them.
        """
        aliases = aliases or {}
        shapes = shapes_of(module, dtype, aliases)

        def progress(done: int, total: int) -> None:
            links.loading(name, done, total)

        if placed := links.placed.get(name):
            network = cls(module, name, shapes, aliases, "")
            for version, fd in placed:
                network.adopt(version, fd)
            network.use(start.serving.get(name, placed[-1][0].content))
            return network
        source = component(start, name)
        if not start.outliving:
            content = load_weights(
                module, source, device=device, dtype=dtype, aliases=aliases, progress=progress,
                allocate=own_memory(shapes, runs_of(module), device),
            )  # fmt: skip
            fuse(module)
            network = cls(module, name, shapes, aliases, content)
            network._versions[content] = {n: t for n, t in module.state_dict().items() if n not in aliases}
            return network
        version, placement = place(module, source, device=device, dtype=dtype, aliases=aliases, progress=progress)
        links.place(version, device, placement.fd)
        network = cls(module, name, shapes, aliases, version.content)
        network._versions[version.content] = placement.tensors
        placement.close()
        return network

    def adopt(self, version: WeightVersion, fd: int) -> None:
        """Map a version that another process has placed, and see that it is what it is said to be (ValueError)."""
        if version.content not in self._versions:
            placement = attach(version, fd, self._shapes, runs_of(self.module))
            self._versions[version.content] = placement.tensors
            placement.close()

    def forget(self, content: str) -> None:
        """Unmap a version. If it is bound, another takes its place: its memory must not wait for the next task."""
        others = [other for other in self._versions if other != content]
        if content == self.content and others:
            self.use(others[-1])
        self._versions.pop(content, None)

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
        if self.bound.loras:
            base = self._versions[self.content]
            rebind(self.module, {name: base[name] for name in self._overlaid})
            fuse(self.module)
            self.bound, self._overlaid = Bound(self.content), ()

    def use(self, content: str, loras: Wanted = ()) -> M:
        """The module, bound to a version that was adopted (KeyError) or is bound already, with these adapters, which
        were lent. When it raises, for want of memory, the version without adapters is bound."""
        if (content, loras) == self.bound[:2]:
            return self.module
        # First without adapters: what the overlay that was bound takes is free for the next.
        if content == self.content:
            self.drop_overlay()
        else:
            bind(self.module, self._versions[content], self._aliases)
            fuse(self.module)
            self.bound, self._overlaid = Bound(content), ()
        if loras:
            made = make_overlay(self._versions[content], self._lent.applied(loras), runs_of(self.module))
            rebind(self.module, made)
            fuse(self.module)
            self.bound, self._overlaid = Bound(content, loras, next(self._overlays)), tuple(made)
        return self.module

    def of(self, job: Job, step: int = 0) -> M:
        """The module as a task wants it, at its step `step`."""
        return self.use(version_of(job, self._name, step) or self.content, wanted_by(job, self._name))


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
