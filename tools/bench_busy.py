"""How much of the time a device has a quantum running while requests are queued, and between what it has none.

    python -m tools.bench_busy wan2.1-t2v-1.3b --size 832x480x81 --steps 20     # one GPU; about 4 minutes
    python -m tools.bench_busy wan-demo --device cpu --requests 3 --steps 10

After one request to warm up, all are handed in at once, each with a prompt of its own, so that all are encoded. The
time is from then to the last finished file, so the writing of the last video is in it, which no device has part in.
Random weights of the full size are made below --work (but for wan-demo). The text and the trace, which opens in
Perfetto, go to OUT/busy-MODEL.txt and .json; exit status 1 if a GPU was busy for less than it must.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine import Supervisor, SystemParams, UserParams
from engine.trace import chrome_trace
from ipc.messages.status import Span
from tools.full_size_setup import PROMPT, Report, Workplace, add_options, machine, size_of

MUST = 0.98
"""Share of the time, for a GPU."""
SHOWN_GAPS = 8


async def queued(args: argparse.Namespace, place: Workplace, report: Report, folder: Path) -> None:
    """Run the requests, and judge how."""
    checkpoint = place.checkpoint(report, args.model)
    params = SystemParams(
        model=args.model, checkpoint=None if checkpoint is None else str(checkpoint), device=args.device
    )
    size = {"steps": args.steps} | size_of(args.size)
    async with Supervisor(params) as supervisor:
        await supervisor.ready()

        async def make(number: int) -> None:
            await supervisor.generate(
                UserParams(prompt=f"{PROMPT} ({number})", seed=number, output=str(folder / f"{number}.mp4"), **size)
            )

        await make(args.requests)
        began = time.monotonic()
        await asyncio.gather(*(make(number) for number in range(args.requests)))
        wall = time.monotonic() - began
        traced = supervisor.trace()
    spans = [span for span in traced.spans if span.begin >= began]
    report.say(f"{args.requests} requests: {wall:.1f} s, {len(spans)} quanta")
    for device in sorted({span.device for span in spans if span.device is not None}):
        judge(report, device, [span for span in spans if span.device == device], wall)
    if args.out is not None:
        file = args.out / f"busy-{args.model}.json"
        file.write_bytes(msgspec.json.encode(chrome_trace(spans, traced.clock)))


def judge(report: Report, device: str, spans: Sequence[Span], wall: float) -> None:
    """Of one device: its share, what of it each phase has, and the longest pauses by what they are between."""
    spans = sorted(spans, key=lambda span: span.begin)
    pairs = list(itertools.pairwise(spans))
    report.check(all(a.end <= b.begin for a, b in pairs), f"{device}: one quantum at a time")
    busy = sum(span.end - span.begin for span in spans)
    text = f"{device}: busy for {busy:.1f} s, {busy / wall:.2%} of the time"
    if device.startswith("cuda"):
        report.check(busy / wall >= MUST, f"{text}; at least {MUST:.0%}")
    else:
        report.say(f"     {text}")
    taken: dict[str, float] = collections.defaultdict(float)
    for span in spans:
        taken[span.phase] += span.end - span.begin
    report.say(f"     {', '.join(f'{phase} {seconds:.1f} s' for phase, seconds in taken.items())}")
    gaps: dict[str, list[float]] = collections.defaultdict(list)
    for before, after in pairs:
        gaps[f"{before.phase} to {after.phase}{'' if before.task == after.task else ' of another'}"].append(
            after.begin - before.end
        )
    gaps["before the first and after the last"].append(wall - (spans[-1].end - spans[0].begin))
    for between, found in sorted(gaps.items(), key=lambda item: -sum(item[1]))[:SHOWN_GAPS]:
        report.say(f"     idle {sum(found):7.3f} s, {between}: {len(found)}, the longest {1e3 * max(found):.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="see `engine models`")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    add_options(parser)
    args = parser.parse_args()
    place = Workplace(args.work.absolute(), False, args.device)
    words = f"{args.model} --requests {args.requests} --steps {args.steps}" + (
        f" --size {args.size}" if args.size else ""
    )
    report = Report(words, args.out and args.out / f"busy-{args.model}.txt", place.directory, tool="bench_busy")
    for line in machine(args.device):
        report.say(line)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(queued(args, place, report, Path(folder)))
    return 0 if all(passed for passed, _ in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
