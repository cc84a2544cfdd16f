"""The convolutions of the VAEs on frame pools, in plain torch: the specification of `stages/kernels/vae_conv.py`.

All of them are one operation, `Conv`: sums over taps (frame, row, column) of matrix products of shifted frames, then a
bias, a residual, and RMS norm with SiLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.models.vae_frames import FramePool

NORM_EPS = 1e-24
"""As in `RmsNorm`."""


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution's packed weights and the way in which it walks over its input.

    Output pixel (i, j) of frame t is the sum over taps (kt, kh, kw) of the input at frame `time_stride * t + kt`, row
    `space_stride * i + offset[0] + kh`, column `space_stride * j + offset[1] + kw`, counted from the border's corner.
    """

    name: str
    taps: tuple[int, int, int]
    channels_in: int
    channels: int
    """Of an output frame."""
    weight: Tensor
    """[groups, taps, padded channels_in, padded channels]; zeros where padded. Groups: see `phases` and `halves`."""
    bias: Tensor
    """[halves, padded channels], float32."""
    offset: tuple[int, int] = (0, 0)
    time_stride: int = 1
    space_stride: int = 1
    phases: int = 1
    """4: nearest 2x upsampling and a 3x3 convolution in one. Group 2a + b makes output pixels (2i + a, 2j + b) of 2x2
    taps at offset (a, b)."""
    halves: int = 1
    """2: each frame becomes two, group 0 makes the first and group 1 the second."""

    def frames_out(self, frames_in: int) -> int:
        """Output frames of so many input frames, history included."""
        return ((frames_in - self.taps[0]) // self.time_stride + 1) * self.halves


@dataclass(frozen=True, slots=True)
class Target:
    """Where the output of a convolution goes. Lists of slots are of one pool, and empty or of one slot per frame."""

    pool: FramePool
    residual: list[int]
    """Added to the output."""
    raw: list[int]
    """Gets the output; may be `residual`."""
    normed: list[int]
    """Gets silu(rms_norm(output) * gamma)."""
    gamma: Tensor | None = None
    """[padded channels] float32."""
    origin: tuple[int, int] = (0, 0)
    """Row and column of the source at which the walk over it begins: a convolution into a pool of smaller frames sees
    a part of the source, and what is around that."""


def split_width(width: int, limit: int = 256) -> tuple[int, int]:
    """A width as the sum of two powers of two that is the least at or above it, the second 0 or at least 16; widths
    over `limit` in steps of 128."""
    if width > limit:
        return 128, 0
    first = 16
    while 2 * first <= width:
        first *= 2
    second = 0 if width <= first else 16
    while 0 < second < width - first:
        second *= 2
    return (2 * first, 0) if second == first else (first, second)


def padded_width(width: int) -> int:
    """The least multiple of the tile of `split_width` that holds a width."""
    step = sum(split_width(width))
    return -(-width // step) * step


def pack_weight(groups: list[Tensor]) -> Tensor:
    """Kernels [C_out, C_in, kt, kh, kw], one per group -> [groups, taps, padded C_in, padded C_out]."""
    channels, channels_in = groups[0].shape[:2]
    weight = torch.stack([kernel.flatten(2).permute(2, 1, 0) for kernel in groups])
    return F.pad(weight, (0, padded_width(channels) - channels, 0, padded_width(channels_in) - channels_in))


def pad_vector(values: Tensor) -> Tensor:
    """[..., C] -> [..., padded C] float32, in memory of its own."""
    return F.pad(values.float(), (0, padded_width(values.shape[-1]) - values.shape[-1])).clone()


def causal_conv(name: str, weight: Tensor, bias: Tensor, dtype: torch.dtype, **fields: Any) -> Conv:
    """A convolution whose kernel is `weight` [C_out, C_in, kt, kh, kw]; `fields` of `Conv` differ from the defaults."""
    channels, channels_in, *taps = weight.shape
    return Conv(
        name, (taps[0], taps[1], taps[2]), channels_in, channels, pack_weight([weight.float()]).to(dtype).contiguous(),
        pad_vector(bias[None]), **fields,
    )  # fmt: skip


def doubling_conv(name: str, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Conv:
    """Kernel [2C, C, 3, 1, 1]: the halves of its output channels are frames 2t and 2t + 1."""
    packed = pack_weight(list(weight.float().chunk(2))).to(dtype).contiguous()
    return Conv(
        name, (3, 1, 1), weight.shape[1], len(weight) // 2, packed, pad_vector(bias.view(2, -1)), offset=(1, 1),
        halves=2,
    )  # fmt: skip


def upsampling_conv(name: str, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Conv:
    """Nearest 2x upsampling and then the kernel [C_out, C_in, 3, 3] with padding 1.

    Pixels of an upsampled block are equal, so the taps that fall into one block are one tap whose weight is their sum:
    four kernels of 2x2, one per position in the block, and 4 taps in place of 9.
    """
    groups = []
    for a in range(2):
        rows = _fold_taps(weight.float(), 2, a)
        groups += [_fold_taps(rows, 3, b)[:, :, None] for b in range(2)]
    return Conv(
        name, (1, 2, 2), weight.shape[1], len(weight), pack_weight(groups).to(dtype).contiguous(),
        pad_vector(bias[None]), phases=4,
    )  # fmt: skip


def narrow_conv(name: str, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Conv:
    """The kernel [C, C_in, 3, 3, 3] for few output channels, as one of a single column and 3C channels, which are what
    the taps of each column add: channel `C * kw + c`. `sum_columns` adds them up.

    It reads a third of the input: for 96 -> 3 channels that is what limits the speed, not the sums.
    """
    columns = weight.permute(4, 0, 1, 2, 3).flatten(0, 1).unsqueeze(-1)
    zeros = torch.zeros_like(bias)
    return causal_conv(name, columns, torch.cat((zeros, bias, zeros)), dtype, offset=(0, 1))


def sum_columns(parts: Tensor, pixels: Tensor) -> None:
    """What a `narrow_conv` gave, [T, H, W, 3C] float32, into `pixels` [T, H, W, C]. Columns beyond the edges are
    zeros."""
    left, centre, right = parts.chunk(3, dim=-1)
    pixels.copy_(centre)
    pixels[:, :, 1:] += left[:, :, :-1]
    pixels[:, :, :-1] += right[:, :, 1:]


def _fold_taps(weight: Tensor, dim: int, phase: int) -> Tensor:
    """Three taps along `dim` -> the two of one phase."""
    w0, w1, w2 = weight.unbind(dim)
    return torch.stack((w0, w1 + w2) if phase == 0 else (w0 + w1, w2), dim)


def conv(layer: Conv, source: FramePool, slots: list[int], target: Target) -> None:
    """`layer` over the frames in `slots` of `source`, history included, into `target`. Sums in float32."""
    height, width = (target.pool.height, target.pool.width)
    scale = 2 if layer.phases == 4 else 1
    for t in range(layer.frames_out(len(slots))):
        y = torch.empty(height, width, layer.channels, device=source.frames.device)
        for phase in range(layer.phases):
            a, b = divmod(phase, 2)
            view = y[a::scale, b::scale]
            view.copy_(_sum_of_taps(layer, source, slots, t, phase, view.shape[0], view.shape[1], target.origin))
        _finish(y, target, t)


def conv_to_pixels(layer: Conv, source: FramePool, slots: list[int], pixels: Tensor) -> None:
    """`layer` over the frames in `slots` of `source` into `pixels` [T, H, W, C] float32."""
    for t in range(layer.frames_out(len(slots))):
        pixels[t] = _sum_of_taps(layer, source, slots, t, 0, *pixels.shape[1:3])


def norm_silu(pool: FramePool, slots: list[int], gamma: Tensor, into: list[int]) -> None:
    """silu(rms_norm(frame) * gamma) of each frame in `slots` into the slot of `into`, which may be the same."""
    for slot, out in zip(slots, into, strict=True):
        pool.pixels(out).copy_(_norm_silu(pool.pixels(slot).float(), gamma))


def _sum_of_taps(
    layer: Conv, source: FramePool, slots: list[int], t: int, phase: int, height: int, width: int,
    origin: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    half = t % layer.halves
    first = t // layer.halves * layer.time_stride
    down, right = divmod(phase, 2) if layer.phases == 4 else layer.offset
    down, right = down + origin[0], right + origin[1]
    step = layer.space_stride
    total = layer.bias[half, : layer.channels].expand(height, width, -1)
    taps = layer.weight[phase + half, :, : layer.channels_in, : layer.channels].float()
    for tap, weight in enumerate(taps):
        kt, kh, kw = tap // (layer.taps[1] * layer.taps[2]), tap // layer.taps[2] % layer.taps[1], tap % layer.taps[2]
        rows = slice(down + kh, down + kh + step * (height - 1) + 1, step)
        columns = slice(right + kw, right + kw + step * (width - 1) + 1, step)
        total = total + source.frames[slots[first + kt], rows, columns, : layer.channels_in].float() @ weight
    return total


def _finish(y: Tensor, target: Target, t: int) -> None:
    """y [H, W, C] float32."""
    if target.residual:
        y = y + target.pool.pixels(target.residual[t]).float()
    if target.raw:
        target.pool.pixels(target.raw[t]).copy_(y)
    if target.normed:
        assert target.gamma is not None
        target.pool.pixels(target.normed[t]).copy_(_norm_silu(y, target.gamma))


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.rms_norm(x, x.shape[-1:], gamma[: x.shape[-1]], eps=NORM_EPS))
