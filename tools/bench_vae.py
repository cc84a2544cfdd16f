"""A VAE on a GPU against Diffusers' in bfloat16, in one process: speed, memory, and error against float32.

    python -m tools.bench_vae --parts decode encode quality --sizes 480p 720p --out docs/results/vae.txt
    python -m tools.bench_vae --parts tiled tiled-encode --sizes 480p 720p --out docs/results/vae-tiled.txt
    python -m tools.bench_vae --model wan2.2-ti2v-5b --parts decode encode tiled tiled-encode --sizes 704p
    python -m tools.bench_vae --parts kernels tiles --widths 96 192 384 256 512 1024

Parts: `decode` and `encode`, 81 frames with the same random weights: peak memory of each alone in the process, error
against float32 at 480p, then seconds in turns; `quality`, PSNR against float32 of scenes that the demo model's VAE and
random weights have encoded, and of noise; `tiled`, decoding in tiles as from memory level 1 on: peak memory, how far
the frames are from untiled ones, seconds in turns with untiled and Diffusers'; `tiled-encode`, likewise; `kernels`,
each kernel on small frames against plain torch in float32; `tiles`, TFLOP/s of the convolutions of one latent frame
for several ways to cut them. Lines come as they are measured, and go to --out, too. Checks say `ok` or `FAIL`; the
exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.models import load_model
from hotreload.checkpoint import open_checkpoint
from hotreload.weights import load_weights
from ipc.architecture import VaeConfig
from stages.models.vae import WanVae
from stages.models.vae_check import random_vae
from stages.vae_clips import to_frames
from tools.bench_vae_kernels import LEVELS, check_kernels, sweep_tiles
from tools.bench_vae_variants import (
    CUDA,
    Variant,
    our_decode,
    our_encode,
    our_encode_tiles,
    our_tiles,
    their_decode,
    their_encode,
)
from tools.demo_scenes import render, sample_scenes
from tools.gpu_timing import Card, Timing, in_turns, machine_lines

SIZES = {"480p": (480, 832), "720p": (720, 1280), "704p": (704, 1280)}
FRAMES = 81
MUST_RATIO = 3.0
"""Seconds of Diffusers' decoding over ours."""
MUST_PEAK = {"480p": 4.9, "720p": 10.7}
"""GiB, of decoding alone; of Wan2.1's."""
MUST_PEAK_TILED = 2.0
"""GiB, of decoding alone in tiles; of Wan2.1's."""
MUST_BE_EQUAL = 0.9999
"""Of uint8 values in tiles and untiled; none is more than 1 apart."""
MUST_PSNR = 50.0
MAKERS: Mapping[str, Mapping[str, Callable[[WanVae, Tensor], Variant]]] = {
    "decode": {"Diffusers": their_decode, "ours": our_decode},
    "encode": {"Diffusers": their_encode, "ours": our_encode},
}


class Setup(NamedTuple):
    """What every part is given."""

    say: Callable[[str], None]
    check: Callable[[bool, str], None]
    card: Card
    rounds: int
    model: str


def full_vae(model: str) -> WanVae:
    """A model's at full size with random weights, float32 on the CPU."""
    return random_vae(load_model(model).vae, CUDA).cpu()


def demo_vae() -> WanVae:
    """The demo model's trained VAE, float32 on the CPU."""
    with torch.device("meta"):
        vae = WanVae(load_model("wan-demo").vae)
    found = open_checkpoint(Path("configs/demo"), ("vae",)).components["vae"]
    load_weights(vae, found, device="cpu", dtype=lambda name: torch.float32)
    return vae


def clip_of(part: str, size: str, config: VaeConfig) -> Tensor:
    """What is decoded, [1, z, 21, h, w], or encoded, [1, 3, 81, H, W] in [-1, 1]: noise, float32 on the GPU."""
    height, width = SIZES[size]
    generator = torch.Generator(CUDA).manual_seed(1)
    if part == "encode":
        return torch.rand(1, 3, FRAMES, height, width, generator=generator, device=CUDA) * 2 - 1
    latents = (FRAMES - 1) // config.temporal_stride + 1
    shape = (1, config.z_dim, latents, height // config.spatial_stride, width // config.spatial_stride)
    return torch.randn(shape, generator=generator, device=CUDA)


def compare(setup: Setup, part: str, size: str) -> None:
    """Ours and Diffusers', each alone, then in turns."""
    vae = full_vae(setup.model)
    data = clip_of(part, size, vae.config)
    expected = exact(vae, data, part) if size == "480p" else None
    peaks = {name: alone(setup, f"{part} {size} {name}", make, vae, data) for name, make in MAKERS[part].items()}
    variants = {name: make(vae, data) for name, make in MAKERS[part].items()}
    if expected is not None:
        judge_error(setup, f"{part} {size}", variants, expected)
    timed = told_in_turns(setup, f"{part} {size}", variants)
    ratio = timed["Diffusers"].median / timed["ours"].median
    what = f"{part} {size}, {FRAMES} frames: {ratio:.2f}x as fast as Diffusers, peak {peaks['ours']:.2f} GiB alone, "
    what += f"Diffusers' {peaks['Diffusers']:.2f}"
    if part == "decode" and size in MUST_PEAK:
        must = f"must {MUST_RATIO}x in {MUST_PEAK[size]} GiB"
        setup.check(ratio >= MUST_RATIO and peaks["ours"] <= MUST_PEAK[size], f"{what}; {must}")
    else:
        setup.say(what)


def told_in_turns(setup: Setup, label: str, variants: Mapping[str, Variant]) -> dict[str, Timing]:
    """Each variant's time."""
    runs = {name: lambda v=variant: v.run(False) for name, variant in variants.items()}  # type: ignore[misc]
    timed = in_turns(setup.card, runs, setup.rounds, "cuda", warm=2.0)
    for name, timing in timed.items():
        setup.say(f"{label} {name}: {seconds(timing)}")
    return timed


def compare_tiled(setup: Setup, size: str) -> None:
    """In tiles, untiled and Diffusers': peak of each alone, frames in tiles against untiled ones, seconds in turns."""
    vae = full_vae(setup.model)
    data = clip_of("decode", size, vae.config)
    makers = {"tiled": our_tiles, "untiled": our_decode, "Diffusers": their_decode}
    peaks = {name: alone(setup, f"tiled {size} {name}", make, vae, data) for name, make in makers.items()}
    variants = {name: make(vae, data) for name, make in makers.items()}
    frames = [variants[name].run(True) for name in ("tiled", "untiled")]
    assert frames[0] is not None and frames[1] is not None
    apart = torch.cat([(to_frames(a).int() - to_frames(b).int()).abs().flatten() for a, b in zip(
        frames[0].split(4, dim=2), frames[1].split(4, dim=2), strict=True)])  # fmt: skip
    share, most = float((apart == 0).float().mean()), int(apart.max())
    what = f"tiled {size}: {share:.4%} of values are those of untiled, the others at most {most} of 255 off; "
    what += f"floats {'equal' if torch.equal(*frames) else 'not equal'} bit for bit"
    setup.check(share >= MUST_BE_EQUAL and most <= 1, what)
    del frames, apart
    timed = told_in_turns(setup, f"tiled {size}", variants)
    ratio = timed["Diffusers"].median / timed["tiled"].median
    what = f"tiled {size}, {FRAMES} frames: {ratio:.2f}x as fast as Diffusers, {peaks['tiled']:.2f} GiB alone"
    what += f" ({timed['untiled'].median / timed['tiled'].median:.2f}x untiled, {peaks['untiled']:.2f} GiB)"
    if size in MUST_PEAK:
        setup.check(ratio >= 1 and peaks["tiled"] <= MUST_PEAK_TILED, f"{what}; must 1x in {MUST_PEAK_TILED} GiB")
    else:
        setup.say(what)


def compare_tiled_encode(setup: Setup, size: str) -> None:
    """In tiles and untiled: peak of each alone, without the frames for tiles, which are in host memory; latents in
    tiles against untiled ones; seconds in turns."""
    vae = full_vae(setup.model)
    data = clip_of("encode", size, vae.config)
    makers = {"tiled": our_encode_tiles, "untiled": our_encode}
    peaks = {name: alone(setup, f"tiled-encode {size} {name}", make, vae, data) for name, make in makers.items()}
    variants = {name: make(vae, data) for name, make in makers.items()}
    latents = [variants[name].run(True) for name in makers]
    assert latents[0] is not None and latents[1] is not None
    what = f"tiled-encode {size}: {relative(*latents):.2e} from untiled"
    setup.check(relative(*latents) <= 1e-3, f"{what}, {'equal' if torch.equal(*latents) else 'not equal'} bit for bit")
    runs = {name: lambda v=variant: v.run(False) for name, variant in variants.items()}  # type: ignore[misc]
    for name, timing in in_turns(setup.card, runs, setup.rounds, "cuda", warm=2.0).items():
        held = data.nbytes / 2**30 if name == "tiled" else 0.0
        setup.say(f"tiled-encode {size} {name}: {seconds(timing)}, peak {peaks[name] - held:.2f} GiB alone")


def alone(
    setup: Setup, what: str, make: Callable[[WanVae, Tensor], Variant], vae: WanVae, data: Tensor
) -> float:  # fmt: skip
    """Peak GiB of torch's allocator while nothing but this variant and its input is on the GPU: measured, and said."""
    clear()
    begin = torch.cuda.memory_allocated()
    variant = make(vae, data)
    clear()
    loaded = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    variant.run(False)
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated()
    parts = f"input {gib(begin)}, weights {gib(loaded - begin)}, work {gib(peak - loaded)}"
    setup.say(f"{what}: peak alone {gib(peak)} GiB = {parts}; first call {took:.1f} s, with what it compiles")
    return peak / 2**30


def clear() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def seconds(timing: Timing) -> str:
    """As a `Timing` shows itself, in seconds."""
    held = "" if timing.mhz is None else f" at {timing.mhz:.0f} MHz, {timing.watts:.0f} W"
    return f"{timing.median / 1e3:.3f} s ({timing.least / 1e3:.3f} to {timing.most / 1e3:.3f}){held}"


def judge_error(setup: Setup, what: str, variants: Mapping[str, Variant], expected: Tensor) -> None:
    """Distance from float32; ours is at most Diffusers', and the same bytes when called again."""
    errors = {}
    for name, variant in variants.items():
        output = variant.run(True)
        assert output is not None
        errors[name] = relative(output, expected)
        decibels = f", PSNR {psnr(output, expected):.1f} dB" if what.startswith("decode") else ""
        setup.say(f"{what} {name}: {errors[name]:.2e} from float32{decibels}")
        if name == "ours":
            again = variant.run(True)
            assert again is not None
            setup.check(torch.equal(again, output), f"{what}: the same bytes when called again")
            if decibels:
                setup.check(psnr(output, expected) >= MUST_PSNR, f"{what}: PSNR{decibels[6:]}, must {MUST_PSNR:.0f}")
    setup.check(errors["ours"] <= errors["Diffusers"], f"{what}: nearer to float32 than Diffusers")


def exact(vae: WanVae, data: Tensor, part: str) -> Tensor:
    """`WanVae` in float32 on the GPU, in chunks; on the CPU."""
    vae = vae.to(CUDA)
    cache: dict[str, Tensor] = {}
    if part == "decode":
        chunks = [vae.decode_chunk(chunk, cache).cpu() for chunk in data.split(1, dim=2)]
    else:
        frames = (data[:, :, :1], *data[:, :, 1:].split(4, dim=2))
        chunks = [vae.encode_chunk(chunk, cache).cpu() for chunk in frames]
    vae.cpu()
    return torch.cat(chunks, dim=2)


def psnr(got: Tensor, expected: Tensor) -> float:
    """Of values in [-1, 1], dB."""
    error = (got.clamp(-1, 1) - expected.clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / error))


def relative(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got - expected).norm() / expected.norm())


def measure_quality(setup: Setup, name: str) -> None:
    """PSNR of ours against float32, of what the VAE has encoded and of noise."""
    vae = demo_vae() if name == "demo" else full_vae(setup.model)
    generator = torch.Generator().manual_seed(2)
    scenes = render(sample_scenes(1, generator)).to(CUDA)
    clips = {
        "encoded scenes": exact(vae, scenes, "encode").to(CUDA),
        "noise": torch.randn(1, vae.config.z_dim, 5, 12, 12, generator=generator).to(CUDA),
    }
    for kind, latents in clips.items():
        expected, got = exact(vae, latents, "decode"), our_decode(vae, latents).run(True)
        assert got is not None
        decibels = psnr(got, expected)
        what = f"quality {name}, {kind}: PSNR {decibels:.1f} dB, {relative(got, expected):.2e} from float32"
        if (name, kind) == ("demo", "noise"):  # which is nothing that it was trained to decode
            setup.say(what)
        else:
            setup.check(decibels >= MUST_PSNR, f"{what}, must {MUST_PSNR:.0f}")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("decode", "encode", "quality", "tiled", "tiled-encode", "kernels", "tiles"),
        required=True,
    )
    parser.add_argument("--model", choices=("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"), default="wan2.1-t2v-1.3b")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["480p"])
    parser.add_argument("--widths", nargs="+", type=int, choices=list(LEVELS), default=[96, 192, 384])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    failed: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        if line.startswith("FAIL"):
            failed.append(line)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(line.rstrip() + "\n")

    def check(passed: bool, what: str) -> None:
        say(f"{'ok  ' if passed else 'FAIL'} {what}")

    say(f"$ python -m tools.bench_vae {' '.join(sys.argv[1:])}")
    for line in machine_lines("cuda", "triton", "diffusers"):
        say(line)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with Card("cuda") as card:
        setup = Setup(say, check, card, args.rounds, args.model)
        parts: dict[str, Callable[[], None]] = {}
        for part in args.parts:
            if part in MAKERS:
                for size in args.sizes:
                    parts[f"{part} {size}"] = lambda part=part, size=size: compare(setup, part, size)  # type: ignore[misc]
            elif part == "tiled":
                for size in args.sizes:
                    parts[f"tiled {size}"] = lambda size=size: compare_tiled(setup, size)  # type: ignore[misc]
            elif part == "tiled-encode":
                for size in args.sizes:
                    parts[f"{part} {size}"] = lambda size=size: compare_tiled_encode(setup, size)  # type: ignore[misc]
            elif part == "quality":
                for name in ("demo", "random"):
                    parts[f"quality {name}"] = lambda name=name: measure_quality(setup, name)  # type: ignore[misc]
            elif part == "kernels":
                parts[part] = lambda: check_kernels(say)
            else:
                for width in args.widths:
                    parts[f"tiles {width}"] = lambda width=width: sweep_tiles(say, width)  # type: ignore[misc]
        for name, run in parts.items():
            began = time.perf_counter()
            try:
                run()
            except Exception as problem:
                traceback.print_exc()
                check(False, f"{name}: {type(problem).__name__}: {str(problem)[:300]}")
            clear()
            say(f"{name}: {time.perf_counter() - began:.0f} s")
    say(f"{len(failed)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
