"""Networks that can be used piece by piece: blocks one after another, so that not all of them need be on the device.

A network says of what it is made (`walks`), and takes its pieces from `walk`. Usually those are its own submodules.
`stages/offload.py` gives it others in their place: a few modules on the device whose weights change as it goes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn


def _nothing(piece: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Walk:
    """Pieces of a network that are alike and are used one after another."""

    prefixes: Sequence[str]
    """Of the names of each piece's tensors, with the dot."""
    build: Callable[[], nn.Module]
    """Makes such a piece."""
    has: Callable[[str], bool] = field(default=lambda name: True)
    """Whether a tensor, by its name behind the prefix, belongs to this walk."""
    bound: Callable[[nn.Module], object] = _nothing
    """To be called with a piece when its tensors are others."""
    often: bool = False
    """In every step; the others are used once per request, and take memory only meanwhile."""


class WalkedModule(nn.Module):
    """A module that is used in walks."""

    def __init__(self) -> None:
        super().__init__()
        self.walkers: dict[str, Callable[[], Iterable[nn.Module]]] = {}
        """Walk -> what gives its pieces, where it is not this module."""

    @abstractmethod
    def walks(self) -> Mapping[str, Walk]:
        """By name. What is in none of them is always on the device, but for `on_host`."""

    def on_host(self) -> frozenset[str]:
        """Tensors that are used where they are, in host memory, if this module is offloaded."""
        return frozenset()

    def walk(self, name: str) -> Iterable[nn.Module]:
        """The pieces in order; each may be used until the next is asked for."""
        if name in self.walkers:
            return self.walkers[name]()
        return [self.get_submodule(prefix.rstrip(".")) for prefix in self.walks()[name].prefixes]
