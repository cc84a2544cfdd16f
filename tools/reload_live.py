"""Reloads while requests run: how long the dit stands still, and that nothing else changes.

    python -m tools.reload_live wan2.1-t2v-1.3b --steps 20 --size 832x480x33
    python -m tools.reload_live wan2.1-t2v-14b --steps 60 --size 832x480x17   # a request outlasts the reading
    python -m tools.reload_live wan-demo --device cpu --steps 40

Two versions of the transformer, random weights of the full size (of wan-demo: its revisions). In turn: two requests one
after the other, undisturbed; a reload while the first of two runs, which finishes on the old version, and the second on
the new one; a reload that changes a request in its middle; and a new process for the dit, with all files out of reach.

"pause" is the time without a step, beyond that of the step itself: between the last step on what was there before and
the first on what came after. The text goes to OUT/reload-MODEL.txt; exit status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import Supervisor, SystemParams, UserParams
from engine.models import CONFIGS
from ipc.messages.client import Reload
from ipc.messages.server import Done
from tools.full_size_setup import PROMPT, Report, Workplace, add_options, gpu_memory_used, machine, size_of
from tools.load import digest
from tools.make_checkpoint import make_checkpoint
from tools.survive import out_of_reach

LOOK = 0.001
"""Seconds between two looks at how far the requests are."""


class Step(NamedTuple):
    """A step was seen done."""

    at: float
    task: str
    number: int


class Watch:
    """Notes when each step of each request is done."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.steps: list[Step] = []
        self.most_memory = 0
        self._supervisor = supervisor
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        seen: dict[str, int] = {}
        while True:
            for task in self._supervisor.tasks():
                if task.phase == "denoise" and task.step > seen.get(task.id, 0):
                    seen[task.id] = task.step
                    self.steps.append(Step(time.monotonic(), task.id, task.step))
            if self._supervisor.device != "cpu":
                self.most_memory = max(self.most_memory, gpu_memory_used(self._supervisor.device))
            await asyncio.sleep(LOOK)

    def stop(self) -> None:
        self._task.cancel()

    def gaps(self, task: str) -> list[float]:
        """Seconds between the steps of one request."""
        at = [step.at for step in self.steps if step.task == task]
        return [b - a for a, b in itertools.pairwise(at)]

    def gap_before(self, task: str, number: int) -> float:
        """Seconds until its step of this number (the first is 1) was done, from the step before."""
        at = {step.number: step.at for step in self.steps if step.task == task}
        return at[number] - at[number - 1]


class Runs:
    """One engine and its requests."""

    def __init__(self, supervisor: Supervisor, report: Report, args: argparse.Namespace, folder: Path) -> None:
        self.supervisor, self.report, self.args, self.folder = supervisor, report, args, folder
        self.step = 0.0
        """Seconds, undisturbed."""

    def ask(self, name: str) -> UserParams:
        size = size_of(self.args.size)
        return UserParams(
            prompt=PROMPT, seed=11, steps=self.args.steps, output=str(self.folder / f"{name}.mp4"), **size
        )

    def frames(self, done: Done) -> str:
        return digest(Path(done.path))

    def pause(self, seconds: float, what: str) -> None:
        """At most a step, on a GPU; on a CPU, which the loader shares, it is only said."""
        if self.supervisor.device == "cpu":
            self.report.say(f"     {what}: pause {seconds:.3f} s")
        else:
            self.report.check(seconds <= self.step, f"{what}: pause {seconds:.3f} s, at most a step")

    async def pair(self, name: str) -> tuple[asyncio.Task[Done], asyncio.Task[Done]]:
        """Two requests, the second waiting for the first."""
        first = asyncio.create_task(self.supervisor.generate(self.ask(f"{name}-1")))
        await asyncio.sleep(0.1)
        return first, asyncio.create_task(self.supervisor.generate(self.ask(f"{name}-2")))

    async def reached(self, step: int) -> None:
        def there() -> bool:
            running = [task for task in self.supervisor.tasks() if task.state == "running"]
            return any(task.phase == "denoise" and task.step >= step for task in running)

        while not there():  # noqa: ASYNC110 - events are for listeners of one request
            await asyncio.sleep(LOOK)

    async def undisturbed(self) -> tuple[str, float]:
        """The frames, and the seconds between the last step of a request and the first of the next one."""
        await self.supervisor.generate(self.ask("warm"))
        watch = Watch(self.supervisor)
        first, second = await self.pair("calm")
        one, two = await first, await second
        watch.stop()
        self.step = statistics.median(watch.gaps(one.id))
        between = self.between(watch, one, two)
        self.report.check(self.frames(one) == self.frames(two), "two undisturbed requests have the same frames")
        self.report.say(f"undisturbed: {self.step:.3f} s a step, {between:.3f} s from a request to the next")
        return self.frames(one), between

    def between(self, watch: Watch, one: Done, two: Done) -> float:
        last = max(step.at for step in watch.steps if step.task == one.id)
        return min(step.at for step in watch.steps if step.task == two.id) - last

    async def drain(self, checkpoint: Path, golden: str, between: float) -> str:
        """The frames of the new version."""
        watch = Watch(self.supervisor)
        first, second = await self.pair("drain")
        await self.reached(1)
        began = time.monotonic()
        done = await self.supervisor.reload(order(checkpoint))
        flipped = time.monotonic()
        one = await first
        two = await second
        watch.stop()
        loading = [b.at - a.at for a, b in itertools.pairwise(watch.steps) if began < b.at < flipped]
        self.report.say(
            f"drain: {done.bytes / 1e9:.1f} GB read, verified and mapped in {flipped - began:.1f} s; a step meanwhile: "
            f"{statistics.median(loading or [self.step]):.3f} s"
        )
        new = done.weights["transformer"]
        self.report.check(self.frames(one) == golden, "the running request finished on the version it began with")
        self.report.check(one.metadata["weights"]["transformer"] != new, "and says so")
        if two.metadata["weights"]["transformer"] != new:
            self.report.check(False, "the next request began before the reload was done: ask for more steps")
        pause = self.between(watch, one, two) - between
        self.pause(pause, "from the last step on the old to the first on the new version")
        return self.frames(two)

    async def now(self, checkpoint: Path) -> None:
        """Change a request in its middle."""
        watch = Watch(self.supervisor)
        running = asyncio.create_task(self.supervisor.generate(self.ask("now")))
        await self.reached(1)
        await self.supervisor.reload(order(checkpoint, when="now"))
        done = await running
        watch.stop()
        (change,) = done.metadata["weight_changes"]
        gap = watch.gap_before(done.id, change["step"] + 1)
        self.pause(gap - self.step, f"now: changed before step {change['step'] + 1}")

    async def replace(self, golden: str) -> None:
        """A new process for the dit in the middle of a request."""
        device = self.supervisor.device
        before = gpu_memory_used(device)
        watch = Watch(self.supervisor)
        running = asyncio.create_task(self.supervisor.generate(self.ask("replace")))
        await self.reached(1)
        replaced = await self.supervisor.replace_stages(["dit"])
        done = await running
        watch.stop()
        pause = max(watch.gaps(done.id)) - self.step
        self.report.check(self.frames(done) == golden, "a new process for the dit in mid-request: the same frames")
        self.report.say(f"     ready {replaced.seconds['dit']:.2f} s after the old one had left; pause {pause:.3f} s")
        if device != "cpu":
            more = (watch.most_memory - before) / 2**30
            self.report.say(f"     GPU memory at most {more:.2f} GiB over that before (contexts and activations)")


def order(checkpoint: Path, **fields: Any) -> Reload:
    return Reload(ref=0, checkpoint=str(checkpoint), components=["transformer"], **fields)


async def reloads(args: argparse.Namespace, place: Workplace, report: Report, folder: Path) -> None:
    """Everything, for one model."""
    first = place.checkpoint(report, args.model)
    if first is None:
        first, second = CONFIGS / "demo", CONFIGS / "demo" / "revision-2"
    else:
        second = args.second / f"{args.model}-second"
        make_checkpoint(
            place.model(args.model), second, "diffusers", dtype=torch.bfloat16, seed=1, only=("transformer",)
        )
    try:
        async with Supervisor(SystemParams(model=args.model, checkpoint=str(first), device=args.device)) as supervisor:
            await supervisor.ready()
            runs = Runs(supervisor, report, args, folder)
            golden, between = await runs.undisturbed()
            new = await runs.drain(second, golden, between)
            await runs.now(first)
            away = out_of_reach(None if args.device == "cpu" else first, place.model(args.model).components)
            with away:
                await runs.replace(golden)
            report.check(new != golden, "the two versions make different frames")
            report.check(not supervisor.check_integrity(), "all accounts of the shared memory are in order")
    finally:
        if second.parent == args.second:
            shutil.rmtree(second, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="see `engine models`")
    parser.add_argument("--steps", type=int, default=20)
    add_options(parser)
    parser.add_argument("--second", type=Path, help="the second version, on a file system with room for it [--work]")
    args = parser.parse_args()
    args.second = args.second or args.work.absolute()
    place = Workplace(args.work.absolute(), False, args.device)
    size = f" --size {args.size}" if args.size else ""
    report = Report(
        f"{args.model} --steps {args.steps}{size}", args.out and args.out / f"reload-{args.model}.txt", place.directory,
        tool="reload_live",
    )  # fmt: skip
    for line in machine(args.device):
        report.say(line)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(reloads(args, place, report, Path(folder)))
    return 0 if all(passed for passed, _ in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
