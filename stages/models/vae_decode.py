"""The decoder of `WanVae` on frame pools: the same computation, with convolutions that fuse what is around them.

`FastDecoder` walks through the network with lists of slots (`stages/models/vae_frames.py`). Who computes is
`Operations`: plain torch (`stages/models/vae_conv.py`), or Triton kernels (`stages/kernels/vae_launch.py`). Norm, SiLU
and residual happen in the convolution before them, upsampling in the one after it.

Frames go through the levels depth first and at most `groups[level]` at a time, so that memory depends on the size of a
frame only, not on the length of a chunk or clip. How they are grouped does not change one bit of the result: each
output pixel is a sum in an order of its own, and what torch computes is computed frame by frame. Nor does
cutting frames into tiles (`stages/models/vae_fast_tiles.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipc.architecture import VaeConfig
from stages.models.vae import ResidualUpBlock, UpBlock, WanVae
from stages.models.vae_conv import Conv, doubling_conv, narrow_conv, sum_columns, upsampling_conv
from stages.models.vae_frames import ZERO_SLOT, FramePool
from stages.models.vae_layers import CausalConv, Upsample, pointwise, unfold_pixels
from stages.models.vae_shortcuts import repeat_pixels
from stages.models.vae_tiles import Window, whole
from stages.models.vae_walk import Block, Clip, NoOperations, Operations, Walker, make_block, make_causal, make_gamma

GROUPS = (4, 4, 4, 4)
"""Frames per launch at each level, from the latents' size to the frames'. At most 4."""


@dataclass(frozen=True, slots=True)
class Level:
    """The residual blocks of one size, and the way up to the next."""

    blocks: list[Block]
    double: Conv | None
    upsample: Conv | None
    repeats: bool
    """Whether the level's input, repeated, is added to what the next level gets."""

    @property
    def time(self) -> int:
        """Frames that one becomes."""
        return 1 if self.double is None else 2


class Frame(NamedTuple):
    """A frame of a level that is about to be made larger."""

    slot: int
    source: int = ZERO_SLOT
    """The level's input, which is added to it; the zero slot where nothing is."""
    half: int = 0
    """Which of the frames that `source` becomes this one is."""
    last: bool = True
    """Whether it is the last that wants `source`."""


class FastDecoder(Walker):
    """Decodes as `WanVae.decode_chunk`, with weights and activations in `dtype` and sums in float32."""

    def __init__(
        self, vae: WanVae, operations: Operations, dtype: torch.dtype, groups: tuple[int, ...] = GROUPS
    ) -> None:
        decoder, self._vae = vae.decoder, vae
        super().__init__(decoder.mid_block, operations, dtype)
        self.conv_in = make_causal("conv_in", decoder.conv_in, dtype)
        self.levels = [_level(f"up_blocks.{i}", block, dtype) for i, block in enumerate(decoder.up_blocks)]
        self.norm_out = make_gamma(decoder.norm_out)
        conv_out = decoder.conv_out
        assert isinstance(conv_out, CausalConv) and conv_out.bias is not None
        self.conv_out = narrow_conv("conv_out", conv_out.weight, conv_out.bias, dtype)
        self._group(groups)

    def regrouped(self, groups: tuple[int, ...]) -> FastDecoder:
        """The same decoder, with the same weights, and other groups."""
        other = copy.copy(self)
        other._group(groups)
        return other

    @property
    def config(self) -> VaeConfig:
        return self._vae.config

    def clip(self, height: int, width: int) -> Clip:
        """A clip of height x width latents that has not begun."""
        return self.clip_of(whole(height, width, len(self.levels)), self.capacity)

    def clip_of(self, window: Window, capacity: dict[tuple[int, int], int]) -> Clip:
        return Clip(self._operations, window, self._dtype, self.conv_in.weight.device, capacity)

    def decode_chunk(self, latents: Tensor, clip: Clip) -> Tensor:
        """The next t normalised latent frames [1, z, t, h, w] of `clip` -> pixels [1, 3, 4t, s*h, s*w] (4t-3 frames at
        the clip's beginning), float32, clamped to [-1, 1]."""
        parts = self.prepare(latents, clip.height, clip.width)
        stride = self.config.temporal_stride
        count = latents.shape[2] * stride - (stride - 1 if clip.first else 0)
        pixels, done = self.pixels_of(clip, count), 0
        for part in parts:
            done += self.rise(clip, 0, self.lowest(clip, part), pixels[done:])
        assert done == count, (done, count)
        return self.finish(pixels)

    def prepare(self, latents: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Normalised latents [1, z, T, h, w] -> groups of [t, h, w, z] for `lowest`. `ValueError` for a wrong shape."""
        if latents.shape[:2] != (1, self.config.z_dim) or latents.shape[3:] != (height, width):
            raise ValueError(
                f"latents must be [1, {self.config.z_dim}, T, {height}, {width}], got {list(latents.shape)}"
            )
        return self._vae.denormalise(latents.float()).movedim(1, -1)[0].split(self.groups[0])

    def pixels_of(self, clip: Clip, count: int) -> Tensor:
        """Memory for frames of the clip's window before `finish`: [count, H, W, 3 * p * p] float32."""
        size = clip.window.size(len(self.levels) - 1)
        return torch.empty(count, *size, self.conv_out.channels // 3, device=clip.device)

    def finish(self, pixels: Tensor) -> Tensor:
        """[T, H, W, 3 * p * p], which is clamped -> [1, 3, T, p * H, p * W]."""
        return unfold_pixels(pixels.clamp_(-1, 1)[None], self.config.patch_size).movedim(-1, 1)

    def lowest(self, clip: Clip, latents: Tensor) -> list[Frame]:
        """One group of latents [t, h, w, z] through the middle and the lowest level."""
        pool = clip.pool(0, self.conv_in.channels_in)
        slots = pool.take(len(latents))
        if pool.capacity is not None:
            for slot, frame in zip(slots, latents, strict=True):
                pool.pixels(slot).copy_(pointwise(frame, self._vae.post_quant_conv))
        raw, normed = self._causal(clip, self.conv_in, 0, slots, 0, raw=True, gamma=self.middle[0].norm1)
        raw, normed = self._middle(clip, raw, normed, self.levels[0].blocks[0].norm1, keep=True)
        clip.first = False
        return self._frames(clip, 0, raw, normed)

    def rise(self, clip: Clip, level: int, frames: list[Frame], pixels: Tensor) -> int:
        """Frames of a level through all levels above -> the first of `pixels`; how many."""
        upsample, blocks = self.levels[level].upsample, self.levels[level].blocks
        assert upsample is not None
        pool, target = clip.pool(level, upsample.channels_in), clip.pool(level + 1, upsample.channels)
        done = 0
        for part in _split(frames, self.groups[level + 1]):
            slots = [frame.slot for frame in part]
            shortcut = self._repeat(clip, level, part, target) if self.levels[level].repeats else []
            norm = self.levels[level + 1].blocks[0].norm1
            raw, normed = self._run(upsample, pool, slots, target, shortcut, True, norm, clip.window.origin(level))
            pool.give(slots)
            clip.pool(level, blocks[0].conv1.channels_in).give([frame.source for frame in part if frame.last])
            done += self._climb(clip, level + 1, raw, normed, pixels[done:])
        return done

    def _climb(self, clip: Clip, level: int, raw: list[int], normed: list[int], pixels: Tensor) -> int:
        """The blocks of a level on one group of frames, then the levels above; the number of pixel frames."""
        if level < len(self.levels) - 1:
            return self.rise(clip, level, self._frames(clip, level, raw, normed), pixels)
        _, normed = self._blocks(clip, level, raw, normed, gamma=self.norm_out)
        pool = clip.pool(level, self.conv_out.channels_in)
        slots = [*clip.history.get(self.conv_out.name, [ZERO_SLOT] * 2), *normed]
        if pool.capacity is not None:
            pixels = pixels[: len(normed)]
            parts = pixels.new_empty(*pixels.shape[:3], self.conv_out.channels)
            self._operations.conv_to_pixels(self.conv_out, pool, slots, parts)
            sum_columns(parts, pixels)
        self._remember(clip, self.conv_out, pool, slots)
        return len(normed)

    def _blocks(
        self, clip: Clip, level: int, raw: list[int], normed: list[int], gamma: Tensor | None
    ) -> tuple[list[int], list[int]]:
        """The residual blocks of a level: the norm of their output by `gamma`, or without it the output."""
        blocks = self.levels[level].blocks
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            keep, norm = (True, following.norm1) if following else (gamma is None, gamma)
            raw, normed = self._block(clip, level, block, raw, normed, raw=keep, gamma=norm)
        return raw, normed

    def _frames(self, clip: Clip, level: int, raw: list[int], normed: list[int]) -> list[Frame]:
        """The blocks of a level on one group of frames, each of which becomes two where time doubles, but the clip's
        first, which the convolution never sees."""
        stage, sources = self.levels[level], []
        if stage.repeats:
            pool = clip.pool(level, stage.blocks[0].conv1.channels_in)
            sources = pool.take(len(raw))
            for source, slot in zip(sources, raw, strict=True):
                pool.copy(slot, source)
        raw, _ = self._blocks(clip, level, raw, normed, gamma=None)
        if stage.double is None:
            return [Frame(*pair) for pair in zip(raw, sources or [ZERO_SLOT] * len(raw), strict=True)]
        first = [] if stage.double.name in clip.doubled else raw[:1]
        clip.doubled.add(stage.double.name)
        halves = [(source, half, half == 1) for source in sources or [ZERO_SLOT] * len(raw) for half in (0, 1)]
        if rest := raw[len(first) :]:
            rest = self._causal(clip, stage.double, level, rest, level, raw=True, gamma=None)[0]
        slots = first + rest
        return [Frame(slot, *half) for slot, half in zip(slots, halves[len(first) :], strict=True)]

    def _repeat(self, clip: Clip, level: int, frames: list[Frame], target: FramePool) -> list[int]:
        """What the level's input adds to frames that have been made larger, in new slots of `target`."""
        stage, slots = self.levels[level], target.take(len(frames))
        source = clip.pool(level, stage.blocks[0].conv1.channels_in)
        if source.capacity is not None:
            (row, column), height, width = clip.window.origin(level), target.height // 2, target.width // 2
            for frame, slot in zip(frames, slots, strict=True):
                pixels = source.pixels(frame.source)[row : row + height, column : column + width]
                repeat_pixels(pixels, frame.half, stage.time, target.pixels(slot))
        return slots

    def _group(self, groups: tuple[int, ...]) -> None:
        if len(groups) != len(self.levels) or not all(1 <= group <= 4 for group in groups):
            raise ValueError(f"groups must be {len(self.levels)} numbers from 1 to 4, got {groups}")
        self.groups = groups
        self.capacity = self.count_slots(self._decode_some)

    def _decode_some(self, clip: Clip) -> None:
        """A clip's first chunks, which take as many slots as any."""
        for count in (1, *[2 * self.groups[0]] * 3):
            for part in torch.empty(count, 1, 1, self.conv_in.channels_in, device=clip.device).split(self.groups[0]):
                self.rise(clip, 0, self.lowest(clip, part), torch.empty(0))

    def count_slots(self, schedule: Callable[[Clip], None]) -> dict[tuple[int, int], int]:
        """Slots of each pool that a schedule takes at most. Nothing is computed."""
        operations, self._operations = self._operations, NoOperations()
        clip = Clip(
            self._operations, whole(1, 1, len(self.levels)), self._dtype, torch.device("meta"), None
        )  # fmt: skip
        schedule(clip)
        self._operations = operations
        return {key: pool.peak for key, pool in clip.pools.items()}


def _level(name: str, block: nn.Module, dtype: torch.dtype) -> Level:
    assert isinstance(block, UpBlock | ResidualUpBlock)
    blocks = [make_block(f"{name}.{i}", resnet, dtype) for i, resnet in enumerate(block.resnets)]
    upsampler = block.upsampler if isinstance(block, ResidualUpBlock) else next(iter(block.upsamplers), None)
    if upsampler is None:
        return Level(blocks, None, None, False)
    assert isinstance(upsampler, Upsample)
    conv, double = upsampler.resample[1], None
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    upsample = upsampling_conv(f"{name}.upsample", conv.weight, conv.bias, dtype)
    if upsampler.time_conv is not None:
        assert upsampler.time_conv.bias is not None
        double = doubling_conv(f"{name}.double", upsampler.time_conv.weight, upsampler.time_conv.bias, dtype)
    return Level(blocks, double, upsample, isinstance(block, ResidualUpBlock))


def _split(frames: list[Frame], size: int) -> Iterator[list[Frame]]:
    for i in range(0, len(frames), size):
        yield frames[i : i + size]
