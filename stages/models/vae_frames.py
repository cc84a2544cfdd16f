"""Memory for the frames of a clip at one size and width: slots that convolutions read and write by number.

A slot is one frame [H + 2, W + 2, C] with a border of zeros, so that a 3x3 convolution needs no padding, and each of
its taps is the same rows of memory at another offset. What a convolution remembers of a clip is the numbers of the two
slots that it read last: no frame is ever copied to be remembered, and the number of slots does not grow with the clip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLOT_BITS = 7
"""Bits of a slot's number in `pack`."""

MAX_SLOTS = 8
"""Slots that `pack` takes."""

ZERO_SLOT = 0
"""The slot that is never written: what causal convolutions see before the clip's first frame."""


class FramePool:
    """Slots of one shape. `take` and `give` are bookkeeping; kernels read and write `frames`.

    Resource handling: owns its GPU memory. Of unlimited capacity (None) it has no memory and only counts: running a
    decoder's schedule on such pools tells how many slots it needs.
    """

    def __init__(
        self, channels: int, height: int, width: int, capacity: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        if capacity is not None and not 1 < capacity <= 1 << SLOT_BITS:
            raise ValueError(
                f"a pool must have 2 to {1 << SLOT_BITS} slots, got {capacity}; decode fewer frames at once"
            )
        self.channels, self.height, self.width = channels, height, width
        self.frames = torch.zeros(capacity or 0, height + 2, width + 2, channels, dtype=dtype, device=device)
        """[slots, H + 2, W + 2, C]."""
        self.views: dict[tuple[int, int, int], Any] = {}
        """Tiles of `frames` as kernels describe them, which go when the frames go."""
        self.capacity = capacity
        self.peak = 1
        self._used = 1
        self._free: list[int] = []

    @property
    def rows(self) -> int:
        """Pixels of a slot, border included."""
        return (self.height + 2) * (self.width + 2)

    def take(self, count: int) -> list[int]:
        """Numbers of `count` slots, whose pixels are anything and whose borders are zero."""
        return [self._take() for _ in range(count)]

    def give(self, slots: list[int]) -> None:
        """The opposite of `take`. The zero slot may be among them, and stays."""
        self._free += (slot for slot in slots if slot != ZERO_SLOT)

    def pixels(self, slot: int) -> Tensor:
        """A view of a frame without its border, [H, W, C]."""
        return self.frames[slot, 1:-1, 1:-1]

    def copy(self, slot: int, into: int) -> None:
        """A frame into another slot."""
        if self.capacity is not None:
            self.frames[into].copy_(self.frames[slot])

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        assert self.capacity is None or self._used < self.capacity, f"all of {self.capacity} slots are in use"
        self._used += 1
        self.peak = max(self.peak, self._used)
        return self._used - 1


def pack(slots: list[int]) -> int:
    """Up to 8 slot numbers as one integer, so that a kernel takes a list of frames without memory of its own.

    Bit 62 is always set: the type of the integer, and so the compiled kernel, is the same for all lists.
    """
    assert len(slots) <= MAX_SLOTS and all(0 <= slot < 1 << SLOT_BITS for slot in slots), slots
    return 1 << 62 | sum(slot << SLOT_BITS * i for i, slot in enumerate(slots))
