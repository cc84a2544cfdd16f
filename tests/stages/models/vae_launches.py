"""Launches of the VAE's kernels beside plain torch, which `test_vae_kernels.py` compares.

Run as a program, prints the relative error of every kind of convolution with TMA and without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.models.vae_conv import Conv, Target, causal_conv, doubling_conv, narrow_conv, pad_vector, upsampling_conv
from stages.models.vae_frames import FramePool
from stages.models.vae_walk import Operations, TorchOperations

KINDS = ("causal", "wide", "narrow", "point", "double", "up", "part", "down", "halve", "pixels", "columns", "norm")
ON_GPU = (*KINDS, "large", "largest", "of 2.2")
"""And widths that take Triton's interpreter long, as on small frames and as on large ones."""
HEIGHT, WIDTH, SLOTS = 8, 16, [0, 4, 2, 1]


def make(kind: str, dtype: torch.dtype, device: torch.device) -> Conv:
    """A layer of 48 channels, which are two tiles, or what the kind wants."""

    def noise(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).to(device)
        return values / values[0].numel() ** 0.5 if len(shape) > 1 else values

    match kind:
        case "wide":
            return causal_conv(kind, noise(384, 16, 3, 3, 3), noise(384), dtype)
        case "large" | "largest":
            return causal_conv(kind, noise(384, 64, 3, 3, 3), noise(384), dtype)
        case "narrow":
            return causal_conv(kind, noise(8, 24, 3, 3, 3), noise(8), dtype)
        case "point":
            return causal_conv(kind, noise(48, 16, 1, 1, 1), noise(48), dtype, offset=(1, 1))
        case "double":
            return doubling_conv(kind, noise(96, 16, 3, 1, 1), noise(96), dtype)
        case "of 2.2":
            return causal_conv(kind, noise(256, 256, 3, 3, 3), noise(256), dtype)
        case "up" | "part":
            return upsampling_conv(kind, noise(48, 16, 3, 3), noise(48), dtype)
        case "down":
            return causal_conv(kind, noise(48, 16, 1, 3, 3), noise(48), dtype, offset=(1, 1), space_stride=2)
        case "halve":
            return causal_conv(kind, noise(48, 16, 3, 1, 1), noise(48), dtype, offset=(1, 1), time_stride=2)
        case "pixels":
            return causal_conv(kind, noise(3, 48, 3, 3, 3), noise(3), dtype)
        case "columns":
            return narrow_conv(kind, noise(12, 32, 3, 3, 3), noise(12), dtype)
        case _:
            return causal_conv(kind, noise(48, 32, 3, 3, 3), noise(48), dtype)


def fill(pool: FramePool, seed: int) -> FramePool:
    generator = torch.Generator().manual_seed(seed)
    for slot in range(1, len(pool.frames)):
        pool.pixels(slot).copy_(torch.randn(pool.pixels(slot).shape, generator=generator))
    return pool


def launch(kind: str, operations: Operations, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All that a launch may write, borders included: residual in place, the sum and its norm."""
    layer = make(kind, dtype, device)
    source = fill(FramePool(layer.channels_in, HEIGHT, WIDTH, 5, dtype, device), 1)
    gamma = pad_vector(torch.randn(layer.channels, generator=torch.Generator().manual_seed(3)).to(device))
    slots = SLOTS[:3] if kind == "halve" else SLOTS
    count = layer.frames_out(len(slots))
    if kind in ("pixels", "columns"):
        pixels = torch.full((count, HEIGHT, WIDTH, layer.channels), torch.nan, device=device)
        operations.conv_to_pixels(layer, source, slots, pixels)
        return pixels
    scale = 2.0 if layer.phases == 4 else 1 / layer.space_stride
    # Of a part of the source, rows 3 to 6 and columns 5 to 13.
    height, width, origin = (8, 18, (3, 5)) if kind == "part" else (int(HEIGHT * scale), int(WIDTH * scale), (0, 0))
    pool = fill(FramePool(layer.channels, height, width, 2 * count + 1, dtype, device), 2)
    sums, normed = list(range(1, count + 1)), list(range(count + 1, 2 * count + 1))
    if kind == "norm":
        operations.norm_silu(pool, sums, gamma, normed)
    elif kind in ("wide", "large", "largest"):
        operations.conv(layer, source, slots, Target(pool, [], sums, []))
    else:
        operations.conv(layer, source, slots, Target(pool, sums, sums, normed, gamma, origin))
    return pool.frames


def error_of(kind: str, tma: bool, device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of the kernels against plain torch."""
    from stages.kernels.vae_launch import Kernels

    kernels = Kernels(tma, wide_from=0) if kind == "largest" else Kernels(tma)
    got = launch(kind, kernels, device, dtype).double()
    expected = launch(kind, TorchOperations(), device, dtype).double()
    return float((got - expected).norm() / expected.norm())


if __name__ == "__main__":
    for name in KINDS:
        for with_tma in (True, False):
            print(name, with_tma, error_of(name, with_tma, torch.device("cpu"), torch.float32))
