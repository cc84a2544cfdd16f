"""The encoder of `WanVae` on frame pools. See `stages/models/vae_decode.py`.

Four frames, which become one latent frame, go through the whole network at a time; the clip's first frame goes alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stages.models.vae import WanVae
from stages.models.vae_conv import Conv, causal_conv
from stages.models.vae_frames import ZERO_SLOT
from stages.models.vae_layers import Downsample, ResBlock, pointwise
from stages.models.vae_tiles import whole
from stages.models.vae_walk import Block, Clip, NoOperations, Operations, Walker, make_block, make_causal, make_gamma

PIXEL_CHANNELS = 8
"""Of a slot that holds a frame of pixels: 3, and zeros so that a row's bytes are a multiple of 16."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The residual blocks of one size, and the way down to the next."""

    blocks: list[Block]
    halve_space: Conv | None
    halve_time: Conv | None


class FastEncoder(Walker):
    """Encodes as `WanVae.encode_chunk`, with weights and activations in `dtype` and sums in float32."""

    def __init__(self, vae: WanVae, operations: Operations, dtype: torch.dtype) -> None:
        if vae.config.is_residual:
            raise ValueError("FastEncoder encodes with Wan2.1's VAE; this one is of Wan2.2's kind")
        super().__init__(vae.encoder.mid_block, operations, dtype)
        encoder, self._vae = vae.encoder, vae
        self.conv_in = make_causal("conv_in", encoder.conv_in, dtype)
        self.stages = _stages(list(encoder.down_blocks), dtype)
        self.norm_out = make_gamma(encoder.norm_out)
        self.conv_out = make_causal("conv_out", encoder.conv_out, dtype)
        self._capacity = self._count_slots()

    def clip(self, height: int, width: int) -> Clip:
        """A clip of height x width latents that has not begun."""
        window = whole(height, width, len(self.stages))
        return Clip(self._operations, window, self._dtype, self.conv_in.weight.device, self._capacity)

    def encode_chunk(self, frames: Tensor, clip: Clip) -> Tensor:
        """The next frames of `clip` [1, 3, T, H, W] in [-1, 1], 1+4n at its beginning, then 4n -> normalised latents
        [1, z, t, H/8, W/8] float32."""
        config = self._vae.config
        stride = config.temporal_stride
        expected = (clip.height * config.spatial_stride, clip.width * config.spatial_stride)
        if frames.shape[:2] != (1, 3) or frames.shape[3:] != expected:
            raise ValueError(f"frames must be [1, 3, T, {expected[0]}, {expected[1]}], got {list(frames.shape)}")
        if frames.shape[2] < 1 or frames.shape[2] % stride != int(clip.first):
            kind = f"{stride}n+1 in the first chunk" if clip.first else f"{stride}n after the first chunk"
            raise ValueError(f"number of frames must be {kind}, got {frames.shape[2]}")
        pixels = frames[0].permute(1, 2, 3, 0)
        groups = [pixels[:1], *pixels[1:].split(stride)] if clip.first else list(pixels.split(stride))
        shape = (clip.height, clip.width, self.conv_out.channels)
        moments = torch.empty(len([g for g in groups if len(g)]), *shape, device=frames.device)
        for i, group in enumerate(g for g in groups if len(g)):
            self._encode(group, clip, moments[i : i + 1])
        moments = torch.stack([pointwise(frame, self._vae.quant_conv) for frame in moments])
        mean = moments[..., : config.z_dim].permute(3, 0, 1, 2).unsqueeze(0)
        return self._vae.normalise(mean)

    def _encode(self, pixels: Tensor, clip: Clip, moments: Tensor) -> None:
        """Frames [1 or 4, H, W, 3] -> `moments` [1, h, w, 2z], before `quant_conv`."""
        level = len(self.stages) - 1
        pool = clip.pool(level, PIXEL_CHANNELS)
        slots = pool.take(len(pixels))
        if pool.capacity is not None:
            for slot, frame in zip(slots, pixels, strict=True):
                pool.pixels(slot)[..., :3].copy_(frame)
        conv_in = replace(self.conv_in, channels_in=PIXEL_CHANNELS)
        raw, normed = self._causal(clip, conv_in, level, slots, level, raw=True, gamma=self.stages[0].blocks[0].norm1)
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1
            following = self.middle[0] if last else self.stages[i + 1].blocks[0]
            for j, block in enumerate(stage.blocks):
                end = j == len(stage.blocks) - 1
                gamma = stage.blocks[j + 1].norm1 if not end else following.norm1 if last else None
                raw, normed = self._block(clip, level, block, raw, normed, raw=True, gamma=gamma)
            if not last:
                raw, normed = self._down(clip, level, stage, raw, following.norm1)
                level -= 1
        _, normed = self._middle(clip, raw, normed, self.norm_out, keep=False)
        pool = clip.pool(0, self.conv_out.channels_in)
        slots = [*clip.history.get(self.conv_out.name, [ZERO_SLOT] * 2), *normed]
        self._operations.conv_to_pixels(self.conv_out, pool, slots, moments)
        self._remember(clip, self.conv_out, pool, slots)
        clip.first = False

    def _down(
        self, clip: Clip, level: int, stage: Stage, frames: list[int], gamma: Tensor
    ) -> tuple[list[int], list[int]]:
        """Half the height and width, and half the frames if the stage says so; the output and its norm by `gamma`."""
        assert stage.halve_space is not None
        source = clip.pool(level, stage.halve_space.channels_in)
        pool = clip.pool(level - 1, stage.halve_space.channels)
        time = stage.halve_time
        raw, normed = self._run(stage.halve_space, source, frames, pool, [], True, None if time else gamma)
        source.give(frames)
        if time is None:
            return raw, normed
        history = clip.history.get(time.name)
        if history is None:
            # The clip's first frame passes by the convolution, which remembers it; the blocks write over their input.
            assert len(raw) == 1, raw
            clip.history[time.name], raw = raw, pool.take(1)
            if pool.capacity is not None:
                pool.frames[raw[0]].copy_(pool.frames[clip.history[time.name][0]])
            return raw, self._norm(pool, raw, gamma)
        slots = [*history, *raw]
        outputs = self._run(time, pool, slots, pool, [], True, gamma)
        clip.history[time.name] = slots[-1:]
        pool.give(slots[:-1])
        return outputs

    def _count_slots(self) -> dict[tuple[int, int], int]:
        """Slots that each pool needs: what a clip's first chunks take at most. Nothing is computed."""
        meta, operations, self._operations = torch.device("meta"), self._operations, NoOperations()
        clip = Clip(self._operations, whole(1, 1, len(self.stages)), self._dtype, meta, None)
        for count in (1, *[self._vae.config.temporal_stride] * 3):
            self._encode(torch.empty(count, 1, 1, 3, device=meta), clip, torch.empty(0))
        self._operations = operations
        return {key: pool.peak for key, pool in clip.pools.items()}


def _stages(modules: list[nn.Module], dtype: torch.dtype) -> list[Stage]:
    """The flat list of the encoder's blocks, cut after each downsampling."""
    stages: list[Stage] = []
    blocks: list[Block] = []
    for i, module in enumerate(modules):
        name = f"down_blocks.{i}"
        if isinstance(module, ResBlock):
            blocks.append(make_block(name, module, dtype))
            continue
        assert isinstance(module, Downsample)
        conv = module.resample[1]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        space = causal_conv(
            f"{name}.space", conv.weight[:, :, None], conv.bias, dtype, offset=(1, 1), space_stride=2
        )  # fmt: skip
        time = None if module.time_conv is None else _halve_time(f"{name}.time", module.time_conv, dtype)
        stages.append(Stage(blocks, space, time))
        blocks = []
    return [*stages, Stage(blocks, None, None)]


def _halve_time(name: str, conv: nn.Conv3d, dtype: torch.dtype) -> Conv:
    assert conv.bias is not None
    return causal_conv(name, conv.weight, conv.bias, dtype, offset=(1, 1), time_stride=2)
