"""The encoder of `WanVae` on frame pools. See `stages/models/vae_decode.py`.

Four frames, which become one latent frame, go through the whole network at a time; the clip's first frame goes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipc.architecture import VaeConfig
from stages.models.vae import DownBlock, WanVae
from stages.models.vae_conv import Conv, causal_conv
from stages.models.vae_frames import ZERO_SLOT, FramePool
from stages.models.vae_layers import Downsample, ResBlock, fold_pixels, pointwise
from stages.models.vae_shortcuts import average_pixels
from stages.models.vae_tiles import Window, whole
from stages.models.vae_walk import Block, Clip, NoOperations, Operations, Walker, make_block, make_causal, make_gamma

ALIGNED = 8
"""Channels of a slot that holds a frame of pixels are a multiple of it, so that a row's bytes are one of 16; zeros fill
up."""


class Shortcut(NamedTuple):
    """What Wan2.2's stages add to their output: blocks of their input as channels, averaged."""

    time: int
    """Frames that become one."""
    space: int
    """Pixels along height and width that become one."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The residual blocks of one size, and the way down to the next."""

    blocks: list[Block]
    halve_space: Conv | None
    halve_time: Conv | None
    shortcut: Shortcut | None


class FastEncoder(Walker):
    """Encodes as `WanVae.encode_chunk`, with weights and activations in `dtype` and sums in float32."""

    def __init__(self, vae: WanVae, operations: Operations, dtype: torch.dtype) -> None:
        super().__init__(vae.encoder.mid_block, operations, dtype)
        encoder, self._vae = vae.encoder, vae
        conv_in = make_causal("conv_in", encoder.conv_in, dtype)
        self.conv_in = replace(conv_in, channels_in=-(-conv_in.channels_in // ALIGNED) * ALIGNED)
        self.stages = _make_stages(list(encoder.down_blocks), dtype)
        self.norm_out = make_gamma(encoder.norm_out)
        self.conv_out = make_causal("conv_out", encoder.conv_out, dtype)
        self.capacity = self.count_slots(self._encode)

    @property
    def config(self) -> VaeConfig:
        return self._vae.config

    def clip(self, height: int, width: int) -> Clip:
        """A clip of height x width latents that has not begun."""
        return self.clip_of(whole(height, width, len(self.stages)), self.capacity)

    def clip_of(self, window: Window, capacity: dict[tuple[int, int], int]) -> Clip:
        return Clip(self._operations, window, self._dtype, self.conv_in.weight.device, capacity)

    def encode_chunk(self, frames: Tensor, clip: Clip) -> Tensor:
        """The next frames of `clip` [1, 3, T, H, W] in [-1, 1], 1+4n at its beginning, then 4n -> normalised latents
        [1, z, t, H/s, W/s] float32."""
        self.check(frames, clip.height, clip.width, clip.first)
        groups = self.groups(frames, clip.first)
        moments = self.moments_of(clip, len(groups))
        for i, group in enumerate(groups):
            self._encode(group, clip, moments[i : i + 1])
        return self.finish(moments)

    def check(self, frames: Tensor, height: int, width: int, first: bool) -> None:
        """`ValueError` for frames that are not of a clip of height x width latents, 1+4n if they are the `first`, else
        4n."""
        stride = self.config.temporal_stride
        expected = (height * self.config.spatial_stride, width * self.config.spatial_stride)
        if frames.shape[:2] != (1, 3) or frames.shape[3:] != expected:
            raise ValueError(f"frames must be [1, 3, T, {expected[0]}, {expected[1]}], got {list(frames.shape)}")
        if frames.shape[2] < 1 or frames.shape[2] % stride != int(first):
            kind = f"{stride}n+1 in the first chunk" if first else f"{stride}n after the first chunk"
            raise ValueError(f"number of frames must be {kind}, got {frames.shape[2]}")

    def groups(self, frames: Tensor, first: bool) -> list[Tensor]:
        """Frames [1, 3, T, H, W] -> folded [1 or 4, H/p, W/p, 3 * p * p], a latent frame's each, p: `patch_size`."""
        stride = self.config.temporal_stride
        pixels = fold_pixels(frames.movedim(1, -1), self.config.patch_size)[0]
        parts = [pixels[:1], *pixels[1:].split(stride)] if first else pixels.split(stride)
        return [part for part in parts if len(part)]

    def moments_of(self, clip: Clip, count: int) -> Tensor:
        """Memory for `count` latent frames before `finish`."""
        return torch.empty(count, clip.height, clip.width, self.conv_out.channels, device=clip.device)

    def finish(self, moments: Tensor) -> Tensor:
        """[t, h, w, 2z] before `quant_conv` -> normalised latents [1, z, t, h, w]."""
        moments = torch.stack([pointwise(frame, self._vae.quant_conv) for frame in moments])
        mean = moments[..., : self.config.z_dim].permute(3, 0, 1, 2).unsqueeze(0)
        return self._vae.normalise(mean)

    def _encode(self, pixels: Tensor, clip: Clip, moments: Tensor | None = None) -> None:
        """One of `groups` -> `moments` [1, h, w, 2z]."""
        self.rest(*self.descend(pixels, clip), clip, moments)

    def descend(self, pixels: Tensor, clip: Clip) -> tuple[list[int], list[int]]:
        """One of `groups` through all levels but the lowest: what that gets, and the norm of it."""
        level = len(self.stages) - 1
        pool = clip.pool(level, self.conv_in.channels_in)
        slots = pool.take(len(pixels))
        if pool.capacity is not None:
            for slot, frame in zip(slots, pixels, strict=True):
                pool.pixels(slot)[..., : frame.shape[-1]].copy_(frame)
        gamma = self.stages[0].blocks[0].norm1
        raw, normed = self._causal(clip, self.conv_in, level, slots, level, raw=True, gamma=gamma)
        for stage, following in pairwise(self.stages):
            raw, normed = self._stage(clip, level, stage, raw, normed, following.blocks[0].norm1)
            level -= 1
        clip.first = False
        return raw, normed

    def rest(self, raw: list[int], normed: list[int], clip: Clip, moments: Tensor | None) -> None:
        """What `descend` gives through the lowest level and the middle -> `moments` [1, h, w, 2z]; None where nothing
        is computed."""
        raw, normed = self._stage(clip, 0, self.stages[-1], raw, normed, self.middle[0].norm1)
        _, normed = self._middle(clip, raw, normed, self.norm_out, keep=False)
        pool = clip.pool(0, self.conv_out.channels_in)
        slots = [*clip.history.get(self.conv_out.name, [ZERO_SLOT] * 2), *normed]
        if moments is not None:
            self._operations.conv_to_pixels(self.conv_out, pool, slots, moments)
        self._remember(clip, self.conv_out, pool, slots)

    def _stage(
        self, clip: Clip, level: int, stage: Stage, raw: list[int], normed: list[int], gamma: Tensor
    ) -> tuple[list[int], list[int]]:
        """A stage on frames and their norms, which are given up: its output and the norm of it by `gamma`."""
        shortcut = self._average(clip, level, stage, raw)
        ends = stage.halve_space is None and not shortcut
        for block, following in zip(stage.blocks, [*stage.blocks[1:], None], strict=True):
            norm = following.norm1 if following else gamma if ends else None
            raw, normed = self._block(clip, level, block, raw, normed, raw=True, gamma=norm)
        if stage.halve_space is not None:
            return self._down(clip, level, stage, raw, shortcut, gamma)
        if ends:
            return raw, normed
        pool = clip.pool(level, stage.blocks[-1].conv2.channels)
        self._add(pool, raw, shortcut)
        return raw, self._norm(pool, raw, gamma)

    def _average(self, clip: Clip, level: int, stage: Stage, frames: list[int]) -> list[int]:
        """What the stage's shortcut adds, in new slots of the pool of its output; none without one."""
        if stage.shortcut is None:
            return []
        time, space = stage.shortcut
        pool = clip.pool(level, stage.blocks[0].conv1.channels_in)
        target = clip.pool(level - (space > 1), stage.blocks[-1].conv2.channels)
        groups = [frames[i : i + time] for i in range(0, len(frames), time)]
        slots = target.take(len(groups))
        if pool.capacity is not None:
            row, column = clip.window.source(level) if space > 1 else (0, 0)
            rows, columns = slice(row, row + space * target.height), slice(column, column + space * target.width)
            for slot, group in zip(slots, groups, strict=True):
                average_pixels(
                    [pool.pixels(frame)[rows, columns] for frame in group], time, space, target.pixels(slot)
                )  # fmt: skip
        return slots

    def _add(self, pool: FramePool, frames: list[int], others: list[int]) -> None:
        """Add `others`, which are given up, to `frames`."""
        if pool.capacity is not None:
            for frame, other in zip(frames, others, strict=True):
                pool.frames[frame].add_(pool.frames[other])
        pool.give(others)

    def _down(
        self, clip: Clip, level: int, stage: Stage, frames: list[int], shortcut: list[int], gamma: Tensor
    ) -> tuple[list[int], list[int]]:
        """Half the height and width, and half the frames if the stage says so, and `shortcut` added, which is given up:
        the output and its norm by `gamma`."""
        assert stage.halve_space is not None
        source = clip.pool(level, stage.halve_space.channels_in)
        pool = clip.pool(level - 1, stage.halve_space.channels)
        time = stage.halve_time
        origin = clip.window.source(level)
        if time is None:
            outputs = self._run(stage.halve_space, source, frames, pool, shortcut, True, gamma, origin)
            source.give(frames)
            return outputs
        raw, _ = self._run(stage.halve_space, source, frames, pool, [], True, None, origin)
        source.give(frames)
        history = clip.history.get(time.name)
        if history is None:
            # The clip's first frame passes by the convolution, which remembers it; the blocks write over their input.
            assert len(raw) == 1, raw
            clip.history[time.name], raw = raw, pool.take(1)
            pool.copy(clip.history[time.name][0], raw[0])
            if shortcut:
                self._add(pool, raw, shortcut)
            return raw, self._norm(pool, raw, gamma)
        slots = [*history, *raw]
        outputs = self._run(time, pool, slots, pool, shortcut, True, gamma)
        clip.history[time.name] = slots[-1:]
        pool.give(slots[:-1])
        return outputs

    def count_slots(self, schedule: Callable[[Tensor, Clip], None]) -> dict[tuple[int, int], int]:
        """Slots of each pool that a clip's first groups, given to `schedule`, take at most. Nothing is computed."""
        meta, operations, self._operations = torch.device("meta"), self._operations, NoOperations()
        clip = Clip(self._operations, whole(1, 1, len(self.stages)), self._dtype, meta, None)
        for count in (1, *[self.config.temporal_stride] * 3):
            schedule(torch.empty(count, 1, 1, self.conv_in.channels_in, device=meta), clip)
        self._operations = operations
        return {key: pool.peak for key, pool in clip.pools.items()}


def _make_stages(modules: list[nn.Module], dtype: torch.dtype) -> list[Stage]:
    """Wan2.2's encoder has a module per stage, Wan2.1's a flat list, which is cut after each downsampling."""
    stages: list[Stage] = []
    blocks: list[Block] = []
    for i, module in enumerate(modules):
        name = f"down_blocks.{i}"
        if isinstance(module, DownBlock):
            inner = [make_block(f"{name}.{j}", block, dtype) for j, block in enumerate(module.resnets)]
            stages.append(_make_stage(name, inner, module.downsampler, Shortcut(*module.shortcut), dtype))
        elif isinstance(module, ResBlock):
            blocks.append(make_block(name, module, dtype))
        else:
            assert isinstance(module, Downsample)
            stages.append(_make_stage(name, blocks, module, None, dtype))
            blocks = []
    return [*stages, Stage(blocks, None, None, None)] if blocks else stages


def _make_stage(
    name: str, blocks: list[Block], down: Downsample | None, shortcut: Shortcut | None, dtype: torch.dtype
) -> Stage:
    if down is None:
        return Stage(blocks, None, None, shortcut)
    conv = down.resample[1]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    space = causal_conv(
        f"{name}.space", conv.weight[:, :, None], conv.bias, dtype, offset=(1, 1), space_stride=2
    )  # fmt: skip
    time = None if down.time_conv is None else _halve_time(f"{name}.time", down.time_conv, dtype)
    return Stage(blocks, space, time, shortcut)


def _halve_time(name: str, conv: nn.Conv3d, dtype: torch.dtype) -> Conv:
    assert conv.bias is not None
    return causal_conv(name, conv.weight, conv.bias, dtype, offset=(1, 1), time_stride=2)
