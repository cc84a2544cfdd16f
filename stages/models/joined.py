"""Modules that use several of their tensors as one, where those lie one right behind the other in memory."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from hotreload.placement import Runs


class JoinedModule(nn.Module):
    """A module whose weights are to be placed in runs; `stages/weights.py` does so, and calls `fuse` as it binds it."""

    @abstractmethod
    def runs(self) -> Runs:
        """Names of the tensors of each run."""

    @abstractmethod
    def fuse(self) -> int:
        """Use each run as one tensor from now on, where it lies as one; returns in how many places that is so."""
