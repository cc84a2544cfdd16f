"""The decoder of `WanVae` on frame pools: the same computation, with convolutions that fuse what is around them.

`FastDecoder` walks through the network with lists of slots (`stages/models/vae_frames.py`). Who computes is
`Operations`: plain torch (`stages/models/vae_conv.py`), or Triton kernels (`stages/kernels/vae_launch.py`). Norm, SiLU
and residual happen in the convolution before them, upsampling in the one after it.

Frames go through the levels depth first and at most `groups[level]` at a time, so that memory depends on the size of a
frame only, not on the length of a chunk or clip. How they are grouped does not change one bit of the result: each
output pixel is a sum in an order of its own, and what torch computes is computed frame by frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.models.vae import UpBlock, WanVae
from stages.models.vae_conv import Conv, doubling_conv, narrow_conv, sum_columns, upsampling_conv
from stages.models.vae_frames import ZERO_SLOT
from stages.models.vae_layers import CausalConv, Upsample, pointwise
from stages.models.vae_walk import Block, Clip, NoOperations, Operations, Walker, make_block, make_causal, make_gamma

GROUPS = (4, 4, 4, 4)
"""Frames per launch at each level, from the latents' size to the frames'. At most 4."""


@dataclass(frozen=True, slots=True)
class Level:
    """The residual blocks of one size, and the way up to the next."""

    blocks: list[Block]
    double: Conv | None
    upsample: Conv | None


class FastDecoder(Walker):
    """Decodes as `WanVae.decode_chunk`, with weights and activations in `dtype` and sums in float32."""

    def __init__(
        self, vae: WanVae, operations: Operations, dtype: torch.dtype, groups: tuple[int, ...] = GROUPS
    ) -> None:
        if vae.config.is_residual:
            raise ValueError("FastDecoder decodes Wan2.1's VAE; this one is of Wan2.2's kind")
        if len(groups) != len(vae.decoder.up_blocks) or not all(1 <= group <= 4 for group in groups):
            raise ValueError(f"groups must be {len(vae.decoder.up_blocks)} numbers from 1 to 4, got {groups}")
        decoder, self.groups, self._vae = vae.decoder, groups, vae
        super().__init__(decoder.mid_block, operations, dtype)
        self.conv_in = make_causal("conv_in", decoder.conv_in, dtype)
        self.levels = [_level(f"up_blocks.{i}", block, dtype) for i, block in enumerate(decoder.up_blocks)]
        self.norm_out = make_gamma(decoder.norm_out)
        conv_out = decoder.conv_out
        assert isinstance(conv_out, CausalConv) and conv_out.bias is not None
        self.conv_out = narrow_conv("conv_out", conv_out.weight, conv_out.bias, dtype)
        self._capacity = self._count_slots()

    def clip(self, height: int, width: int) -> Clip:
        """A clip of height x width latents that has not begun."""
        return Clip(self._operations, height, width, self._dtype, self.conv_in.weight.device, self._capacity)

    def decode_chunk(self, latents: Tensor, clip: Clip) -> Tensor:
        """The next t normalised latent frames [1, z, t, h, w] of `clip` -> pixels [1, 3, 4t, 8h, 8w] (4t-3 frames at
        the clip's beginning), float32, clamped to [-1, 1]."""
        config = self._vae.config
        if latents.shape[:2] != (1, config.z_dim) or latents.shape[3:] != (clip.height, clip.width):
            raise ValueError(
                f"latents must be [1, {config.z_dim}, T, {clip.height}, {clip.width}], got {list(latents.shape)}"
            )
        latents = self._vae.denormalise(latents.float()).movedim(1, -1)[0]
        count = len(latents) * config.temporal_stride - (config.temporal_stride - 1 if clip.first else 0)
        scale = config.spatial_stride
        pixels = torch.empty(count, clip.height * scale, clip.width * scale, 3, device=latents.device)
        done = 0
        for part in latents.split(self.groups[0]):
            done += self._decode(part, clip, pixels[done:])
        assert done == count, (done, count)
        return pixels.clamp_(-1, 1).permute(3, 0, 1, 2).unsqueeze(0)

    def _decode(self, latents: Tensor, clip: Clip, pixels: Tensor) -> int:
        """One group of latents [t, h, w, z] -> the first of `pixels`; how many."""
        pool = clip.pool(0, self.conv_in.channels_in)
        slots = pool.take(len(latents))
        if pool.capacity is not None:
            for slot, frame in zip(slots, latents, strict=True):
                pool.pixels(slot).copy_(pointwise(frame, self._vae.post_quant_conv))
        raw, normed = self._causal(clip, self.conv_in, 0, slots, 0, raw=True, gamma=self.middle[0].norm1)
        raw, normed = self._middle(clip, raw, normed, self.levels[0].blocks[0].norm1, keep=True)
        count = self._climb(clip, 0, raw, normed, pixels)
        clip.first = False
        return count

    def _climb(self, clip: Clip, level: int, raw: list[int], normed: list[int], pixels: Tensor) -> int:
        """The blocks of a level on one group of frames, then the levels above; the number of pixel frames."""
        blocks, last = self.levels[level].blocks, level == len(self.levels) - 1
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            gamma = following.norm1 if following else self.norm_out if last else None
            raw, normed = self._block(
                clip, level, block, raw, normed, raw=not (last and following is None), gamma=gamma
            )
        if last:
            return self._finish(clip, level, normed, pixels)
        frames, pool = self._double(clip, level, raw), clip.pool(level, blocks[-1].conv2.channels)
        upsample = self.levels[level].upsample
        assert upsample is not None
        done = 0
        for part in _split(frames, self.groups[level + 1]):
            target = clip.pool(level + 1, upsample.channels)
            raw, normed = self._run(upsample, pool, part, target, [], True, self.levels[level + 1].blocks[0].norm1)
            pool.give(part)
            done += self._climb(clip, level + 1, raw, normed, pixels[done:])
        return done

    def _finish(self, clip: Clip, level: int, normed: list[int], pixels: Tensor) -> int:
        pool = clip.pool(level, self.conv_out.channels_in)
        slots = [*clip.history.get(self.conv_out.name, [ZERO_SLOT] * 2), *normed]
        if pool.capacity is not None:
            pixels = pixels[: len(normed)]
            parts = pixels.new_empty(*pixels.shape[:3], self.conv_out.channels)
            self._operations.conv_to_pixels(self.conv_out, pool, slots, parts)
            sum_columns(parts, pixels)
        self._remember(clip, self.conv_out, pool, slots)
        return len(normed)

    def _double(self, clip: Clip, level: int, frames: list[int]) -> list[int]:
        """Each frame becomes two, but the clip's first, which the convolution never sees."""
        layer = self.levels[level].double
        if layer is None:
            return frames
        first = [] if layer.name in clip.doubled else frames[:1]
        clip.doubled.add(layer.name)
        rest = frames[len(first) :]
        return first if not rest else first + self._causal(clip, layer, level, rest, level, raw=True, gamma=None)[0]

    def _count_slots(self) -> dict[tuple[int, int], int]:
        """Slots that each pool needs: what a clip's first chunks take at most. Nothing is computed."""
        meta, operations, self._operations = torch.device("meta"), self._operations, NoOperations()
        clip = Clip(self._operations, 1, 1, self._dtype, meta, None)
        for count in (1, *[2 * self.groups[0]] * 3):
            for part in torch.empty(count, 1, 1, self.conv_in.channels_in, device=meta).split(self.groups[0]):
                self._decode(part, clip, torch.empty(0))
        self._operations = operations
        return {key: pool.peak for key, pool in clip.pools.items()}


def _level(name: str, block: nn.Module, dtype: torch.dtype) -> Level:
    assert isinstance(block, UpBlock)
    blocks = [make_block(f"{name}.{i}", resnet, dtype) for i, resnet in enumerate(block.resnets)]
    double = upsample = None
    for module in block.upsamplers:
        assert isinstance(module, Upsample)
        conv = module.resample[1]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        upsample = upsampling_conv(f"{name}.upsample", conv.weight, conv.bias, dtype)
        if module.time_conv is not None:
            assert module.time_conv.bias is not None
            double = doubling_conv(f"{name}.double", module.time_conv.weight, module.time_conv.bias, dtype)
    return Level(blocks, double, upsample)


def _split(frames: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(frames), size):
        yield frames[i : i + size]
