"""LoRA files added to weights as they are read: base + strength * scale * up @ down in float32, stretch by stretch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from hotreload.dtypes import TORCH_DTYPES
from hotreload.lora import Delta, read_lora
from hotreload.reading import Files
from hotreload.safetensors_file import ITEM_SIZES, TensorEntry
from hotreload.shown import shown
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Component


class Addition(NamedTuple):
    """What one file adds to one tensor."""

    delta: Delta
    strength: float


def additions_of(component: Component, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Addition]]:
    """What the component's LoRA files add, by tensor (ours), in the files' order. A strength of 0 adds nothing.

    Raises `BadCheckpoint` for a file that does not fit tensors of these names and `shapes`.
    """
    additions: dict[str, list[Addition]] = {}
    for lora in component.loras:
        for delta in read_lora(Path(lora.file), component.name, shapes):
            if lora.strength:
                additions.setdefault(delta.target, []).append(Addition(delta, lora.strength))
    return additions


class Merge:
    """Adds to one tensor. `add` goes through it in order, once; `digest` then is that of all that was added.

    Holds the pairs of the tensor in float32 on its device, and reads `diff`s stretch by stretch. Raises `BadCheckpoint`
    for values that are not finite.
    """

    def __init__(self, additions: list[Addition], files: Files, device: torch.device) -> None:
        self._files, self._device = files, device
        self._hash = xxhash.xxh3_128()
        self._parts = [(addition, self._pair(addition.delta)) for addition in additions]
        for delta, strength in additions:
            self._hash.update(f"{delta.scale}\0{strength}\0".encode())

    def add(self, value: Tensor, start: int) -> None:
        """Add to `value`, the flat float32 stretch of the tensor that begins at element `start`."""
        for (delta, strength), pair in self._parts:
            if pair is not None:
                add_pair(value, start, *pair, strength * delta.scale)
            elif delta.diff is not None:
                size = ITEM_SIZES[delta.diff.dtype]
                diff = self._read(delta.diff, start * size, len(value) * size)
                value.add_(diff, alpha=strength)

    def digest(self) -> bytes:
        return self._hash.digest()

    def _pair(self, delta: Delta) -> tuple[Tensor, Tensor] | None:
        """(up [out, rank], down [rank, in])."""
        if delta.up is None or delta.down is None:
            return None
        rank = delta.down.shape[0]
        return self._read(delta.up).view(-1, rank), self._read(delta.down).view(rank, -1)

    def _read(self, entry: TensorEntry, start: int = 0, size: int | None = None) -> Tensor:
        raw = self._files.read_tensor(entry, TORCH_DTYPES[entry.dtype], start, size)
        self._hash.update(memoryview(raw.view(torch.uint8).numpy().data))
        value = raw.to(self._device, torch.float32)
        check_finite(value, entry)
        return value


def add_pair(value: Tensor, start: int, up: Tensor, down: Tensor, factor: float) -> None:
    """Add factor * up @ down to `value`, the flat stretch of a tensor that begins at element `start`. All are float32;
    up [out, rank], down [rank, in].

    Only the rows of the stretch are multiplied. Which they are can show in the last bit of the product, so whoever
    wants the same bits takes the same stretches.
    """
    width = down.shape[1]
    first, last = start // width, -(-(start + len(value)) // width)
    rows = (up[first:last] @ down).flatten()
    value.add_(rows[start - first * width :][: len(value)], alpha=factor)


def check_finite(value: Tensor, entry: TensorEntry) -> None:
    """`BadCheckpoint` for NaN or infinity in a tensor of a LoRA file, float32."""
    # One pass in float32, 5 GB/s on a core; isfinite of bfloat16 does 0.2 GB/s.
    if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        raise BadCheckpoint(
            f"LoRA {shown(entry.file.name)}: {shown(entry.name)} has values that are not finite (NaN or infinity)"
        )
