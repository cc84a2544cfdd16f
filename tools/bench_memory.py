"""Whole requests with less and less GPU memory, and beside a neighbour that takes it, on one GPU.

    python -m tools.bench_memory wan2.2-t2v-a14b budgets --budgets 80 40 24 12 8 --large-at 12    # GiB; 5 minutes
    python -m tools.bench_memory wan2.2-t2v-a14b budgets tenant --cycles 10 --take 60
    python -m tools.bench_memory wan2.1-t2v-1.3b start --budgets 4 --placement fused

A budget is enforced: another process holds all other memory of the GPU, so that what does not fit fails. `budgets`: one
engine that adjusts by itself as that process takes more; `tenant`: the neighbour comes and goes in the middle of a
request; `start`, alone: a new engine for each budget, with `gpu_budget`. "peak" is what the driver says is in use,
looked at 50 times a second, less the neighbour's: contexts, queues and all processes are in it. Random weights of the
full size are made below --work. The text goes to OUT/memory-MODEL.txt; exit status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine import Supervisor, SystemParams, UserParams
from ipc.messages.server import Done
from ipc.messages.status import DeviceMemory, MemoryChange, Span
from tools.full_size_setup import PROMPT, Report, Workplace, add_options, machine, size_of
from tools.load import digest

LOOK = 0.02
"""Seconds between two looks at the GPU's memory."""
SETTLE = 60.0
"""Seconds within which the level must follow."""
PATIENCE = 120.0
"""Seconds for a request: one that waits for memory that the neighbour has will wait for ever."""
FOLLOW = 2.0
"""Seconds within which it should, beside a neighbour."""
STEP = 256 << 20
"""Bytes of what the neighbour takes at a time."""
FAST_SHIFT = 5.0
"""With it, 4 UniPC steps are 2 of each expert, for the boundaries of both A14B models."""

NEIGHBOUR = """
import sys
from cuda.bindings import driver
import pynvml
driver.cuInit(0)
_, device = driver.cuDeviceGet(0)
_, context = driver.cuDevicePrimaryCtxRetain(device)
driver.cuCtxSetCurrent(context)
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
STEP = 256 << 20
held = []
print("ready", flush=True)
for line in sys.stdin:
    word, amount = line.split()
    wanted = int(amount)
    while held and len(held) * STEP > wanted:
        driver.cuMemFree(held.pop())
    while (len(held) + 1) * STEP <= wanted:
        code, pointer = driver.cuMemAlloc(STEP)
        if code != driver.CUresult.CUDA_SUCCESS:
            break
        held.append(pointer)
    print(len(held) * STEP, flush=True)
"""
"""Holds as much as it is told, or can have."""


class Neighbour:
    """Another process with GPU memory, as a blocking object."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        self.held = 0

    def hold(self, size: int) -> int:
        """Have it hold so many bytes; returns what it has."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"hold {size}\n")
        self._process.stdin.flush()
        self.held = int(self._process.stdout.readline())
        return self.held

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Gauge:
    """The GPU's memory in use, looked at all the time."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        self.total = int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total)
        self.most = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _look(self) -> None:
        while not self._end.wait(LOOK):
            self.most = max(self.most, self.used())

    @contextlib.contextmanager
    def peak(self) -> Iterator[None]:
        self.most = self.used()
        yield

    def close(self) -> None:
        self._end.set()
        self._thread.join()


class Bench:
    """What all parts need."""

    def __init__(self, args: argparse.Namespace, place: Workplace, report: Report, folder: Path) -> None:
        self.args, self.place, self.report, self.folder = args, place, report, folder
        self.gauge, self.neighbour = Gauge(), Neighbour()
        time.sleep(0.5)
        self.base = self.gauge.used()
        """In use by the neighbour's own context and by the driver."""

    def params(self, **fields: Any) -> SystemParams:
        checkpoint = self.place.checkpoint(self.report, self.args.model)
        return SystemParams(model=self.args.model, checkpoint=str(checkpoint), **fields)

    def ask(self, name: str, **fields: Any) -> UserParams:
        size = {"steps": self.args.steps, "seed": 5, "flow_shift": self.args.flow_shift} | size_of(self.args.size)
        return UserParams(prompt=PROMPT, output=str(self.folder / f"{name}.mp4"), **{**size, **fields})

    async def leave(self, budget: int) -> int:
        """Have the neighbour hold all but so many bytes, as fast as it gets them; what the engine has left."""
        wanted = self.gauge.total - self.base - budget
        end = time.monotonic() + SETTLE
        while await asyncio.to_thread(self.neighbour.hold, wanted) < wanted - STEP:
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.1)
        return self.gauge.total - self.base - self.neighbour.held

    def peak_gib(self) -> float:
        return (self.gauge.most - self.base - self.neighbour.held) / 2**30

    async def request(self, supervisor: Supervisor, name: str, **fields: Any) -> tuple[Done, list[Span]]:
        began = time.monotonic()
        done = await asyncio.wait_for(supervisor.generate(self.ask(name, **fields)), PATIENCE)
        return done, [span for span in supervisor.trace().spans if span.begin >= began]

    def tell(self, label: str, spans: list[Span], held: DeviceMemory) -> None:
        """One line about a request."""
        steps = [span.end - span.begin for span in spans if span.phase == "denoise"]
        rest = {phase: sum(s.end - s.begin for s in spans if s.phase == phase) for phase in ("text", "decode")}
        plan = f"level {held.plan.level}" + (f", {held.plan.blocks} blocks" if held.plan.level == 3 else "")
        each = ", ".join(f"{s:.2f}" for s in steps[:8])
        self.report.say(
            f"  {label}: {plan}, peak {self.peak_gib():.2f} GiB; steps {each} s; text {rest['text']:.2f} s, decode "
            f"{rest['decode']:.2f} s"
        )


def held(supervisor: Supervisor) -> DeviceMemory:
    return next(device for device in supervisor.status().memory if device.device != "cpu")


async def copies(supervisor: Supervisor, report: Report) -> None:
    began = time.monotonic()
    while (found := held(supervisor).copies).state != "complete":
        if found.problem or time.monotonic() > began + 240:
            raise RuntimeError(f"no copies in host memory: {found}")
        await asyncio.sleep(0.1)
    report.say(f"copies in host memory complete {time.monotonic() - began:.1f} s after the stages were up")


async def settled(supervisor: Supervisor) -> None:
    """Until nothing has changed for a while."""
    last, since = held(supervisor).plan, time.monotonic()
    end = since + SETTLE
    while time.monotonic() < min(since + 4.0, end):
        await asyncio.sleep(0.1)
        if held(supervisor).plan != last:
            last, since = held(supervisor).plan, time.monotonic()


async def budgets(bench: Bench, supervisor: Supervisor) -> None:
    report, golden = bench.report, ""
    for budget in bench.args.budgets:
        left = await bench.leave(int(budget * 2**30))
        await settled(supervisor)
        report.check(left <= budget * 2**30 + STEP, f"{budget:g} GiB: the neighbour leaves {left / 2**30:.2f} GiB")
        try:
            with bench.gauge.peak():
                done, spans = await bench.request(supervisor, f"at-{budget:g}")
        except TimeoutError:
            report.check(False, f"{budget:g} GiB: it waits for memory, peak {bench.peak_gib():.2f} GiB")
            continue
        bench.tell(f"{budget:g} GiB", spans, held(supervisor))
        frames = digest(Path(done.path))
        golden = golden or frames
        report.check(frames == golden, f"{budget:g} GiB: the same frames, peak {bench.peak_gib():.2f} GiB")
        if budget == bench.args.large_at:
            with bench.gauge.peak():
                size = {"width": 1280, "height": 720, "num_frames": 81, "steps": 1}
                spans: list[Span] = []
                with contextlib.suppress(TimeoutError):
                    _, spans = await bench.request(supervisor, f"large-{budget:g}", **size)
            bench.tell(f"{budget:g} GiB, 1280x720x81, one step", spans, held(supervisor))
            report.check(bool(spans), f"{budget:g} GiB: 1280x720x81, peak {bench.peak_gib():.2f} GiB")
    await bench.leave(bench.gauge.total)


def told(change: MemoryChange) -> str:
    plans = [f"{p.level}" + (f" ({p.blocks} blocks)" if p.level == 3 else "") for p in (change.before, change.after)]
    failed = "" if change.error is None else f"; failed: {change.error.message}"
    return f"level {plans[0]} -> {plans[1]} in {change.seconds:.2f} s: {change.why}{failed}"


async def start(bench: Bench) -> None:
    report, golden = bench.report, ""
    for budget in bench.args.budgets:
        params = bench.params(gpu_budget=f"{budget:g}GiB", placement=bench.args.placement)
        left = await bench.leave(int(budget * 2**30))
        with bench.gauge.peak():
            async with Supervisor(params) as supervisor:
                began = time.monotonic()
                await supervisor.ready()
                report.say(f"stages up in {time.monotonic() - began:.1f} s, {bench.args.placement}")
                done, spans = await bench.request(supervisor, f"start-{budget:g}")
                bench.tell(f"{budget:g} GiB ({left / 2**30:.1f} left by the neighbour)", spans, held(supervisor))
        report.check(
            bench.peak_gib() <= budget, f"{budget:g} GiB: the peak, start included, is {bench.peak_gib():.2f} GiB"
        )
        frames = digest(Path(done.path))
        golden = golden or frames
        report.check(frames == golden, f"{budget:g} GiB: the same frames")


async def tenant(bench: Bench, supervisor: Supervisor) -> None:
    report, args = bench.report, bench.args
    take = int(args.take * 2**30)
    size = {"num_frames": 17, "steps": 10}
    await settled(supervisor)
    calm, _ = await bench.request(supervisor, "calm", **size)
    golden = digest(Path(calm.path))
    for number in range(args.cycles):
        plan = held(supervisor).plan
        running = asyncio.create_task(supervisor.generate(bench.ask(f"beside-{number}", **size)))
        await asyncio.sleep(1.5)
        began = time.monotonic()
        while bench.neighbour.held < take - STEP and time.monotonic() < began + SETTLE:
            await asyncio.to_thread(bench.neighbour.hold, take)
        took = time.monotonic() - began
        await asyncio.sleep(2.5)
        await asyncio.to_thread(bench.neighbour.hold, 0)
        gave = time.monotonic()
        done = await running
        while held(supervisor).plan != plan and time.monotonic() < gave + 30:  # noqa: ASYNC110 - it is polled
            await asyncio.sleep(0.05)
        back = time.monotonic() - gave
        changes = [c for c in supervisor.trace().changes if c.at >= began and c.error is None]
        first = changes[0].at + changes[0].seconds - began if changes else float("inf")
        report.say(
            f"  cycle {number + 1}: the neighbour had its {args.take:g} GiB after {took:.2f} s, the level followed "
            f"after {first:.2f} s, and was back {back:.2f} s after they were free; {len(changes)} changes"
        )
        report.check(digest(Path(done.path)) == golden, f"cycle {number + 1}: the same frames")
        report.check(len(changes) <= 2, f"cycle {number + 1}: at most two changes")
        report.check(first <= FOLLOW, f"cycle {number + 1}: the level followed within {FOLLOW:g} s")
    for change in supervisor.trace().changes[:6]:
        report.say("  " + told(change))
    gaps = [c.seconds for c in supervisor.trace().changes]
    if gaps:
        report.say(f"  a change took {statistics.median(gaps):.2f} s, {max(gaps):.2f} at most")


async def live(bench: Bench) -> None:
    """One engine that adjusts by itself."""
    report = bench.report
    async with Supervisor(bench.params()) as supervisor:
        began = time.monotonic()
        await supervisor.ready()
        report.say(f"stages up in {time.monotonic() - began:.1f} s")
        await copies(supervisor, report)
        await asyncio.sleep(1.0)
        placed = sum(h.bytes for h in supervisor.memory() if h.where.startswith("gpu"))
        used = bench.gauge.used() - bench.base - bench.neighbour.held
        rest, processes = (used - placed) / 2**30, len(supervisor.status().stages) - 1
        report.say(
            f"idle: {used / 2**30:.2f} GiB in use, {placed / 2**30:.2f} GiB of it weights, queues, states; the rest, "
            f"{rest:.2f} GiB, is of {processes} processes"
        )
        for part in bench.args.parts:
            await {"budgets": budgets, "tenant": tenant}[part](bench, supervisor)
        for change in supervisor.trace().changes:
            report.say("  " + told(change))


PARTS = ("budgets", "tenant", "start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="see `engine models`")
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[80, 40, 24, 12, 8], help="GiB")
    parser.add_argument("--placement", default="split", choices=("split", "fused"), help="of `start`")
    parser.add_argument("--large-at", type=float, help="at this budget, one step of 1280x720x81 too")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--take", type=float, default=60, help="GiB that the neighbour takes")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--flow-shift", type=float, default=FAST_SHIFT)
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs a GPU; tests/engine/test_levels_random.py has the same on a CPU", file=sys.stderr)
        return 2
    name = f"memory-{args.model}{'-start' if args.parts == ['start'] else ''}.txt"
    path = None if args.out is None else args.out / name
    report = Report(" ".join(sys.argv[1:]), path, args.work, tool="bench_memory")
    for line in machine("cuda:0"):
        report.say(line)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Workplace(args.work, shrunken=False, device="cuda:0"), report, Path(folder))
        try:
            asyncio.run(start(bench) if args.parts == ["start"] else live(bench))
        finally:
            bench.neighbour.end()
            bench.gauge.close()
    return 0 if all(passed for passed, _ in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
