"""Every model at full size on a GPU, with random weights: does it run, how long, how exact.

    python -m tools.full_size t2v-1.3b precision-1.3b --work /tmp/full-size --out docs/results

Each run makes the checkpoint that it needs below --work (what is there is used again), goes through `engine serve` and
`engine generate`, and writes what it found to OUT/full-size-RUN.txt. The last lines say which checks passed; the exit
status is 1 if one did not. With --shrink all models are tiny ones of the same structure, for a machine without a GPU.
Times of `load` mean something on a disk only, not in /dev/shm.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from stages.sampling import expert_index
from stages.solvers import make_schedule
from tools.full_size_precision import load_times, precision
from tools.full_size_setup import Report, Served, Video, Workplace, machine

FAST_SHIFT = 5.0
"""With it, 4 UniPC steps are 2 of each expert, for the boundaries of both A14B models."""


def size(place: Workplace, width: int, height: int, num_frames: int) -> dict[str, object]:
    """Options for a video of this size; for tiny models, their own."""
    return {} if place.shrunken else {"width": width, "height": height, "num_frames": num_frames}


def request(server: Served, report: Report, **options: object) -> Video:
    """One request at a fixed seed; its video is what was asked for and shows something."""
    video = server.generate(seed=11, **options)
    wanted = [video.metadata["parameters"][name] for name in ("num_frames", "height", "width")]
    shape, deviation = list(video.frames.shape[:3]), float(video.frames.std())
    report.check(shape == wanted and deviation > 1, f"a video of {shape}, pixels deviate by {deviation:.1f}")
    return video


def t2v_small(place: Workplace, report: Report) -> None:
    """The whole of the usual request: 50 steps."""
    with Served(place, report, "wan2.1-t2v-1.3b") as server:
        video = request(server, report, steps=50, **size(place, 832, 480, 81))
    report.say(f"seconds per step: {video.metadata['seconds']['denoise'] / 50:.3f}")


def t2v_large(place: Workplace, report: Report) -> None:
    """One step at 480p and one at 720p."""
    with Served(place, report, "wan2.1-t2v-14b") as server:
        request(server, report, steps=1, **size(place, 832, 480, 81))
        request(server, report, steps=1, **size(place, 1280, 720, 81))


def two_experts(place: Workplace, report: Report, name: str, **options: object) -> None:
    """Four steps, two on each expert.

    That both experts run is seen from outside: each has a guidance scale of its own, and changing either changes the
    video. How the steps are divided is the schedule's.
    """
    boundary = place.model(name).boundary
    timesteps = make_schedule("unipc", 4, FAST_SHIFT, 0).timesteps
    experts = [("high", "low")[expert_index(timestep, boundary)] for timestep in timesteps]
    steps = ", ".join(f"{t} {expert}" for t, expert in zip(timesteps, experts, strict=True))
    report.check(experts == ["high", "high", "low", "low"], f"timesteps and experts: {steps}")
    with Served(place, report, name) as server:
        video = request(server, report, steps=4, flow_shift=FAST_SHIFT, **size(place, 832, 480, 81), **options)
        loaded = {"transformer", "transformer_2"} & set(video.metadata["weights"])
        report.check(len(loaded) == 2, f"weights loaded: {', '.join(sorted(loaded))}")
        short = {**size(place, 832, 480, 5), **options, "steps": 4, "flow_shift": FAST_SHIFT}
        frames = {
            scales: request(server, report, **short, guidance_scale=scales[0], guidance_scale_2=scales[1]).frames
            for scales in ((4.0, 3.0), (7.0, 3.0), (4.0, 6.0))
        }
    base, high, low = (frames[scales].astype(int) for scales in frames)
    for expert, other in (("high", high), ("low", low)):
        change = float(np.abs(base - other).mean())
        report.check(change > 0, f"the {expert}-noise expert's guidance scale changes the video, by {change:.2f}")


def ti2v(place: Workplace, report: Report) -> None:
    """Four steps of text to video, and of image to video."""
    with Served(place, report, "wan2.2-ti2v-5b") as server:
        text = request(server, report, steps=4, **size(place, 1280, 704, 121))
        picture = request(server, report, steps=4, image=place.picture(), **size(place, 1280, 704, 121))
        same = text.frames.shape == picture.frames.shape and np.array_equal(text.frames, picture.frames)
        report.check(not same, "the picture changes the video")


def i2v_clip(place: Workplace, report: Report) -> None:
    """Four steps from a picture, with CLIP tokens."""
    with Served(place, report, "wan2.1-i2v-14b-480p") as server:
        video = request(server, report, steps=4, image=place.picture(), **size(place, 832, 480, 81))
        report.check("image_encoder" in video.metadata["weights"], "the image encoder is loaded")


def demo(place: Workplace, report: Report) -> None:
    """The model that ships, on this device."""
    with Served(place, report, "wan-demo") as server:
        request(server, report)


RUNS: dict[str, Callable[[Workplace, Report], None]] = {
    "demo": demo,
    "t2v-1.3b": t2v_small,
    "t2v-14b": t2v_large,
    "t2v-a14b": lambda place, report: two_experts(place, report, "wan2.2-t2v-a14b"),
    "i2v-a14b": lambda place, report: two_experts(place, report, "wan2.2-i2v-a14b", image=place.picture()),
    "ti2v-5b": ti2v,
    "i2v-14b": i2v_clip,
    "precision-1.3b": lambda place, report: precision(place, report, "wan2.1-t2v-1.3b"),
    "precision-14b": lambda place, report: precision(place, report, "wan2.1-t2v-14b"),
    "load": lambda place, report: load_times(place, report, "wan2.1-t2v-1.3b"),
}


def run(name: str, place: Workplace, out: Path | None) -> Report:
    """One run, its text in `out`; whatever goes wrong is a check that failed."""
    path = None if out is None else out / f"full-size-{name}.txt"
    report = Report(name + (" --shrink" if place.shrunken else ""), path, place.directory)
    for line in machine(place.device):
        report.say(line)
    free = shutil.disk_usage(place.directory).free / 1e9
    report.say(f"{free:.0f} GB free where the checkpoints are")
    began = time.perf_counter()
    try:
        RUNS[name](place, report)
    except Exception as error:
        traceback.print_exc()
        report.check(False, f"{type(error).__name__}: {str(error)[:500]}")
    report.say(f"{name}: {time.perf_counter() - began:.0f} s in all")
    return report


def summary(reports: Mapping[str, Report]) -> list[str]:
    """A line per run, and each check that failed."""
    lines = []
    for name, report in reports.items():
        failed = [what for passed, what in report.checks if not passed]
        lines.append(f"{name:16} {len(report.checks) - len(failed)} of {len(report.checks)} checks passed")
        lines += [f"    FAIL {what}" for what in failed]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []], metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--list", action="store_true", help="print the names of the runs and what each does")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "full-size", help="checkpoints go here"
    )
    parser.add_argument("--out", type=Path, help="a text file per run goes here")
    parser.add_argument("--shrink", action="store_true", help="tiny models of the same structure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args()
    place = Workplace(args.work.absolute(), args.shrink, args.device)
    reports = {name: run(name, place, args.out) for name in args.runs}
    print("\n".join(["", *summary(reports)]))
    return 0 if all(passed for report in reports.values() for passed, _ in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
