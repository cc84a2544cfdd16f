"""Networks whose weights are in host memory and come to the device as they are needed.

A network is used piece by piece (`stages/models/walks.py`). On the device there is room for some of the pieces: for
each of the resident ones, and two rooms more that the others take turns in. While one is computed with, the next is
copied in on a side lane (`stages/lanes.py`), and the host waits for neither. A transformer of 14B, 598 MB a block, is
as fast so as resident from about 9,000 tokens on (`engine.footprint.break_even_tokens`).

What is computed, and in what order, is the same however many pieces stay: so are the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from hotreload.adapters import Part
from hotreload.overlay import Applied, additions_of, fill
from hotreload.placement import PlacedTensor, Placement, Table, rebind, view_placed
from ipc.layout import tensor_bytes
from ipc.memory import round_up
from stages.lanes import Lane, Mark
from stages.models.blank import blank
from stages.models.walks import Walk, WalkedModule

ALIGNMENT = 64
"""Bytes, of the tensors in a room: as in a placement."""


class Stretch(NamedTuple):
    """Bytes that lie together both in a placement and in a room."""

    placed: int
    """Where they begin in the data of the placement."""
    room: int
    size: int


class Layout(NamedTuple):
    """The rooms of a walk."""

    size: int
    """Bytes of each."""
    tensors: list[PlacedTensor]
    """By the name behind the prefix, from the start of the room."""
    stretches: list[list[Stretch]]
    """Of each piece."""


def layout_of(table: Table, walk: Walk) -> Layout:
    """How the pieces of a walk lie in a placement, and in rooms that are all alike."""
    layouts = [_piece(table, walk, prefix) for prefix in walk.prefixes]
    size, tensors, _ = layouts[0]
    assert all((size, tensors) == layout[:2] for layout in layouts), "the pieces of a walk are alike"
    return Layout(size, tensors, [stretches for _, _, stretches in layouts])


def _piece(table: Table, walk: Walk, prefix: str) -> tuple[int, list[PlacedTensor], list[Stretch]]:
    tensors: list[PlacedTensor] = []
    stretches: list[Stretch] = []
    end = 0
    behind = -1
    for tensor in sorted(table.tensors, key=lambda tensor: tensor.offset):
        name = tensor.name.removeprefix(prefix)
        if name == tensor.name or not walk.has(name):
            continue
        size = tensor_bytes(tensor.dtype, tensor.shape)
        gap = tensor.offset - behind
        if stretches and 0 <= gap < ALIGNMENT:
            begin = end + gap
            stretches[-1] = stretches[-1]._replace(size=stretches[-1].size + gap + size)
        else:
            begin = round_up(end, ALIGNMENT)
            stretches.append(Stretch(tensor.offset, begin, size))
        tensors.append(tensor._replace(name=name, offset=begin))
        end, behind = begin + size, tensor.offset + size
    return round_up(end, ALIGNMENT), tensors, stretches


class Source(NamedTuple):
    """A version of a network's weights in host memory, with what adapters add to it."""

    key: Hashable
    """The same for the same weights and adapters of the same network."""
    placement: Placement
    additions: Mapping[str, Sequence[tuple[Part, float]]]


def source_of(key: Hashable, placement: Placement, applied: Sequence[Applied], device: torch.device) -> Source:
    """The adapters' own tensors go to the device, and stay there with the source."""
    additions = {
        name: [(Part(part.scale, *(None if t is None else t.to(device) for t in part[1:])), strength)
               for part, strength in parts]
        for name, parts in additions_of(applied).items()
    }  # fmt: skip
    return Source(key, placement, additions)


class Room:
    """Device memory for one piece, and a module that is bound to it."""

    def __init__(self, walk: Walk, layout: Layout, device: torch.device, lane: Lane) -> None:
        with torch.inference_mode(False):
            self.data = torch.empty(layout.size, dtype=torch.uint8, device=device)
        with blank():
            self.module = walk.build().eval().requires_grad_(False)
        rebind(self.module, {tensor.name: view_placed(self.data, tensor) for tensor in layout.tensors})
        walk.bound(self.module)
        self.holds: tuple[Hashable, int] | None = None
        """Key of the source, number of the piece."""
        self.added = False
        """The adapters' additions are in it."""
        self.free: Mark = lane.computed()
        """Nobody computes with what it held any more."""
        self.ready: Mark = self.free
        """What it holds is there."""


class Pool:
    """The rooms of one walk, of one network or of several that are alike.

    Resource handling: has its device memory until nobody refers to it; `finish` before, so that nothing writes there,
    but for a walk that is not often used and was gone to its end, behind which nothing is copied.
    """

    def __init__(self, walk: Walk, layout: Layout, resident: int, device: torch.device, lane: Lane) -> None:
        """`resident` pieces stay, spread evenly over the walk, so that copies come evenly too."""
        self._walk, self._layout, self._lane = walk, layout, lane
        count = len(walk.prefixes)
        stay = [number for number in range(count) if (number + 1) * resident // count > number * resident // count]
        self._turns = [number for number in range(count) if number not in stay]
        """Pieces that take turns."""
        self._rooms = [Room(walk, layout, device, lane) for _ in range(len(stay) + min(2, len(self._turns)))]
        self._room_of = dict(zip(stay, self._rooms, strict=False))
        """Piece -> its room."""
        for turn, number in enumerate(self._turns):
            self._room_of[number] = self._rooms[len(stay) + turn % 2]
        self._after: dict[int, int] = {number: number for number in stay}
        """Piece -> the one that has its room next."""
        for turn, number in enumerate(self._turns):
            self._after[number] = self._turns[turn + 2 if turn + 2 < len(self._turns) else turn % 2]
        self._following: Source | None = None
        self._walks_before = 0

    def follow(self, source: Source, walks: int) -> None:
        """In the last of the next `walks` walks, bring in the pieces of this source behind it."""
        self._following, self._walks_before = source, walks - 1

    def walk(self, source: Source) -> Iterator[nn.Module]:
        """The pieces of a source, one after another, bound to its weights."""
        following, self._following = self._following, None
        if following is not None and self._walks_before:
            self._walks_before -= 1
            self._following, following = following, None
        self._bring_first(source)
        for number in range(len(self._walk.prefixes)):
            room = self._room_of[number]
            if room.holds != (source.key, number):
                self._bring(source, number)
            self._lane.wait(room.ready)
            if source.additions and not room.added:
                self._add(source, number, room)
            try:
                yield room.module
            finally:
                room.free = self._lane.computed()
            after = self._after[number]
            # If the piece that has the room next is not behind this one, the walk does not come back to it.
            if after <= number and not self._walk.often:
                continue
            then = following if after <= number and following is not None else source
            if room.holds != (then.key, after):
                self._bring(then, after)

    def finish(self) -> None:
        """Return when nothing is copied any more."""
        self._lane.finish()

    def _bring_first(self, source: Source) -> None:
        """Ask for what the rooms are to hold at the start of a walk, in the order of use."""
        seen: set[int] = set()
        for number in range(len(self._walk.prefixes)):
            room = self._room_of[number]
            if id(room) not in seen and room.holds != (source.key, number):
                self._bring(source, number)
            seen.add(id(room))

    def _bring(self, source: Source, number: int) -> None:
        room, data = self._room_of[number], source.placement.flat
        pairs = [
            (room.data[inside : inside + size], data[placed : placed + size])
            for placed, inside, size in self._layout.stretches[number]
        ]
        room.ready = self._lane.copy(pairs, room.free)
        room.holds, room.added = (source.key, number), False

    def _add(self, source: Source, number: int, room: Room) -> None:
        """Add what adapters add, as `hotreload/overlay.py` does for weights that stay: the same bits."""
        prefix = self._walk.prefixes[number]
        for tensor in self._layout.tensors:
            if parts := source.additions.get(prefix + tensor.name, ()):
                flat = view_placed(room.data, tensor).view(-1)
                fill(flat, flat, parts)
        room.added = True


class Pools:
    """The pools of a network, or of two that are alike and take turns; made when first used.

    Those of walks that are used once per request are there only meanwhile.
    """

    def __init__(self, device: torch.device, lane: Lane, resident: int | None) -> None:
        """`resident`: how many pieces of a walk that is used often stay on the device; None: all."""
        self.device, self.lane = device, lane
        self._resident = resident
        self._pools: dict[str, Pool] = {}

    @property
    def keeps_any(self) -> bool:
        """Pieces of a walk that is used often stay on the device."""
        return self._resident != 0

    def walk(self, name: str, walk: Walk, layout: Layout, source: Source) -> Iterator[nn.Module]:
        pool = self._pools.get(name)
        if pool is None:
            count = len(walk.prefixes)
            resident = 0 if not walk.often else count if self._resident is None else min(self._resident, count)
            pool = Pool(walk, layout, resident, self.device, self.lane)
            if walk.often:
                self._pools[name] = pool
        if walk.often:
            yield from pool.walk(source)
            return
        whole = False
        try:
            yield from pool.walk(source)
            whole = True  # every copy was waited for, by what computes: nobody needs to wait here
        finally:
            if not whole:
                pool.finish()

    def follow(self, name: str, source: Source, walks: int) -> None:
        if name in self._pools:
            self._pools[name].follow(source, walks)

    def release(self) -> None:
        """Give the memory back."""
        self.lane.finish()
        self._pools.clear()


class Offload:
    """A module on meta whose weights are in host memory: what is in no walk is copied to the device when it is bound,
    the rest as it is used."""

    def __init__(self, module: nn.Module, table: Table, aliases: Mapping[str, str], pools: Pools) -> None:
        self._module, self.pools = module, pools
        walked = module if isinstance(module, WalkedModule) else None
        walks = {} if walked is None else walked.walks()
        on_host = frozenset() if walked is None else walked.on_host()
        self._layouts = {name: (walk, layout_of(table, walk)) for name, walk in walks.items()}
        moving = {
            prefix + tensor.name
            for walk, layout in self._layouts.values() for prefix in walk.prefixes for tensor in layout.tensors
        }  # fmt: skip
        self._on_host = [tensor.name for tensor in table.tensors if tensor.name in on_host]
        self._still = [t for t in table.tensors if t.name not in moving and t.name not in on_host]
        self._second_names: dict[str, list[str]] = {}
        for second, first in aliases.items():
            self._second_names.setdefault(first, []).append(second)
        self.source: Source | None = None
        """What is bound."""
        if walked is not None:
            walked.walkers = {name: self._walker(name) for name in self._layouts}

    def bind(self, source: Source) -> None:
        """Compute with this version from now on."""
        if self.source is not None and self.source.key == source.key:
            return
        self.release()
        lane, placed = self.pools.lane, source.placement.tensors
        with torch.inference_mode(False), torch.no_grad():
            bound = {t.name: torch.empty_like(placed[t.name], device=self.pools.device) for t in self._still}
            lane.wait(lane.copy([(bound[t.name], placed[t.name]) for t in self._still], lane.computed()))
            for name, tensor in bound.items():
                if parts := source.additions.get(name, ()):
                    fill(tensor.view(-1), tensor.view(-1), parts)
        bound |= {name: placed[name] for name in self._on_host}
        self._have(bound)
        self.source = source

    def release(self) -> None:
        """Give back what is on the device beside the pools; `bind` brings it again."""
        if self.source is not None:
            self.pools.lane.finish()
            placed = self.source.placement.tensors
            # Not what is in walks, which is nowhere: to go through all of a large module takes 0.15 s.
            names = [*(t.name for t in self._still), *self._on_host]
            with torch.inference_mode(False):
                self._have({name: torch.empty_like(placed[name], device="meta") for name in names})
            self.source = None

    def _have(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make these the module's, under their second names, too."""
        seconds = {second: tensors[n] for n in tensors for second in self._second_names.get(n, ())}
        rebind(self._module, {**tensors, **seconds})

    def end(self) -> None:
        """Leave the module on meta, to be bound as usual."""
        self.release()
        if isinstance(self._module, WalkedModule):
            self._module.walkers = {}

    def _walker(self, name: str) -> Callable[[], Iterator[nn.Module]]:
        walk, layout = self._layouts[name]

        def pieces() -> Iterator[nn.Module]:
            assert self.source is not None, "a network is bound before it is used"
            return self.pools.walk(name, walk, layout, self.source)

        return pieces


def unbind(module: nn.Module) -> None:
    """Have a module refer to no memory."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.empty_like(buffer, device="meta"))
