"""Does `wan-demo` show what the prompt says?

Samples prompts whose shape-colour-direction combination was never trained, and judges the clips from pixels alone
(`tools/demo_judge.py`).

    python -m tools.demo_adherence --model configs/demo --prompts 320

`--shuffle` judges each clip against another clip's prompt: every figure must fall to chance. `--real` judges drawn
clips of the same scenes instead of sampled ones: what the judge itself gets right. One prompt in four has two shapes;
an attribute counts as right there only if it is right for both.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_captions import BRIEF, DETAILED, captions
from tools.demo_export import architecture_of, load
from tools.demo_judge import judge, matches
from tools.demo_sampling import Sampling, contact_sheet, generate
from tools.demo_scenes import STYLES, Scenes, render, sample_scenes
from tools.demo_vae_training import to_uint8

ATTRIBUTES = ("colour", "direction", "shape", "background", "count", "size", "speed")
TARGETS = {"colour": 0.95, "direction": 0.93, "shape": 0.88, "background": 0.97}
TWO_SHAPES = 0.25


def main() -> None:
    """Measure and print."""
    options = parse_options()
    print(f"command: python -m tools.demo_adherence {shlex.join(sys.argv[1:])}")
    print(describe_machine(torch.device(options.device)))
    scenes, prompts = held_out_prompts(options.prompts, options.prompt_seed)
    started = time.monotonic()
    if options.clips is not None and options.clips.exists():
        clips = load_file(options.clips, device=options.device)["clips"]
    else:
        clips = drawn(scenes, options.revision) if options.real else sampled(options, prompts)
        print(f"{len(clips)} clips in {time.monotonic() - started:.1f} s")
    if options.clips is not None:
        save_file({"clips": clips.contiguous()}, options.clips)
    if options.sheet is not None:
        contact_sheet(clips[: options.sheet_clips], prompts[: options.sheet_clips], options.sheet)
    judged = (
        Scenes(**{name: value.roll(1, 0) for name, value in scenes.tensors().items()}) if options.shuffle else scenes
    )
    for line in report(clips, judged):
        print(line)


def parse_options() -> argparse.Namespace:
    """The command line; sampling defaults are those of the model's configuration."""
    defaults = Sampling()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("configs/demo"))
    parser.add_argument("--revision", type=int, choices=(1, 2), default=1)
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--prompt-seed", type=int, default=1234)
    parser.add_argument("--solver", choices=("unipc", "dpm++", "euler"), default=defaults.solver)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--guidance-scale", type=float, default=defaults.guidance_scale)
    parser.add_argument("--flow-shift", type=float, default=defaults.flow_shift)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (PNG) of the first clips here")
    parser.add_argument("--sheet-clips", type=int, default=24)
    parser.add_argument(
        "--clips", type=Path, help="judge the clips in this file; if it does not exist, sample and write it"
    )
    control = parser.add_mutually_exclusive_group()
    control.add_argument("--shuffle", action="store_true", help="judge against another prompt: must fall to chance")
    control.add_argument("--real", action="store_true", help="judge drawn clips: what the judge gets right")
    return parser.parse_args()


def held_out_prompts(count: int, seed: int) -> tuple[Scenes, list[str]]:
    """Held-out scenes and a prompt for each; the first half of the prompts names size and speed, the rest does not."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed), held_out=True, two_shapes=TWO_SHAPES)
    half = (count + 1) // 2
    rng = Random(seed)
    return scenes, captions(scenes[:half], rng, DETAILED) + captions(scenes[half:], rng, BRIEF)


def sampled(options: argparse.Namespace, prompts: list[str]) -> Tensor:
    """Clips of the model, uint8."""
    revision = None if options.revision == 1 else options.model / f"revision-{options.revision}"
    networks = load(options.model, architecture_of(options.model), revision).to(options.device)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer" / "tokenizer.json"))
    sampling = Sampling(options.solver, options.steps, options.guidance_scale, options.flow_shift, options.seed)
    return generate(networks, tokenizer, prompts, sampling)


def drawn(scenes: Scenes, revision: int) -> Tensor:
    """Clips of the same scenes as training draws them, uint8."""
    return torch.cat([to_uint8(render(scenes[at : at + 32], style=revision - 1)) for at in range(0, len(scenes), 32)])


def report(clips: Tensor, scenes: Scenes) -> list[str]:
    """A table: attributes by all clips, those with one shape, and those with two."""
    scenes = scenes.to(clips.device)
    verdict = judge(clips)
    right = matches(verdict, scenes)
    everything = torch.ones_like(scenes.count, dtype=torch.bool)
    named = torch.arange(len(scenes), device=clips.device) < (len(scenes) + 1) // 2
    groups = {"all": everything, "one shape": scenes.count == 1, "two shapes": scenes.count == 2}
    lines = [
        f"{'':12}" + "".join(f"{f'{name} ({int(mask.sum())})':>18}" for name, mask in groups.items()) + "   target"
    ]
    for name in ATTRIBUTES:
        counted = named if name in ("size", "speed") else everything
        shares = [float(right[name][mask & counted].float().mean()) for mask in groups.values()]
        target = f"   >= {TARGETS[name]:.0%}" if name in TARGETS else ""
        lines.append(f"{name:12}" + "".join(f"{share:>17.1%} " for share in shares) + target)
    both = right["colour"] & right["shape"] & right["direction"] & right["background"] & right["count"]
    lines.append(
        f"{'all of them':12}" + "".join(f"{float(both[mask].float().mean()):>17.1%} " for mask in groups.values())
    )
    lines.append(
        f"outline-coloured pixels around shapes: {float(verdict.ink.mean()):.1%} (styles: {', '.join(STYLES)})"
    )
    return lines


def describe_machine(device: torch.device) -> str:
    """Device and versions, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"device: {name}; python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    )


if __name__ == "__main__":
    main()
