"""The layers of the Wan VAEs. All take and give [B, T, H, W, C]; those that look back in time have a `Cache`."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()

Cache: TypeAlias = dict[str, Tensor]
"""Convolution name -> the last frames of its input, [B, 1 or 2, H, W, C]. Empty before the first chunk. `encode_chunk`
and `decode_chunk` update it in place; a copy of the tensors is enough to resume the clip in another process."""


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
    """Twice the height and width, `width_out` channels; with `time`, every frame but the clip's first becomes two."""

    def __init__(self, width: int, width_out: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(width, width_out, 3, padding=1)
        )
        self.time_conv = CausalConv(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.double_space(self.double_time(x, cache))

    def double_space(self, x: Tensor) -> Tensor:
        return per_frame(self.resample, x)

    def double_time(self, x: Tensor, cache: Cache | None) -> Tensor:
        """The frames before they are made larger: twice as many if this is one with `time`."""
        return x if self.time_conv is None else self._double_time(self.time_conv, x, cache)

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
    # Where F.conv2d leaves oneDNN, for few pixels, its result is strided, on which a norm sums in another order.
    y = module(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
    return torch.unflatten(y, 0, x.shape[:2])


def zero_history(x: Tensor) -> Tensor:
    """[B, T, H, W, C] -> two frames of zeros [B, 2, H, W, C]."""
    return x.new_zeros(x.shape[0], 2, *x.shape[2:])


def average_down(x: Tensor, width: int, time: int, space: int) -> Tensor:
    """Shortcut of Wan2.2's encoder: blocks of `time` x `space` x `space` pixels become channels, then neighbouring
    channels are averaged until `width` are left: [B, T, H, W, C] -> [B, ceil(T/time), H/space, W/space, width].

    Frames that `time` does not divide, as in a clip's first chunk, get zeros in front.
    """
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % time, 0))
    x = x.unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(1, (-1, time))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4).unflatten(-1, (width, -1)).mean(-1)


def add_repeated(y: Tensor, x: Tensor, time: int) -> Tensor:
    """Shortcut of Wan2.2's decoder: y [B, T', 2H, 2W, C'] += x [B, T, H, W, C], each pixel repeated over a block of
    `time` x 2 x 2. T' is T * time, or with `time` 2 one less in a clip's first chunk: its first frame stays one frame.

    Where C is C' times 2, 4 or 8, a block is made of as many channels: one per time step, then per row, then per
    column. x is never copied at the size of y, which takes 3.7 GB at two latent frames of 1280x704.
    """
    blocks = _block_views(x, y.shape[-1], time)
    first = int(y.shape[1] < x.shape[1] * time)
    _in_blocks(y[:, :first], 1).add_(blocks[:, :first, -1:])
    _in_blocks(y[:, first:], time).add_(blocks[:, first:])
    return y


def _in_blocks(y: Tensor, time: int) -> Tensor:
    """A view of [B, T * time, 2H, 2W, C] as [B, T, time, H, 2, W, 2, C]."""
    frames, height, width = y.shape[1:4]
    return y.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2)).unflatten(1, (frames // time, time))


def _block_views(x: Tensor, width: int, time: int) -> Tensor:
    """[B, T, H, W, C] -> [B, T, time, H, 2, W, 2, width] without a copy; sizes of 1 where all of a block is equal."""
    channels, block = x.shape[-1] // width, []
    for size in (time, 2, 2):
        block.append(size if channels > 1 else 1)
        channels //= block[-1]
    return x.unflatten(-1, (width, *block)).permute(0, 1, 5, 2, 6, 3, 7, 4)


def interleave_halves(x: Tensor) -> Tensor:
    """[B, T, H, W, 2C], halves a and b of the channels -> [B, 2T, H, W, C], frames a0 b0 a1 b1 ..."""
    # Contiguous: of strided frames, the upsampling's convolution sums in another order.
    return torch.unflatten(x, -1, (2, -1)).movedim(-2, 2).flatten(1, 2).contiguous()


def fold_pixels(x: Tensor, size: int) -> Tensor:
    """[B, T, H, W, C] -> [B, T, H/size, W/size, C*size*size]: channel, column and row in the block, row fastest."""
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return x.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)


def unfold_pixels(x: Tensor, size: int) -> Tensor:
    """The inverse of `fold_pixels`."""
    x = x.unflatten(-1, (-1, size, size))
    return x.permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3)
