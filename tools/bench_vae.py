"""Wan2.1's VAE on a GPU: kernels against float32, their speed, and decode and encode against Diffusers.

    python tools/bench_vae.py --parts kernels
    python tools/bench_vae.py --parts tiles --widths 96 192
    python tools/bench_vae.py --parts decode --sizes 480p 720p --out docs/results/vae-decode.txt
    python tools/bench_vae.py --parts quality

Parts: `kernels`, each kernel on small frames against plain torch in float32; `tiles`, TFLOP/s of the convolutions of
one latent frame at 480p for several ways to cut them; `decode` and `encode`, 81 frames against Diffusers'
AutoencoderKLWan in bfloat16 with the same random weights, variants in turns, CUDA events, medians; `quality`, PSNR of
bfloat16 against float32 on the demo model's VAE and on random weights. Every line is printed when it is known; what
fails prints its traceback and the rest goes on.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from engine.models import load_model
from hotreload.checkpoint import open_checkpoint
from hotreload.weights import load_weights
from stages.models.vae import WanVae
from tools.bench_vae_kernels import check_kernels, sweep_tiles
from tools.bench_vae_variants import Run, fast_decode, make_variants

SIZES = {"480p": (480, 832), "720p": (720, 1280), "small": (128, 160)}
GROUPS = {"4444": (4, 4, 4, 4), "1244": (1, 2, 4, 4), "1242": (1, 2, 4, 2), "4442": (4, 4, 4, 2)}
PARTS = ("kernels", "tiles", "decode", "encode", "quality")


class Log:
    """Lines to the terminal, and to a file if there is one, as they come."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = path.open("a") if path else None

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        if self._file is not None:
            print(line, file=self._file, flush=True)

    def attempt(self, what: str, run: Callable[[], None]) -> None:
        """Run it; if it fails, print why and go on."""
        try:
            run()
        except Exception:
            self(f"FAILED {what}\n{traceback.format_exc()}")
            torch.cuda.empty_cache()


def main() -> None:
    arguments = parse()
    log = Log(arguments.out)
    log(describe(sys.argv[1:]))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        if "kernels" in arguments.parts:
            log.attempt("kernels", lambda: check_kernels(log))
        if "tiles" in arguments.parts:
            for width in arguments.widths:
                log.attempt(f"tiles {width}", lambda width=width: sweep_tiles(log, width))  # type: ignore[misc]
        for size in arguments.sizes:
            for part in ("decode", "encode"):
                if part in arguments.parts:
                    log.attempt(
                        f"{part} {size}",
                        lambda part=part, size=size: compare(log, arguments, part, size),  # type: ignore[misc]
                    )
        if "quality" in arguments.parts:
            for name in ("demo", "random"):
                log.attempt(f"quality {name}", lambda name=name: measure_quality(log, name))  # type: ignore[misc]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["kernels", "decode"])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["480p"])
    parser.add_argument("--widths", nargs="+", type=int, choices=(96, 192, 384), default=[96, 192, 384])
    parser.add_argument("--frames", type=int, default=81, help="4n + 1")
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 4], help="latent frames per call")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=["4444", "1242"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-diffusers", action="store_true", help="without the comparison")
    parser.add_argument("--no-reference", action="store_true", help="without the error against float32")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def describe(arguments: list[str]) -> str:
    """The machine, the versions and the command."""
    import triton

    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.draw", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return (
        f"# {gpu}; torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}\n"
        f"# python tools/bench_vae.py {' '.join(arguments)}"
    )


def clock() -> str:
    """SM clock and power now."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def random_vae(seed: int = 0) -> WanVae:
    """Wan2.1's VAE at full size on the GPU in float32, with random weights that keep activations near 1."""
    with torch.device("meta"):
        vae = WanVae(load_model("wan2.1-t2v-1.3b").vae)
    vae = vae.to_empty(device="cuda").requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cuda")
        if "norm" in name:
            parameter.copy_(1.0 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    vae.decoder.conv_out.weight.mul_(0.35)  # Pixels within [-1, 1]: the clamp would hide errors.
    return vae


def demo_vae() -> WanVae:
    """The demo model's trained VAE on the GPU in float32."""
    with torch.device("meta"):
        vae = WanVae(load_model("wan-demo").vae)
    found = open_checkpoint(Path("configs/demo"), ("vae",)).components["vae"]
    load_weights(vae, found, device="cuda", dtype=lambda name: torch.float32)
    return vae


def diffusers_vae(vae: WanVae) -> nn.Module:
    """Diffusers' with the same weights, in bfloat16."""
    from diffusers import AutoencoderKLWan

    config = vae.config
    with torch.device("cuda"):
        model = AutoencoderKLWan(
            base_dim=config.base_dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks, temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.latents_mean), latents_std=list(config.latents_std),
        )  # fmt: skip
    model.load_state_dict(vae.state_dict(), strict=True)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by CUDA events, and the peak of the memory that is allocated, GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() / 2**30


def psnr(got: Tensor, expected: Tensor) -> float:
    """Of values in [-1, 1], dB."""
    error = (got.float().clamp(-1, 1) - expected.clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / error))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def compare(log: Log, arguments: argparse.Namespace, part: str, size: str) -> None:
    """One size, all variants in turns. Memory is the whole process's, with the float32 weights (0.47 GiB) of ours and
    the bfloat16 weights of both."""
    vae = random_vae()
    height, width = SIZES[size]
    generator = torch.Generator("cuda").manual_seed(1)
    if part == "decode":
        shape = (1, vae.config.z_dim, (arguments.frames + 3) // 4, height // 8, width // 8)
        data = torch.randn(shape, generator=generator, device="cuda")
    else:
        data = torch.rand(1, 3, arguments.frames, height, width, generator=generator, device="cuda") * 2 - 1
    theirs: nn.Module | None = None
    if not arguments.no_diffusers:
        try:
            theirs = diffusers_vae(vae)
        except Exception:
            log(f"FAILED {part} {size} diffusers\n{traceback.format_exc()}")
    groups = {name: GROUPS[name] for name in arguments.groups}
    variants = make_variants(vae, theirs, data, part, arguments.chunks, groups)
    expected: Tensor | None = None
    if not arguments.no_reference:
        expected = exact(vae, data, part)
        log(f"{part} {size} float32 reference: rms {float(expected.square().mean().sqrt()):.3f}, "
            f"clamped {float((expected.abs() >= 1).float().mean()):.2%}")  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, float] = {}
    for name, run in list(variants.items()):

        def first(name: str = name, run: Run = run) -> None:
            began = time.perf_counter()
            parts = run(True)
            torch.cuda.synchronize()
            line = f"{part} {size} {name}: first call {time.perf_counter() - began:.2f} s (compilation included)"
            if expected is not None:
                got = torch.cat([p.float() for p in parts], dim=2)
                line += f", error {relative(got, expected):.2e}"
                line += f", PSNR {psnr(got, expected):.1f} dB" if part == "decode" else ""
            log(line)

        log.attempt(f"{part} {size} {name}", first)
    expected = None
    torch.cuda.empty_cache()
    for _ in range(arguments.rounds):
        for name, run in variants.items():

            def again(name: str = name, run: Run = run) -> None:
                seconds, peak = timed(lambda: run(False))
                times[name].append(seconds)
                peaks[name] = max(peaks.get(name, 0.0), peak)

            log.attempt(f"{part} {size} {name}", again)
    base = sorted(times.get("diffusers", []) or [float("nan")])
    for name, values in times.items():
        if not values:
            continue
        median = sorted(values)[len(values) // 2]
        log(
            f"{part} {size} {arguments.frames} frames {name}: {median:.3f} s ({min(values):.3f} to {max(values):.3f}), "
            f"{base[len(base) // 2] / median:.2f}x, peak {peaks[name]:.2f} GiB; {clock()}"
        )


def exact(vae: WanVae, data: Tensor, part: str) -> Tensor:
    """`WanVae` in float32, in chunks."""
    cache: dict[str, Tensor] = {}
    if part == "decode":
        return torch.cat([vae.decode_chunk(chunk, cache) for chunk in data.split(1, dim=2)], dim=2)
    first, rest = data[:, :, :1], data[:, :, 1:]
    chunks = [first, *(rest.split(4, dim=2) if rest.shape[2] else ())]
    return torch.cat([vae.encode_chunk(chunk, cache) for chunk in chunks], dim=2)


def measure_quality(log: Log, name: str) -> None:
    """PSNR of the fast decoder in bfloat16 against `WanVae` in float32."""
    vae = demo_vae() if name == "demo" else random_vae()
    generator = torch.Generator("cuda").manual_seed(2)
    side = (12, 20) if name == "demo" else (30, 52)
    for kind in ("noise", "encoded"):
        if kind == "noise":
            latents = torch.randn(1, vae.config.z_dim, 5, *side, generator=generator, device="cuda")
        else:
            steps = torch.linspace(-1, 1, side[1] * 8, device="cuda").view(1, 1, 1, 1, -1)
            frames = (steps + 0.1 * torch.randn(1, 3, 17, side[0] * 8, 1, generator=generator, device="cuda")).clamp(
                -1, 1
            )
            latents = vae.encode(frames)
        expected = exact(vae, latents, "decode")
        got = torch.cat(fast_decode(vae, latents, 1, GROUPS["4444"])(True), dim=2)
        half = psnr(vae_in_bfloat16(vae, latents), expected)
        log(f"quality {name} {kind}: fast bf16 PSNR {psnr(got, expected):.1f} dB, error {relative(got, expected):.2e}; "
            f"plain torch bf16 {half:.1f} dB; float32 rms {float(expected.square().mean().sqrt()):.3f}")  # fmt: skip


def vae_in_bfloat16(vae: WanVae, latents: Tensor) -> Tensor:
    return copy.deepcopy(vae).bfloat16().decode(latents)


if __name__ == "__main__":
    main()
