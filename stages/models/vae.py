"""The causal video VAEs: pixels [B, 3, 1+4n, H, W] in [-1, 1] <-> latents [B, z, 1+n, H/s, W/s].

s is 8 for Wan2.1's. Wan2.2's, s = 16, folds 2x2 pixels into channels first, and has shortcuts that average and repeat
around its down- and upsampling stages (`VaeConfig.is_residual`).

Every convolution over time looks back only, so a clip can be coded in chunks: each convolution keeps the last frames of
its input in a `Cache` under its own name. A whole clip is one chunk with an empty cache. Parameter names are those of
Diffusers' `AutoencoderKLWan`; the architecture and the rules for the first frame are those of the Wan2.1 repository
(`wan/modules/vae.py`).

Frames and latents are [B, C, T, H, W]; inside, activations are [B, T, H, W, C] contiguous, the memory that convolutions
are fastest on (channels_last_3d) and that norms and attention want anyway. Both in the dtype of the weights.

Chunks and whole clips differ by rounding only (1e-6 relative): libraries choose the kernel of a convolution, and so the
order of its sums, by the shape, and elementwise kernels treat the end of a tensor with other instructions. What is done
here beside that - padding, caches, the rules for the first frame, shortcuts - is the same bit for bit.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ipc.architecture import VaeConfig
from stages.models.vae_layers import (
    Cache,
    CausalConv,
    Downsample,
    MidBlock,
    ResBlock,
    RmsNorm,
    Upsample,
    add_repeated,
    average_down,
    fold_pixels,
    unfold_pixels,
)


class WanVae(nn.Module):
    """Encoder and decoder. Frames and latents: see the module's docstring."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ValueError(
                f"latents_mean and latents_std must have z_dim={config.z_dim} numbers, "
                f"got {len(config.latents_mean)} and {len(config.latents_std)}"
            )
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        for name, module in self.named_modules():
            if isinstance(module, CausalConv):
                module.slot = name

    def encode(self, frames: Tensor) -> Tensor:
        """[B, 3, 1+4n, H, W] in [-1, 1] -> normalised latents [B, z, 1+n, H/s, W/s]."""
        return self.encode_chunk(frames, {})

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, 1+n, h, w] -> pixels [B, 3, 1+4n, s*h, s*w], clamped to [-1, 1]."""
        return self.decode_chunk(latents, {})

    def encode_chunk(self, frames: Tensor, cache: Cache) -> Tensor:
        """The next frames of a clip: 1+4n of them while `cache` is empty, then 4n at a time -> normalised latents."""
        return self.normalise(self.encode_moments(frames, cache)[0])

    def decode_chunk(self, latents: Tensor, cache: Cache) -> Tensor:
        """The next t normalised latent frames of a clip -> 4t pixel frames (4t-3 while `cache` is empty)."""
        return self.decode_raw(self.denormalise(latents), cache).clamp(-1, 1)

    def encode_moments(self, frames: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Frames -> mean and log-variance of the latents, unscaled, [B, z, t, h, w] each. No cache: a whole clip."""
        self.check_frames(frames, first=not cache)
        pixels = fold_pixels(self._channels_last(frames), self.config.patch_size)
        moments = self.quant_conv(self.encoder(pixels, cache)).movedim(-1, 1)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def decode_raw(self, latents: Tensor, cache: Cache | None = None) -> Tensor:
        """Unscaled latents -> pixels before the clamp. No cache: a whole clip."""
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise ValueError(f"latents must be [B, {self.config.z_dim}, T, h, w], got {list(latents.shape)}")
        x = self.decoder(self.post_quant_conv(self._channels_last(latents)), cache)
        return unfold_pixels(x, self.config.patch_size).movedim(-1, 1)

    def normalise(self, mean: Tensor) -> Tensor:
        """Encoder output -> what the DiT is trained on: per channel (mean - latents_mean) / latents_std."""
        return (mean - self._per_channel(self.config.latents_mean, mean)) / self._per_channel(
            self.config.latents_std, mean
        )

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents * self._per_channel(self.config.latents_std, latents) + self._per_channel(
            self.config.latents_mean, latents
        )

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)

    def _channels_last(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, H, W, C] contiguous, in the dtype of the weights."""
        return x.movedim(1, -1).to(self.quant_conv.weight.dtype).contiguous()

    def check_frames(self, frames: Tensor, first: bool) -> None:
        """`ValueError` for frames that are no clip's `first` chunk, or no later one."""
        space, time = self.config.spatial_stride, self.config.temporal_stride
        if frames.ndim != 5 or frames.shape[1] != 3:
            raise ValueError(f"frames must be [B, 3, T, H, W], got {list(frames.shape)}")
        count, height, width = frames.shape[2:]
        if count < 1 or count % time != (1 if first else 0):
            expected = f"{time}n+1 in the first chunk" if first else f"{time}n after the first chunk"
            raise ValueError(f"number of frames must be {expected}, got {count}")
        if height % space or width % space:
            raise ValueError(f"height and width must be multiples of {space}, got {height}x{width}")


class Encoder(nn.Module):
    """Folded frames [B, 1+4n, H/p, W/p, 3*p*p], p = `patch_size` -> moments before `quant_conv` [B, 1+n, h, w, 2z]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        blocks: list[nn.Module] = []
        for (width_in, width), time in zip(pairwise(widths), (*config.temporal_downsample, None), strict=True):
            if config.is_residual:
                blocks.append(DownBlock(width_in, width, config.num_res_blocks, time))
            else:
                blocks += res_blocks(width_in, width, config.num_res_blocks)
                blocks += [] if time is None else [Downsample(width, time)]
        self.conv_in = CausalConv(3 * config.patch_size**2, widths[0], 3)
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RmsNorm(widths[-1], dims=3)
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, cache)
        return self.conv_out(self.norm_out.silu(x), cache)


class Decoder(nn.Module):
    """Latents after `post_quant_conv` [B, 1+n, h, w, z] -> folded frames [B, 1+4n, H/p, W/p, 3*p*p]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        base_dim = config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim
        widths = [base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        blocks: list[nn.Module] = []
        doubles_time = (*reversed(config.temporal_downsample), None)
        for stage, ((width_in, width), time) in enumerate(zip(pairwise(widths), doubles_time, strict=True)):
            if config.is_residual:
                blocks.append(ResidualUpBlock(width_in, width, config.num_res_blocks + 1, time))
            else:
                # The convolution after each upsampling halves the channels.
                width_in = width_in if stage == 0 else width_in // 2
                blocks.append(UpBlock(width_in, width, config.num_res_blocks + 1, time))
        self.conv_in = CausalConv(config.z_dim, widths[0], 3)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = RmsNorm(widths[-1], dims=3)
        self.conv_out = CausalConv(widths[-1], 3 * config.patch_size**2, 3)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = self.mid_block(self.conv_in(x, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out(self.norm_out.silu(x), cache)


class DownBlock(nn.Module):
    """Wan2.2's encoder stage: residual blocks, then (unless `time` is None) half the height and width, and half the
    frames if `time`; and around all of it a shortcut that averages."""

    def __init__(self, width_in: int, width: int, count: int, time: bool | None) -> None:
        super().__init__()
        self.shortcut = (2 if time else 1, 1 if time is None else 2)
        """Frames, and pixels along height and width, that become one."""
        if width_in * self.shortcut[0] * self.shortcut[1] ** 2 % width:
            raise ValueError(f"an encoder stage cannot go from {width_in} to {width} channels: its shortcut averages")
        self.resnets = nn.ModuleList(res_blocks(width_in, width, count))
        self.downsampler = None if time is None else Downsample(width, time)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, cache)
        if self.downsampler is not None:
            y = self.downsampler(y, cache)
        return y + average_down(x, y.shape[-1], *self.shortcut)


class UpBlock(nn.Module):
    """Wan2.1's decoder stage: residual blocks, then (unless `time` is None) twice the height and width with half the
    channels, and twice the frames if `time`."""

    def __init__(self, width_in: int, width: int, count: int, time: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(res_blocks(width_in, width, count))
        self.upsamplers = nn.ModuleList([] if time is None else [Upsample(width, width // 2, time)])

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.enlarge(self.frames(x, cache), x)

    def frames(self, x: Tensor, cache: Cache | None) -> Tensor:
        """All frames of the output, before they are made larger."""
        for block in self.resnets:
            x = block(x, cache)
        for upsampler in self.upsamplers:
            assert isinstance(upsampler, Upsample)
            x = upsampler.double_time(x, cache)
        return x

    def enlarge(self, frames: Tensor, x: Tensor) -> Tensor:
        """The output of `frames` and of the block's input x, whose pixels may be the same part of both."""
        for upsampler in self.upsamplers:
            assert isinstance(upsampler, Upsample)
            frames = upsampler.double_space(frames)
        return frames


class ResidualUpBlock(nn.Module):
    """Wan2.2's decoder stage: as `UpBlock`, but all channels are kept, and a shortcut that repeats goes around."""

    def __init__(self, width_in: int, width: int, count: int, time: bool | None) -> None:
        super().__init__()
        if time is not None and width_in not in (width, 2 * width, 4 * width, (8 if time else 4) * width):
            raise ValueError(f"a decoder stage cannot go from {width_in} to {width} channels: its shortcut repeats")
        self.time = 2 if time else 1
        self.resnets = nn.ModuleList(res_blocks(width_in, width, count))
        self.upsampler = None if time is None else Upsample(width, width, time)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.enlarge(self.frames(x, cache), x)

    def frames(self, x: Tensor, cache: Cache | None) -> Tensor:
        """See `UpBlock.frames`."""
        for block in self.resnets:
            x = block(x, cache)
        return x if self.upsampler is None else self.upsampler.double_time(x, cache)

    def enlarge(self, frames: Tensor, x: Tensor) -> Tensor:
        """See `UpBlock.enlarge`."""
        if self.upsampler is None:
            return frames
        return add_repeated(self.upsampler.double_space(frames), x, self.time)


def res_blocks(width_in: int, width: int, count: int) -> list[nn.Module]:
    """`count` residual blocks, the first of which changes the width."""
    return [ResBlock(width_in if i == 0 else width, width) for i in range(count)]
