"""Kills of the dit in the middle of a request: same frames, and how long until it goes on.

    python -m tools.survive wan2.1-t2v-1.3b --kills 20 --steps 30 --size 832x480x81
    python -m tools.survive wan2.1-t2v-1.3b --kills 10 --steps 30 --size 832x480x81 --spare
    python -m tools.survive wan-demo --device cpu --kills 3 --steps 20

A request is made undisturbed, then again while its dit process is killed with SIGKILL, `--kills` times, each time in
the next of as many equal parts of its steps and at a random moment of that step. Meanwhile the checkpoint is out of
reach, so that no byte of weights can be read again. The frames must be the same; afterwards, with the engine stopped,
the GPU must have as much free memory as before. Random weights of the full size are made below --work (but for
wan-demo). The text goes to OUT/survive-MODEL[-spare].txt; exit status 1 if a check failed.

Seconds "until the next step" go from the kill to the moment at which the step begins that the new process runs first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine import Supervisor, SystemParams, UserParams
from ipc.messages.status import StageStatus
from tools.full_size_setup import PROMPT, Report, Workplace, add_options, gpu_memory_used, machine, size_of
from tools.load import digest

PATIENCE = 300.0
"""Seconds without a step done after which the engine counts as stuck."""
REST = 1.0
"""Seconds without work after which a spare process counts as loaded."""
MOST_LEFT = 2 << 20
"""Bytes of GPU memory that may be in use more than before the engine was started."""
GOALS = {False: 8.0, True: 1.5}
"""Seconds until the next step, at the median: without and with a spare process."""


class Killed(NamedTuple):
    """One kill: after which step, and the seconds from it until the process was reaped, until the new one had the
    weights, and until that began a step."""

    step: int
    gone: float
    up: float
    seconds: float


class Run:
    """One engine, one kind of request."""

    def __init__(self, supervisor: Supervisor, report: Report, args: argparse.Namespace, folder: Path) -> None:
        self.supervisor = supervisor
        self.report = report
        self.args = args
        self.folder = folder

    def ask(self, name: str) -> UserParams:
        size = size_of(self.args.size)
        return UserParams(prompt=PROMPT, seed=11, steps=self.args.steps, output=str(self.folder / name), **size)

    @property
    def dit(self) -> StageStatus:
        return next(stage for stage in self.supervisor.status().stages if stage.name == "dit")

    async def calm(self) -> str:
        """The frames' hash when nobody disturbs; says how long a step takes."""
        before = self.dit.busy_seconds
        began = time.monotonic()
        await self.supervisor.generate(self.ask("calm.mp4"))
        step = (self.dit.busy_seconds - before) / self.args.steps
        self.report.say(f"undisturbed: {time.monotonic() - began:.1f} s, {step:.3f} s per step")
        return digest(self.folder / "calm.mp4")

    async def disturbed(self, dice: random.Random) -> tuple[str, list[Killed]]:
        """The frames' hash with kills, and what became of each."""
        if self.args.spare:
            await self._spare_loaded()
        request = asyncio.create_task(self.supervisor.generate(self.ask("killed.mp4")))
        step_seconds = self.dit.busy_seconds / max(1, self.dit.quanta)
        killed: list[Killed] = []
        for number in range(self.args.kills):
            first = number * (self.args.steps - 1) // self.args.kills  # the last step is left alone
            await self._until(lambda first=first: self._step() >= first and self.dit.state == "up", request)
            if self.args.spare:
                await self._spare_loaded()
            await asyncio.sleep(dice.random() * step_seconds)
            kill = await self._kill(request)
            self.report.say(
                f"killed after step {kill.step:2}: {kill.seconds:.2f} s until the next step "
                f"(gone after {kill.gone:.2f}, loaded after {kill.up:.2f})"
            )
            killed.append(kill)
        await asyncio.wait_for(request, PATIENCE)
        return digest(self.folder / "killed.mp4"), killed

    async def _kill(self, request: asyncio.Task[Any]) -> Killed:
        victim, step = self.dit.pid, self._step()
        assert victim is not None and not request.done(), "the request was done before all kills were"
        at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        await self._until(lambda: self.dit.pid not in (victim, None), request)
        gone = time.monotonic() - at
        before = self.dit.quanta, self.dit.busy_seconds
        await self._until(lambda: self.dit.state == "up", request)
        up = time.monotonic() - at
        await self._until(lambda: self.dit.quanta > before[0], request)
        done = time.monotonic()
        return Killed(step, gone, up, done - at - (self.dit.busy_seconds - before[1]))

    async def _spare_loaded(self) -> None:
        """There is a spare, and it has been at rest for a while."""
        await self._until(lambda: self.supervisor.status().spare_pid is not None)
        pid = self.supervisor.status().spare_pid
        assert pid is not None
        used, since = cpu_ticks(pid), time.monotonic()
        while time.monotonic() - since < REST:
            await asyncio.sleep(0.1)
            if (now := cpu_ticks(pid)) > used + 2:
                used, since = now, time.monotonic()

    async def _until(self, condition: Any, request: asyncio.Task[Any] | None = None) -> None:
        """`request` has to be running meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if request is not None and request.done():
                request.result()  # its error, if it has one
                if condition():
                    return
                raise RuntimeError("the request was done before all kills were; ask for more steps")
            if time.monotonic() > deadline:
                raise RuntimeError(f"stuck: {self.dit}")
            await asyncio.sleep(0.005)

    def _step(self) -> int:
        """Steps done of the request that runs."""
        return max(
            (t.step for t in self.supervisor.tasks() if t.state == "running" and t.phase == "denoise"), default=0
        )


def cpu_ticks(pid: int) -> int:
    """What a process has computed, in clock ticks; 0 when it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


@contextlib.contextmanager
def out_of_reach(directory: Path | None, components: Iterable[str]) -> Iterator[None]:
    """The weights of these components have another name meanwhile; the tokenizer stays, a new request is checked with
    it."""
    moves = [] if directory is None else [(directory / c, directory / f"{c}.away") for c in components]
    for here, away in moves:
        here.rename(away)
    try:
        yield
    finally:
        for here, away in moves:
            away.rename(here)


async def survive(args: argparse.Namespace, place: Workplace, report: Report, folder: Path) -> None:
    """Everything, for one model."""
    checkpoint = place.checkpoint(report, args.model)
    params = SystemParams(
        model=args.model, checkpoint=None if checkpoint is None else str(checkpoint), device=args.device,
        warm_spare=args.spare,
    )  # fmt: skip
    began = time.monotonic()
    async with Supervisor(params) as supervisor:
        await supervisor.ready()
        report.say(f"ready in {time.monotonic() - began:.1f} s; memory that outlives: {supervisor.status().outliving}")
        run = Run(supervisor, report, args, folder)
        golden = await run.calm()
        with out_of_reach(checkpoint, place.model(args.model).components):
            found, killed = await run.disturbed(random.Random(args.seed))
        judge(run, report, golden == found, [kill.seconds for kill in killed])


def judge(run: Run, report: Report, same: bool, seconds: list[float]) -> None:
    """What must hold; the times are those of a GPU."""
    report.check(same, f"kills: {len(seconds)}; the frames are those of the undisturbed run")
    report.check(run.dit.restarts == len(seconds), f"restarts of the dit: {run.dit.restarts}")
    report.check(not run.supervisor.check_integrity(), "all accounts of the shared memory are in order")
    median = statistics.median(seconds)
    text = f"until the next step: median {median:.2f} s, {min(seconds):.2f} to {max(seconds):.2f}"
    if run.supervisor.device == "cpu":
        report.say(f"     {text}")
    else:
        report.check(median <= GOALS[run.args.spare], f"{text}; at most {GOALS[run.args.spare]} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="see `engine models`")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    add_options(parser)
    parser.add_argument("--spare", action="store_true", help="with a warm spare process")
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills")
    args = parser.parse_args()
    args.seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    place = Workplace(args.work.absolute(), False, args.device)
    name = f"survive-{args.model}{'-spare' if args.spare else ''}.txt"
    words = f"{args.model} --kills {args.kills} --steps {args.steps}" + (f" --size {args.size}" if args.size else "")
    report = Report(
        f"{words}{' --spare' if args.spare else ''} --seed {args.seed}", args.out and args.out / name, place.directory,
        tool="survive",
    )  # fmt: skip
    for line in machine(args.device):
        report.say(line)
    before = gpu_memory_used(args.device)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(survive(args, place, report, Path(folder)))
    if args.device != "cpu":
        left = gpu_memory_used(args.device) - before
        report.check(left <= MOST_LEFT, f"GPU memory in use afterwards: {left / 2**20:+.1f} MiB, at most +2")
    return 0 if all(passed for passed, _ in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
