"""Milliseconds of one forward of the demo's dit by compute threads and how they wait, alone and two processes at once.

python tools/bench_threads.py --out docs/results/threads-cpu.txt
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORWARDS = 7
CONTENDERS = ((1, "PASSIVE"), (2, "PASSIVE"), (2, "ACTIVE"))
"""Threads, and OMP_WAIT_POLICY: asleep or spinning."""


def forward_ms(threads: int) -> float:
    """Median of `FORWARDS` forwards, after two to warm up."""
    import torch

    from engine.models import load_model
    from stages.models.transformer import WanTransformer

    torch.set_num_threads(threads)
    dit = WanTransformer(load_model("wan-demo").transformer)
    latents, times = torch.randn(1, 16, 5, 12, 12), []
    with torch.inference_mode():
        context, rope = dit.encode_prompt(torch.randn(1, 512, 128)), dit.rope(5, 12, 12)
        for _ in range(FORWARDS + 2):
            began = time.perf_counter()
            dit(latents, torch.tensor([500]), context, rope)
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[2:])


def together(processes: int, threads: int, policy: str) -> list[float]:
    """What each of so many processes measures at the same time."""
    command = [sys.executable, __file__, "--threads", str(threads)]
    env = {**os.environ, "OMP_WAIT_POLICY": policy, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [float(process.communicate()[0]) for process in running]


def report() -> str:
    import torch
    from bench_engine import cpu_name

    rows = [
        "$ python tools/bench_threads.py",
        f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; median ms of {FORWARDS} forwards, 180 tokens",
    ]
    for threads, policy in CONTENDERS:
        alone, two = together(1, threads, policy), together(2, threads, policy)
        rows.append(f"{threads} threads {policy:8} alone {alone[0]:7.1f}   two at once {two[0]:7.1f} {two[1]:7.1f}")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the text here")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        print(forward_ms(args.threads))
        return
    text = report()
    print(text, end="")
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
