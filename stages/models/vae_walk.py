"""What the fast decoder and encoder share: walking through residual blocks with lists of slots.

Who computes is `Operations`: plain torch (`stages/models/vae_conv.py`), or Triton kernels
(`stages/kernels/vae_launch.py`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.models import vae_conv
from stages.models.vae_conv import Conv, Target, causal_conv, pad_vector, split_width
from stages.models.vae_frames import ZERO_SLOT, FramePool
from stages.models.vae_layers import CausalConv, MidBlock, ResBlock, RmsNorm
from stages.models.vae_tiles import Window


class Operations(Protocol):
    """What the decoder computes with. See `stages.models.vae_conv`."""

    def conv(self, layer: Conv, source: FramePool, slots: list[int], target: Target) -> None: ...
    def conv_to_pixels(self, layer: Conv, source: FramePool, slots: list[int], pixels: Tensor) -> None: ...
    def norm_silu(self, pool: FramePool, slots: list[int], gamma: Tensor, into: list[int]) -> None: ...


class TorchOperations:
    """Plain torch: the specification, and for the CPU."""

    conv = staticmethod(vae_conv.conv)
    conv_to_pixels = staticmethod(vae_conv.conv_to_pixels)
    norm_silu = staticmethod(vae_conv.norm_silu)


class NoOperations:
    """Computes nothing: for finding out how many slots a decoder needs."""

    def conv(self, layer: Conv, source: FramePool, slots: list[int], target: Target) -> None:
        """Nothing."""

    def conv_to_pixels(self, layer: Conv, source: FramePool, slots: list[int], pixels: Tensor) -> None:
        """Nothing."""

    def norm_silu(self, pool: FramePool, slots: list[int], gamma: Tensor, into: list[int]) -> None:
        """Nothing."""


@dataclass(slots=True)
class Clip:
    """What the decoder remembers of a clip of one size, and the memory it works in.

    Resource handling: owns the pools' GPU memory, the same from the first chunk to the last; freed with the object.
    """

    operations: Operations
    window: Window
    """What it sees of the frames: all of them, or of a tile what that needs."""
    dtype: torch.dtype
    device: torch.device
    capacity: dict[tuple[int, int], int] | None
    """Slots of each pool, by level and channels. None: pools without memory, which count."""
    pools: dict[tuple[int, int], FramePool] = field(default_factory=dict)
    history: dict[str, list[int]] = field(default_factory=dict)
    """Convolution -> the slots of the last two frames of its input."""
    first: bool = True
    """Whether no frame of the clip has been decoded yet."""
    doubled: set[str] = field(default_factory=set)
    """Convolutions that double time and have passed the clip's first frame."""

    @property
    def height(self) -> int:
        """Of the latents, as `width`."""
        return self.window.size(0)[0]

    @property
    def width(self) -> int:
        return self.window.size(0)[1]

    def pool(self, level: int, channels: int) -> FramePool:
        """Frames of the latents' size times 2^level, or of the window's."""
        key = level, channels
        if key not in self.pools:
            capacity = None if self.capacity is None else self.capacity[key]
            self.pools[key] = FramePool(channels, *self.window.size(level), capacity, self.dtype, self.device)
        return self.pools[key]

    @property
    def nbytes(self) -> int:
        return sum(pool.frames.nbytes for pool in self.pools.values())


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block. `norm1` is computed by what comes before it."""

    norm1: Tensor
    conv1: Conv
    norm2: Tensor
    conv2: Conv
    shortcut: Conv | None


class Walker:
    """Runs residual blocks on the frames of a clip. Frames are lists of slots of the clip's pools."""

    def __init__(self, middle: MidBlock, operations: Operations, dtype: torch.dtype) -> None:
        self._operations, self._dtype = operations, dtype
        self.middle = [make_block(f"mid_block.{i}", block, dtype) for i, block in enumerate(middle.resnets)]
        self.attention = copy.deepcopy(middle.attentions[0]).to(dtype)

    def _middle(
        self, clip: Clip, raw: list[int], normed: list[int], gamma: Tensor, keep: bool
    ) -> tuple[list[int], list[int]]:
        """The middle block; its output if `keep`, and the norm of it by `gamma`."""
        pool = clip.pool(0, self.middle[0].conv2.channels)
        raw, _ = self._block(clip, 0, self.middle[0], raw, normed, raw=True, gamma=None)
        self._attend(pool, raw)
        normed = self._norm(pool, raw, self.middle[1].norm1)
        return self._block(clip, 0, self.middle[1], raw, normed, raw=keep, gamma=gamma)

    def _block(
        self, clip: Clip, level: int, block: Block, x: list[int], normed: list[int], raw: bool, gamma: Tensor | None
    ) -> tuple[list[int], list[int]]:
        """A residual block on frames and their norms, which are given up. Its output, and the norm of it by `gamma`."""
        _, inner = self._causal(clip, block.conv1, level, normed, level, raw=False, gamma=block.norm2)
        pool = clip.pool(level, block.conv2.channels)
        if block.shortcut is not None:
            source = clip.pool(level, block.shortcut.channels_in)
            widened, _ = self._run(block.shortcut, source, x, pool, [], True, None)
            source.give(x)
            x = widened
        return self._causal(clip, block.conv2, level, inner, level, raw=raw, gamma=gamma, residual=x)

    def _causal(
        self, clip: Clip, layer: Conv, level: int, frames: list[int], target: int, *, raw: bool, gamma: Tensor | None,
        residual: list[int] | None = None,
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """A convolution that looks back in time, over its history and `frames`. These and `residual` are given up."""
        pool = clip.pool(level, layer.channels_in)
        slots = [*clip.history.get(layer.name, [ZERO_SLOT] * 2), *frames]
        outputs = self._run(layer, pool, slots, clip.pool(target, layer.channels), residual or [], raw, gamma)
        self._remember(clip, layer, pool, slots)
        return outputs

    def _remember(self, clip: Clip, layer: Conv, pool: FramePool, slots: list[int]) -> None:
        clip.history[layer.name] = slots[-2:]
        pool.give(slots[:-2])

    def _run(
        self, layer: Conv, source: FramePool, slots: list[int], pool: FramePool, residual: list[int], raw: bool,
        gamma: Tensor | None, origin: tuple[int, int] = (0, 0),
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """A convolution into new slots of `pool`: its output if `raw` (in place of `residual`), its norm by `gamma` if
        there is one, in the same launch where one tile holds all channels."""
        count = layer.frames_out(len(slots))
        fused = gamma is not None and sum(split_width(layer.channels)) >= layer.channels
        out = residual or (pool.take(count) if raw or not fused else [])
        normed = pool.take(count) if fused else []
        stored = out if raw or not fused else []
        target = Target(pool, residual, stored, normed, gamma if fused else None, origin)
        self._operations.conv(layer, source, slots, target)
        if gamma is not None and not fused:
            normed = self._norm(pool, out, gamma, out if not raw else None)
        elif not raw:
            pool.give(out)
        return (out if raw else []), normed

    def _norm(self, pool: FramePool, frames: list[int], gamma: Tensor, into: list[int] | None = None) -> list[int]:
        """silu(norm(frames)) in new slots, or in those of `into`."""
        normed = pool.take(len(frames)) if into is None else into
        self._operations.norm_silu(pool, frames, gamma, normed)
        return normed

    def _attend(self, pool: FramePool, frames: list[int]) -> None:
        """The middle block's attention, in place."""
        if pool.capacity is None:
            return
        for slot in frames:
            pixels = pool.pixels(slot)
            pixels.copy_(self.attention(pixels[None, None])[0, 0])


def make_causal(name: str, module: nn.Module, dtype: torch.dtype, offset: tuple[int, int] = (0, 0)) -> Conv:
    assert isinstance(module, CausalConv) and module.bias is not None
    return causal_conv(name, module.weight, module.bias, dtype, offset=offset)


def make_block(name: str, block: nn.Module, dtype: torch.dtype) -> Block:
    assert isinstance(block, ResBlock)
    shortcut = block.conv_shortcut
    return Block(
        norm1=make_gamma(block.norm1),
        conv1=make_causal(f"{name}.conv1", block.conv1, dtype),
        norm2=make_gamma(block.norm2),
        conv2=make_causal(f"{name}.conv2", block.conv2, dtype),
        shortcut=None if shortcut is None else make_causal(f"{name}.shortcut", shortcut, dtype, offset=(1, 1)),
    )


def make_gamma(norm: nn.Module) -> Tensor:
    assert isinstance(norm, RmsNorm)
    return pad_vector(norm.gamma.flatten())
