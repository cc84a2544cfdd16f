"""The Wan2.1 causal video VAE: pixels [B, 3, 1+4n, H, W] in [-1, 1] <-> latents [B, z, 1+n, H/8, W/8].

Every convolution over time looks back only, so a clip can be coded in chunks: each convolution keeps the last frames of
its input in a `Cache` under its own name. A whole clip is one chunk with an empty cache. Parameter names are those of
Diffusers' `AutoencoderKLWan`; the architecture and the rules for the first frame are those of the Wan2.1 repository
(`wan/modules/vae.py`).

Frames and latents are [B, C, T, H, W]; inside, activations are [B, T, H, W, C] contiguous, the memory that convolutions
are fastest on (channels_last_3d) and that norms and attention want anyway. Both in the dtype of the weights.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.architecture import VaeConfig

ONEDNN = torch.backends.mkldnn.is_available()

Cache: TypeAlias = dict[str, Tensor]
"""Convolution name -> the last frames of its input, [B, 1 or 2, H, W, C]. Empty before the first chunk. `encode_chunk`
and `decode_chunk` update it in place; a copy of the tensors is enough to resume the clip in another process."""


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
        """[B, 3, 1+4n, H, W] in [-1, 1] -> normalised latents [B, z, 1+n, H/8, W/8]."""
        return self.encode_chunk(frames, {})

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, 1+n, h, w] -> pixels [B, 3, 1+4n, 8h, 8w], clamped to [-1, 1]."""
        return self.decode_chunk(latents, {})

    def encode_chunk(self, frames: Tensor, cache: Cache) -> Tensor:
        """The next frames of a clip: 1+4n of them while `cache` is empty, then 4n at a time -> normalised latents."""
        return self.normalise(self.encode_moments(frames, cache)[0])

    def decode_chunk(self, latents: Tensor, cache: Cache) -> Tensor:
        """The next t normalised latent frames of a clip -> 4t pixel frames (4t-3 while `cache` is empty)."""
        return self.decode_raw(self.denormalise(latents), cache).clamp(-1, 1)

    def encode_moments(self, frames: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Frames -> mean and log-variance of the latents, unscaled, [B, z, t, h, w] each. No cache: a whole clip."""
        self._check_frames(frames, first=not cache)
        moments = self.quant_conv(self.encoder(self._channels_last(frames), cache)).movedim(-1, 1)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def decode_raw(self, latents: Tensor, cache: Cache | None = None) -> Tensor:
        """Unscaled latents -> pixels before the clamp. No cache: a whole clip."""
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise ValueError(f"latents must be [B, {self.config.z_dim}, T, h, w], got {list(latents.shape)}")
        x = self.decoder(self.post_quant_conv(self._channels_last(latents)), cache)
        return x.movedim(-1, 1)

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

    def _check_frames(self, frames: Tensor, first: bool) -> None:
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
    """Frames [B, 1+4n, H, W, 3] -> moments before `quant_conv` [B, 1+n, H/8, W/8, 2z]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        blocks: list[nn.Module] = []
        for stage, (width_in, width) in enumerate(pairwise(widths)):
            blocks += [ResBlock(width_in if i == 0 else width, width) for i in range(config.num_res_blocks)]
            if stage < len(config.temporal_downsample):
                blocks.append(Downsample(width, time=config.temporal_downsample[stage]))
        self.conv_in = CausalConv(3, widths[0], 3)
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
    """Latents after `post_quant_conv` [B, 1+n, h, w, z] -> pixels [B, 1+4n, 8h, 8w, 3]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        doubles_time = tuple(reversed(config.temporal_downsample))
        blocks: list[nn.Module] = []
        for stage, (width_in, width) in enumerate(pairwise(widths)):
            # The convolution after each upsampling halves the channels.
            width_in = width_in if stage == 0 else width_in // 2
            time = doubles_time[stage] if stage < len(doubles_time) else None
            blocks.append(UpBlock(width_in, width, config.num_res_blocks + 1, time))
        self.conv_in = CausalConv(config.z_dim, widths[0], 3)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = RmsNorm(widths[-1], dims=3)
        self.conv_out = CausalConv(widths[-1], 3, 3)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = self.mid_block(self.conv_in(x, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out(self.norm_out.silu(x), cache)


class UpBlock(nn.Module):
    """Residual blocks, then (unless `time` is None) twice the height and width, and twice the frames if `time`."""

    def __init__(self, width_in: int, width: int, count: int, time: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width_in if i == 0 else width, width) for i in range(count))
        self.upsamplers = nn.ModuleList([] if time is None else [Upsample(width, time)])

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, cache)
        return x


class MidBlock(nn.Module):
    """Residual block, attention inside each frame, residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(width)])
        self.resnets = nn.ModuleList([ResBlock(width, width), ResBlock(width, width)])

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, cache))
        return self.resnets[1](x, cache)


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1x1 convolution on x where the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(width_in, dims=3)
        self.conv1 = CausalConv(width_in, width, 3)
        self.norm2 = RmsNorm(width, dims=3)
        self.conv2 = CausalConv(width, width, 3)
        self.conv_shortcut = CausalConv(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(self.norm1.silu(x), cache)
        return shortcut + self.conv2(self.norm2.silu(x), cache)


class FrameAttention(nn.Module):
    """Attention with one head over the pixels of each frame, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RmsNorm(width, dims=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same."""
        q, k, v = pointwise(self.norm(x), self.to_qkv).flatten(2, 3).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + pointwise(y.view(x.shape), self.proj)


class Downsample(nn.Module):
    """Half the height and width; with `time`, frame 0 of the clip is kept and each later pair becomes one frame."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = CausalConv(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = per_frame(self.resample, x)
        return x if self.time_conv is None else self._halve_time(self.time_conv, x, cache)

    def _halve_time(self, conv: CausalConv, x: Tensor, cache: Cache | None) -> Tensor:
        """Windows of three frames that share one: (0, 1, 2), (2, 3, 4), ... Frame 0 also passes through alone."""
        last = None if cache is None else cache.get(conv.slot)
        if cache is not None:
            cache[conv.slot] = x[:, -1:].clone()
        if last is not None:
            return conv.convolve(torch.cat((last, x), dim=1))
        return x if x.shape[1] == 1 else torch.cat((x[:, :1], conv.convolve(x)), dim=1)


class Upsample(nn.Module):
    """Twice the height and width, half the channels; with `time`, every frame but the clip's first becomes two."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(width, width // 2, 3, padding=1)
        )
        self.time_conv = CausalConv(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(self.time_conv, x, cache)
        return per_frame(self.resample, x)

    def _double_time(self, conv: CausalConv, x: Tensor, cache: Cache | None) -> Tensor:
        """Frame 0 of the clip passes through and `conv` never sees it: its history starts as zeros at frame 1."""
        if cache is not None and conv.slot in cache:
            return interleave_halves(conv(x, cache))
        first, rest = x[:, :1], x[:, 1:]
        if rest.shape[1] > 0:
            return torch.cat((first, interleave_halves(conv(rest, cache))), dim=1)
        if cache is not None:
            cache[conv.slot] = zero_history(x)
        return x


class CausalConv(nn.Conv3d):
    """Convolution over [B, T, H, W, C] that keeps H and W and sees, in time, only its own frame and those before it."""

    slot: str
    """Its key in the cache: its name in the VAE, set by `WanVae`."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int | tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__(channels_in, channels, kernel, stride)
        self.slot = ""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Two frames of history (kernels of 3): from the cache, or zeros before the clip's first frame."""
        if self.kernel_size[0] == 1:
            return pointwise(x, self)
        history = None if cache is None else cache.get(self.slot)
        x = torch.cat((zero_history(x) if history is None else history, x), dim=1)
        if cache is not None:
            # A clone: a view would keep the whole activation alive until the next chunk.
            cache[self.slot] = x[:, -2:].clone()
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution without padding in time."""
        x = x.movedim(-1, 1)
        padding = (0, self.kernel_size[1] // 2, self.kernel_size[2] // 2)
        if x.device.type == "cpu" and x.dtype == torch.float32 and ONEDNN and not torch.compiler.is_compiling():
            # F.conv3d leaves oneDNN when B*C*T*H <= 20480, which is most layers of one small clip: 16 times slower
            # (83 ms against 5 ms for 64 channels at 9x24x24 on 2 cores, torch 2.13).
            y = torch.mkldnn_convolution(x, self.weight, self.bias, padding, self.stride, self.dilation, 1)
        else:
            y = F.conv3d(x, self.weight, self.bias, self.stride, padding)
        return y.movedim(1, -1)


class RmsNorm(nn.Module):
    """RMS norm over the channels, the last dim of x; `dims` trailing ones in the shape of gamma."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        # The original divides by max(|x|, 1e-12). This eps too is lost in float32 noise, and gives 0 for x = 0.
        return F.rms_norm(x, x.shape[-1:], self.gamma.flatten().to(x.dtype), eps=1e-24)

    def silu(self, x: Tensor) -> Tensor:
        """silu(norm(x)), in the memory of the norm's result."""
        return F.silu(self(x), inplace=True)


def pointwise(x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """A convolution whose kernel is one pixel, as the linear that it is over the last dim of x."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module of [N, C, H, W] to every frame of [B, T, H, W, C]."""
    y = module(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return torch.unflatten(y, 0, x.shape[:2])


def zero_history(x: Tensor) -> Tensor:
    """[B, T, H, W, C] -> two frames of zeros [B, 2, H, W, C]."""
    return x.new_zeros(x.shape[0], 2, *x.shape[2:])


def interleave_halves(x: Tensor) -> Tensor:
    """[B, T, H, W, 2C], halves a and b of the channels -> [B, 2T, H, W, C], frames a0 b0 a1 b1 ..."""
    return torch.unflatten(x, -1, (2, -1)).movedim(-2, 2).flatten(1, 2)
