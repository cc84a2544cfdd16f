"""The shortcuts of Wan2.2's VAE on frame pools, in plain torch on every device: copies and means, no products.

Frames are [H, W, C], views of slots. See `average_down` and `add_repeated` in `stages/models/vae_layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.models.vae_layers import average_down


def repeat_pixels(x: Tensor, half: int, time: int, out: Tensor) -> None:
    """Each pixel of x [H, W, C] over a block of 2 x 2 of `out` [2H, 2W, C'], as frame `half` of the `time` that x
    becomes. Where C is C' times 2, 4 or 8, a block is made of as many channels: one per frame, then per row, then per
    column."""
    channels, block = x.shape[-1] // out.shape[-1], []
    for size in (time, 2, 2):
        block.append(size if channels > 1 else 1)
        channels //= block[-1]
    blocks = x.unflatten(-1, (out.shape[-1], *block))[..., min(half, block[0] - 1), :, :].permute(0, 3, 1, 4, 2)
    out.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).copy_(blocks)


def average_pixels(frames: list[Tensor], time: int, space: int, out: Tensor) -> None:
    """Blocks of `time` frames [H, W, C], or of one with zeros before it, and of `space` x `space` pixels become
    channels of `out` [H / space, W / space, C'], each of which is the mean of as many."""
    out.copy_(average_down(torch.stack(frames)[None], out.shape[-1], time, space)[0, 0])
