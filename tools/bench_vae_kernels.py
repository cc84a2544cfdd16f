"""The kernels of tools/bench_vae.py one by one: right against plain torch in float32, and how fast with which tile."""

from __future__ import annotations

import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stages.kernels.vae_launch import WIDE_FROM, Kernels, Tile, choose_tile
from stages.models import vae_conv
from stages.models.vae_conv import Conv, Target, causal_conv, doubling_conv, narrow_conv, pad_vector, upsampling_conv
from stages.models.vae_frames import FramePool
from stages.models.vae_walk import Operations, TorchOperations

Log = Callable[[str], None]
BF16 = torch.bfloat16
DEVICE = torch.device("cuda")
TOLERANCE = 4e-3
"""Relative error of an output that is rounded to bfloat16, whose own rounding is 1.7e-3."""


class Case(NamedTuple):
    """A layer, and what its launch adds and stores. raw, norm, residual: see `Target`; pixels: to frames in float32."""

    layer: Conv
    residual: bool = False
    raw: bool = False
    norm: bool = False
    pixels: bool = False


def make(kind: str, channels_in: int, channels: int) -> Conv:
    generator = torch.Generator("cuda").manual_seed(channels_in * 1000 + channels)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    name = f"{kind} {channels_in}->{channels}"
    if kind == "causal":
        return causal_conv(
            name, noise(channels, channels_in, 3, 3, 3) / (27 * channels_in) ** 0.5, noise(channels), BF16
        )
    if kind == "narrow":
        return narrow_conv(
            name, noise(channels, channels_in, 3, 3, 3) / (27 * channels_in) ** 0.5, noise(channels), BF16
        )
    if kind == "point":
        weight = noise(channels, channels_in, 1, 1, 1) / channels_in**0.5
        return causal_conv(name, weight, noise(channels), BF16, offset=(1, 1))
    if kind == "double":
        weight = noise(2 * channels, channels_in, 3, 1, 1) / (3 * channels_in) ** 0.5
        return doubling_conv(name, weight, noise(2 * channels), BF16)
    if kind == "up":
        return upsampling_conv(
            name, noise(channels, channels_in, 3, 3) / (9 * channels_in) ** 0.5, noise(channels), BF16
        )
    if kind == "down":
        weight = noise(channels, channels_in, 1, 3, 3) / (9 * channels_in) ** 0.5
        return causal_conv(name, weight, noise(channels), BF16, offset=(1, 1), space_stride=2)
    assert kind == "halve", kind
    weight = noise(channels, channels_in, 3, 1, 1) / (3 * channels_in) ** 0.5
    return causal_conv(name, weight, noise(channels), BF16, offset=(1, 1), time_stride=2)


def cases() -> list[Case]:
    """Every launch of Wan2.1's encoder and decoder, and those of Wan2.2's of other widths."""
    return [
        Case(make("causal", 96, 96), norm=True),
        Case(make("causal", 96, 96), residual=True, raw=True, norm=True),
        Case(make("causal", 96, 96), residual=True, norm=True),
        Case(make("causal", 192, 192), norm=True),
        Case(make("causal", 192, 192), residual=True, raw=True, norm=True),
        Case(make("causal", 192, 192), residual=True, raw=True),
        Case(make("causal", 384, 384), raw=True),
        Case(make("causal", 384, 384), residual=True, raw=True),
        Case(make("causal", 192, 384), raw=True),
        Case(make("causal", 96, 192), norm=True),
        Case(make("causal", 16, 384), raw=True),
        Case(make("narrow", 96, 3), pixels=True),
        Case(make("causal", 48, 24), raw=True, norm=True),
        Case(make("point", 192, 384), raw=True),
        Case(make("double", 384, 384), raw=True),
        Case(make("up", 384, 192), raw=True, norm=True),
        Case(make("up", 192, 96), raw=True, norm=True),
        Case(make("down", 96, 96), raw=True, norm=True),
        Case(make("down", 384, 384), raw=True),
        Case(make("halve", 192, 192), raw=True, norm=True),
        Case(make("halve", 384, 384), raw=True),
        Case(make("causal", 16, 160), raw=True, norm=True),
        Case(make("causal", 160, 160), norm=True),
        Case(make("causal", 160, 160), residual=True, raw=True, norm=True),
        Case(make("down", 160, 160), residual=True, raw=True, norm=True),
        Case(make("causal", 320, 320), residual=True, raw=True),
        Case(make("causal", 640, 640), residual=True, raw=True),
        Case(make("causal", 256, 256), norm=True),
        Case(make("causal", 256, 256), residual=True, raw=True, norm=True),
        Case(make("causal", 512, 512), residual=True, raw=True),
        Case(make("causal", 1024, 1024), residual=True, raw=True),
        Case(make("up", 512, 512), residual=True, raw=True),
        Case(make("double", 1024, 1024), raw=True),
        Case(make("narrow", 256, 12), pixels=True),
    ]


def describe(case: Case) -> str:
    flags = [name for name in ("residual", "raw", "norm", "pixels") if getattr(case, name)]
    return f"{case.layer.name} {'+'.join(flags)}"


class Launch:
    """A case with memory: frames of height x width, `frames` of them after the history."""

    def __init__(self, case: Case, height: int, width: int, frames: int) -> None:
        layer, self.case = case.layer, case
        self.source = fill(FramePool(layer.channels_in, height, width, frames + 3, BF16, DEVICE), 1)
        self.slots = list(range(1, layer.taps[0] + frames))
        count = layer.frames_out(len(self.slots))
        size = {4: (2 * height, 2 * width)}.get(
            layer.phases, (height // layer.space_stride, width // layer.space_stride)
        )
        self.flops = 2.0 * len(layer.weight[0]) * layer.channels_in * layer.channels * count * size[0] * size[1]
        self.gamma = pad_vector(1 + 0.2 * torch.randn(layer.channels, device=DEVICE))
        self.pixels = torch.full((count, *size, layer.channels), torch.nan, device=DEVICE) if case.pixels else None
        self.target: Target | None = None
        if not case.pixels:
            pool = fill(FramePool(layer.channels, *size, 2 * count + 1, BF16, DEVICE), 2)
            residual = list(range(1, count + 1))
            normed = list(range(count + 1, 2 * count + 1))
            self.target = Target(
                pool, residual if case.residual else [], residual if case.raw else [], normed if case.norm else [],
                self.gamma,
            )  # fmt: skip

    def run(self, operations: Operations) -> None:
        if self.pixels is not None:
            operations.conv_to_pixels(self.case.layer, self.source, self.slots, self.pixels)
        else:
            assert self.target is not None
            operations.conv(self.case.layer, self.source, self.slots, self.target)

    def output(self) -> Tensor:
        """A copy of all that a run may have written, borders included."""
        return (self.pixels if self.target is None else self.target.pool.frames).float().clone()  # type: ignore[union-attr]


def fill(pool: FramePool, seed: int) -> FramePool:
    generator = torch.Generator("cuda").manual_seed(seed)
    for slot in range(1, len(pool.frames)):
        pixels = pool.pixels(slot)
        pixels.copy_(torch.randn(pixels.shape, generator=generator, device=DEVICE))
    return pool


def error_of(case: Case, kernels: Kernels) -> float:
    """Relative error on 3 frames of 20 x 36, whose last tile is ragged. Infinite where a border was touched."""
    ours, theirs = Launch(case, 20, 36, 3), Launch(case, 20, 36, 3)
    theirs.gamma.copy_(ours.gamma)
    ours.run(kernels)
    theirs.run(TorchOperations())
    got, expected = ours.output(), theirs.output()
    if ours.target is not None and any(got[:, i].any() or got[:, :, i].any() for i in (0, -1)):
        return float("inf")
    return float((got - expected).norm() / expected.norm())


def check_kernels(log: Log) -> None:
    """Every case with the tiles that are chosen for it on small and on large frames, and without TMA; then the norm."""
    kernels = {"": Kernels(True), " as on large frames": Kernels(True, wide_from=0), " without TMA": Kernels(False)}
    for case, (how, operations) in itertools.product(cases(), kernels.items()):
        began = time.perf_counter()
        try:
            error = error_of(case, operations)
        except Exception:
            log(f"FAIL kernel {describe(case)}{how}\n{traceback.format_exc()}")
            continue
        verdict = "ok  " if error < TOLERANCE else "FAIL"
        log(f"{verdict} kernel {describe(case)}{how}: error {error:.2e}, {time.perf_counter() - began:.1f} s")
    ours, theirs = (fill(FramePool(384, 20, 36, 5, BF16, DEVICE), 3) for _ in range(2))
    gamma = pad_vector(1 + 0.2 * torch.randn(384, device=DEVICE))
    Kernels(True).norm_silu(ours, [1, 2], gamma, [3, 2])
    vae_conv.norm_silu(theirs, [1, 2], gamma, [3, 2])
    error = float((ours.frames.float() - theirs.frames.float()).norm() / theirs.frames.float().norm())
    log(f"{'ok  ' if error < TOLERANCE else 'FAIL'} kernel norm 384: error {error:.2e}")


TILES: dict[str, list[Tile]] = {
    "causal 96->96": [
        Tile(256, 32, 8, 4, registers=128), Tile(256, 32, 8, 4, registers=128, frames_inside=True),
        Tile(128, 32, 4, 4), Tile(128, 32, 4, 4, frames_inside=True), Tile(128, 32, 4, 4, registers=128),
    ],
    "causal 192->192": [
        Tile(256, 64, 8, 3), Tile(128, 64, 8, 4), Tile(128, 64, 8, 4, frames_inside=True),
    ],
    "causal 384->384": [
        Tile(128, 64, 8, 3, n=(256, 128)), Tile(128, 64, 8, 3, n=(256, 128), frames_inside=True),
        Tile(128, 64, 8, 4, n=(128, 64)), Tile(128, 64, 8, 4),
    ],
    "causal 256->256": [
        Tile(128, 64, 8, 4), Tile(128, 64, 8, 3), Tile(128, 32, 8, 4), Tile(256, 64, 16, 3),
    ],
    "causal 512->512": [
        Tile(128, 64, 8, 4), Tile(128, 64, 8, 3, n=(256, 0)), Tile(128, 64, 8, 4, n=(256, 0)), Tile(256, 64, 8, 3),
    ],
    "causal 1024->1024": [
        Tile(128, 64, 8, 4), Tile(128, 64, 8, 3, n=(256, 0)), Tile(128, 64, 8, 4, n=(256, 0)), Tile(256, 64, 8, 3),
    ],
    "up 192->96": [Tile(256, 64, 8, 4), Tile(128, 32, 4, 4), Tile(128, 64, 4, 3)],
}  # fmt: skip
"""Ways to cut convolutions; what is not here is timed as it is cut."""

LEVELS = {
    96: [(480, 832, 4)], 192: [(240, 416, 4)], 384: [(120, 208, 2), (60, 104, 1)],
    160: [(352, 640, 4)], 320: [(176, 320, 4)], 640: [(88, 160, 2)],
    256: [(352, 640, 4)], 512: [(352, 640, 4), (176, 320, 4)], 1024: [(88, 160, 2), (44, 80, 1)],
}  # fmt: skip
"""Width -> height, width and frames of one latent frame: of Wan2.1's VAE at 480p, of Wan2.2's at 1280x704."""


def sweep_tiles(log: Log, width: int) -> None:
    """The convolutions that read a width, each way to cut them: right, and how fast."""
    for case, (height, columns, frames) in itertools.product(cases(), LEVELS[width]):
        if case.layer.channels_in != width:
            continue
        launch = Launch(case, height, columns, frames)
        chosen = choose_tile(case.layer, True, residual=case.residual, wide=height * columns >= WIDE_FROM)
        for tile in TILES.get(case.layer.name, [chosen]):
            time_tile(log, launch, tile, f"{height}x{columns}x{frames}, {'chosen' if tile == chosen else 'other'}")


def time_tile(log: Log, launch: Launch, tile: Tile, note: str) -> None:
    """One line: speed, error, and the time of the first launch, compilation included."""
    what = f"tile {describe(launch.case)} {brief(tile)} ({note})"
    kernels = Kernels(True, tiles={launch.case.layer.name: tile})
    try:
        began = time.perf_counter()
        launch.run(kernels)
        torch.cuda.synchronize()
        began = time.perf_counter() - began
        error = error_of(launch.case, kernels)
        seconds = median_seconds(lambda: launch.run(kernels))
    except Exception as broken:
        log(f"FAIL {what}: {type(broken).__name__}: {str(broken)[:200]}")
        return
    verdict = "" if error < TOLERANCE else ", FAIL"
    rate = f"{launch.flops / seconds / 1e12:.0f} TFLOP/s, {seconds * 1e3:.3f} ms"
    log(f"{what}: {rate}, error {error:.1e}{verdict}, first {began:.1f} s")


def brief(tile: Tile) -> str:
    n = f" n{tile.n[0]}+{tile.n[1]}" if tile.n else ""
    limit = f" r{tile.registers}" if tile.registers else ""
    limit += " frames inside" if tile.frames_inside else ""
    return f"m{tile.m}{n} k{tile.k} w{tile.warps} s{tile.stages}{limit}{'' if tile.tma else ' no TMA'}"


def median_seconds(run: Callable[[], None], rounds: int = 20) -> float:
    """By CUDA events, after 3 rounds."""
    times = []
    for i in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
