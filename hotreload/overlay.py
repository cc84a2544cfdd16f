"""Weights with adapters: the tensors that adapters touch, made anew beside the base, which stays as it is.

base + strength * scale * up @ down in float32, rounded once: as `hotreload/merging.py`, stretch by stretch, so that the
bits are those of a merge at load from a file of the same dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hotreload.adapters import Adapter, Part
from hotreload.content import CHUNK
from hotreload.merging import add_pair
from hotreload.placement import Runs


class Applied(NamedTuple):
    """An adapter as one request wants it."""

    adapter: Adapter
    strength: float


def make_overlay(base: Mapping[str, Tensor], applied: Sequence[Applied], runs: Runs = ()) -> dict[str, Tensor]:
    """The tensors that change, by name, on the device and in the dtype of `base`, in fresh memory of this process.

    Of one of the `runs` that is touched, all tensors are made, and lie one right behind the other again. Raises what
    torch raises when there is no memory for them; a GPU may still be at work on them.
    """
    additions = additions_of(applied)
    made: dict[str, Tensor] = {}
    # Ordinary tensors, which outlive the step that they are made in.
    with torch.inference_mode(False), torch.no_grad():
        for run in touched(additions, runs):
            first = base[run[0]]
            room = torch.empty(sum(base[name].numel() for name in run), dtype=first.dtype, device=first.device)
            for name in run:
                flat, room = room[: base[name].numel()], room[base[name].numel() :]
                fill(flat, base[name].reshape(-1), additions.get(name, ()))
                made[name] = flat.view(base[name].shape)
    return made


def additions_of(applied: Sequence[Applied]) -> dict[str, list[tuple[Part, float]]]:
    """Tensor -> what is added to it, in order, each with its strength."""
    additions: dict[str, list[tuple[Part, float]]] = {}
    for adapter, strength in applied:
        for name, parts in adapter.items():
            additions.setdefault(name, []).extend((part, strength) for part in parts)
    return additions


def touched(names: Collection[str], runs: Runs) -> list[tuple[str, ...]]:
    """Names, by themselves or with all others of their run, in a fixed order."""
    run_of = {name: tuple(run) for run in runs for name in run}
    return sorted({run_of.get(name, (name,)) for name in names})


def fill(target: Tensor, base: Tensor, parts: Sequence[tuple[Part, float]]) -> None:
    """Flat tensors of one dtype and device, which may be the same one: what the parts add to `base`."""
    if not parts:
        target.copy_(base)
        return
    pairs = [(_float(part.up, base), _float(part.down, base)) if part.diff is None else None for part, _ in parts]
    length = CHUNK // base.element_size()
    for start in range(0, len(base), length):
        value = base[start : start + length].to(torch.float32, copy=True)
        for (part, strength), pair in zip(parts, pairs, strict=True):
            if pair is not None:
                add_pair(value, start, *pair, strength * part.scale)
            elif part.diff is not None:
                value.add_(_float(part.diff[start : start + length], base), alpha=strength)
        target[start : start + length].copy_(value)


def _float(tensor: Tensor | None, like: Tensor) -> Tensor:
    """In float32, where `like` is. It goes there first: torch would else convert it here, and copy twice the bytes."""
    assert tensor is not None, "a pair has both halves"
    return tensor.to(like.device, non_blocking=True).to(torch.float32)
