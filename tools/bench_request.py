"""A whole request against Diffusers' WanPipeline: text, all steps, decoding; ours with the file, too.

    python -m tools.bench_request wan2.1-t2v-1.3b                     # 832x480, 81 frames, 50 steps: about 3 minutes
    python -m tools.bench_request wan2.1-t2v-14b --offload --steps 4  # ours at memory level 2; needs accelerate
    OMP_NUM_THREADS=1 python -m tools.bench_request wan-demo --device cpu --steps 10    # more threads would spin

Both have the same files of random weights (wan-demo: its own), bfloat16 on a GPU, and are warm: each has made a video
of two steps. WanPipeline is as fast as it gets without compiling: cuDNN's attention, everything resident, its VAE in
bfloat16 too. It ends with frames in memory; ours goes on and writes a file. So two ratios: until the last frame is
decoded, which is the same work, and until the file is in its place. (Random weights make noise, which H.264 takes much
longer for than for a video.) In turns, with --rounds of each.

--offload: WanPipeline with `enable_model_cpu_offload`, against the engine, fused, at the level that keeps as much on
the GPU: what is at work. Both have the weights in host memory. Peaks, too, of what the driver says is in use: what came
with each; for ours that is the CUDA context of its process, too, for WanPipeline not, as this process has one already.
The text goes to OUT/request-MODEL.txt, or request-MODEL-offload.txt; exit status 1 if
a ratio is not reached on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from ipc.architecture import TransformerConfig
from ipc.messages.names import MemoryLevel
from tools.bench_dit import diffusers_model
from tools.bench_memory import Gauge
from tools.full_size_setup import PROMPT, Report, Workplace, add_options, machine, size_of

MUST = 1.37
"""Times as fast as WanPipeline, on a GPU."""


OFFLOAD_LEVEL = 2
"""Memory level of the engine against `enable_model_cpu_offload`."""


def pipeline_of(checkpoint: Path, config: TransformerConfig, device: str, offload: bool) -> Any:
    """WanPipeline for the device, from a directory in the Diffusers layout; all of it there, or brought model by
    model."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(checkpoint / "tokenizer" / "tokenizer.json"),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
        text_encoder=UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder", dtype=dtype),
        transformer=diffusers_model(config, weights_in(checkpoint / "transformer"), "cpu" if offload else device),
        vae=AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=dtype),
        scheduler=scheduler,
    )
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_in(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


@contextlib.contextmanager
def best_attention(device: str) -> Any:
    """cuDNN's attention, which Diffusers' own dispatcher takes by name."""
    if not device.startswith("cuda"):
        yield
        return
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("_native_cudnn"):
        yield


async def compare(args: argparse.Namespace, place: Workplace, report: Report, folder: Path) -> None:
    model = place.model(args.model)
    made = place.checkpoint(report, args.model)
    checkpoint = made if made is not None else CONFIGS / str(model.checkpoint)
    defaults = model.defaults
    size: dict[str, int] = {"width": defaults.width, "height": defaults.height, "num_frames": defaults.num_frames}
    size |= size_of(args.size)
    level: MemoryLevel = OFFLOAD_LEVEL if args.offload else "auto"
    params = SystemParams(
        model=args.model, checkpoint=None if made is None else str(made), device=args.device, memory_level=level,
        placement="fused" if args.offload else "split",
    )  # fmt: skip
    peaks = Peaks(args.device)
    async with Supervisor(params) as supervisor:
        await supervisor.ready()

        async def ours(steps: int) -> None:
            await supervisor.generate(
                UserParams(prompt=PROMPT, seed=1, steps=steps, output=str(folder / "ours.mp4"), solver="euler", **size)
            )

        def theirs(steps: int) -> None:
            with best_attention(args.device):
                pipeline(
                    prompt=PROMPT, negative_prompt=defaults.negative_prompt, num_inference_steps=steps,
                    guidance_scale=defaults.guidance_scale, output_type="np", **size,
                )  # fmt: skip
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()

        seconds: dict[str, list[float]] = {"ours": [], "with the file": [], "WanPipeline": []}
        phases: dict[str, float] = {}
        await ours(2)
        peaks.end("ours")
        pipeline = pipeline_of(checkpoint, model.transformer, args.device, args.offload)
        theirs(2)
        peaks.end("WanPipeline")
        for _ in range(args.rounds):
            began = time.monotonic()
            await ours(args.steps)
            seconds["with the file"].append(time.monotonic() - began)
            spans = [span for span in supervisor.trace().spans if span.begin >= began]
            seconds["ours"].append(max(span.end for span in spans if span.phase == "decode") - began)
            for span in spans:
                phases[span.phase] = phases.get(span.phase, 0.0) + (span.end - span.begin) / args.rounds
            seconds["WanPipeline"].append(timed(lambda: theirs(args.steps)))
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
    median = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        report.say(
            f"{name:13} {median[name]:8.2f} s  ({min(each):.2f} to {max(each):.2f}, {args.rounds} of each){peaks[name]}"
        )
    report.say("ours by phase: " + ", ".join(f"{phase} {amount:.2f} s" for phase, amount in phases.items()))
    ratio = median["WanPipeline"] / median["ours"]
    text = f"{args.steps} steps, {'x'.join(map(str, size.values()))}: {ratio:.2f} times as fast as WanPipeline"
    text += f", {median['WanPipeline'] / median['with the file']:.2f} times with the file"
    if args.offload:
        less = peaks.gib["ours"] <= peaks.gib["WanPipeline"]
        report.check(ratio >= 1 and less, f"{text} with enable_model_cpu_offload; must 1, in no more memory")
    elif args.device.startswith("cuda"):
        report.check(ratio >= MUST, f"{text}, must {MUST}")
    else:
        report.say(f"     {text}")


class Peaks:
    """GiB of the GPU that came into use with one thing after another, at most; nothing on a CPU."""

    def __init__(self, device: str) -> None:
        self._gauge = None
        if device.startswith("cuda"):
            torch.zeros(1, device=device)
            self._gauge = Gauge()
        self._before = 0
        self.gib: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        if self._gauge is not None:
            self._gauge.most = self._before = self._gauge.used()

    def end(self, name: str) -> None:
        """So much for this; the next one begins."""
        if self._gauge is not None:
            self.gib[name] = (self._gauge.most - self._before) / 2**30
            torch.cuda.empty_cache()
        self._begin()

    def __getitem__(self, name: str) -> str:
        """For people."""
        return f", at most {self.gib[name]:.2f} GiB" if name in self.gib else ""


def timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="see `engine models`")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--offload", action="store_true", help="both with the weights in host memory, on a GPU")
    add_options(parser)
    args = parser.parse_args()
    if args.offload and not args.device.startswith("cuda"):
        parser.error("--offload is for a GPU")
    name = f"request-{args.model}{'-offload' if args.offload else ''}.txt"
    path = None if args.out is None else args.out / name
    title = f"{args.model}{' --offload' if args.offload else ''} --steps {args.steps} --rounds {args.rounds}"
    title += f" --size {args.size}" if args.size else ""
    report = Report(title, path, args.work, tool="bench_request")
    for line in machine(args.device):
        report.say(line)
    place = Workplace(args.work, shrunken=False, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(compare(args, place, report, Path(folder)))
    return 0 if all(passed for passed, _ in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
