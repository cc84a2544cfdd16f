"""What the command line shows: a progress bar, the summary of a finished video, tables.

Progress goes to stderr, results to stdout. Where stderr is no terminal, progress is plain lines.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TextColumn
from rich.table import Table
from rich.text import Text

from engine.amounts import said_blocks, size
from engine.catalogue import ModelCard
from engine.check import CheckReport
from engine.footprint import Coefficient, Need, measured
from ipc.messages.server import Done, Progress, Reloaded, Replaced, SupervisorReloaded
from ipc.messages.status import (
    DeviceMemory,
    EngineStatus,
    Holding,
    LoadProgress,
    LoraInfo,
    MemoryChange,
    StageStatus,
    TaskInfo,
    VersionInfo,
)

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines of one phase."""
PLAIN_WIDTH = 200
"""Columns of a table that does not go to a terminal."""

PHASES = {
    "queued": "waiting", "text": "reading the prompt", "encode": "encoding the input", "denoise": "denoising",
    "decode": "decoding", "write": "writing",
}  # fmt: skip


class ProgressView(Protocol):
    """Shows how far the loading of weights and a request are, between `with` and its end."""

    def update(self, progress: Progress) -> None: ...
    def load(self, components: Sequence[LoadProgress]) -> None: ...
    def wait_for(self, stages: Sequence[StageStatus]) -> None: ...
    def note(self, text: str) -> None: ...
    def __enter__(self) -> ProgressView: ...
    def __exit__(self, *exc: object) -> None: ...


class SilentView:
    """Shows notes only: what the user asked for is one JSON object."""

    def update(self, progress: Progress) -> None:
        return None

    def load(self, components: Sequence[LoadProgress]) -> None:
        return None

    def wait_for(self, stages: Sequence[StageStatus]) -> None:
        return None

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> SilentView:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class LoadMeter:
    """What is said of the weights as they are read: which, how much of how much, how fast."""

    def __init__(self) -> None:
        self.done = 0
        """Bytes, of all components."""
        self.total = 0
        self.seconds = 0.0
        """Since the first byte was heard of."""
        self._reading: list[str] = []
        self._began: float | None = None

    def update(self, components: Sequence[LoadProgress]) -> None:
        self.done, self.total = sum(c.done for c in components), sum(c.total for c in components)
        self._reading = [c.component for c in components if 0 < c.done < c.total]
        now = time.monotonic()
        if self._began is None and self.done:
            self._began = now
        self.seconds = 0.0 if self._began is None else now - self._began

    @property
    def complete(self) -> bool:
        return 0 < self.total == self.done

    @property
    def what(self) -> str:
        return f"loading {', '.join(self._reading)}".rstrip()

    @property
    def amount(self) -> str:
        return f"{size(self.done)} of {size(self.total)}"

    @property
    def rate(self) -> str:
        return f"{size(self.done / self.seconds)}/s" if self.seconds else ""


class PlainView(SilentView):
    """A line when the phase changes, and now and then."""

    def __init__(self) -> None:
        self._phase = ""
        self._shown_at = time.monotonic()
        self._meter = LoadMeter()

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase != self._phase or now - self._shown_at >= PLAIN_INTERVAL:
            self._phase, self._shown_at = progress.phase, now
            self.note(" ".join(filter(None, (PHASES[progress.phase], steps(progress), left(progress)))))

    def load(self, components: Sequence[LoadProgress]) -> None:
        was_complete, now = self._meter.complete, time.monotonic()
        self._meter.update(components)
        if was_complete:
            return
        if self._meter.complete:
            self.note(" ".join(("loaded", size(self._meter.total), self._meter.rate)).rstrip())
        elif self._meter.done and now - self._shown_at >= PLAIN_INTERVAL:
            self._shown_at = now
            self.note(f"{self._meter.what}: {self._meter.amount} {self._meter.rate}".rstrip())

    def wait_for(self, stages: Sequence[StageStatus]) -> None:
        now = time.monotonic()
        if self._phase != "loading" or now - self._shown_at >= PLAIN_INTERVAL:
            self._phase, self._shown_at = "loading", now
            self.note(" ".join(filter(None, ("waiting for the engine, which is loading its weights", reading(stages)))))


class BarView:
    """A bar on a terminal: phase, step of steps, seconds left; while weights are read, bytes and their rate."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:18}"), BarColumn(), TextColumn("{task.fields[steps]:>7}"))
        self._bar = Bar(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=None, steps="", left="")
        self._meter = LoadMeter()

    def update(self, progress: Progress) -> None:
        self._bar.update(
            self._task, description=PHASES[progress.phase], completed=progress.step, total=progress.steps or None,
            steps=steps(progress), left=left(progress),
        )  # fmt: skip

    def load(self, components: Sequence[LoadProgress]) -> None:
        self._meter.update(components)
        meter = self._meter
        if meter.done:
            self._bar.update(
                self._task, description=meter.what, completed=meter.done, total=meter.total, steps=meter.amount,
                left=meter.rate,
            )  # fmt: skip

    def wait_for(self, stages: Sequence[StageStatus]) -> None:
        self._bar.update(
            self._task, description="engine is loading", completed=0, total=None, steps="", left=reading(stages)
        )

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def __enter__(self) -> BarView:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


def progress_view(quiet: bool) -> ProgressView:
    """The view that suits stderr."""
    if quiet:
        return SilentView()
    return BarView() if sys.stderr.isatty() else PlainView()


def steps(progress: Progress) -> str:
    return f"{progress.step}/{progress.steps}" if progress.steps and progress.phase != "queued" else ""


def left(progress: Progress) -> str:
    return "" if progress.seconds_left is None else f"{seconds(progress.seconds_left)} left"


def reading(stages: Sequence[StageStatus]) -> str:
    """What stages that start are reading, and how much of it is there."""
    found = [s.loading for s in stages if s.loading is not None and s.loading.done < s.loading.total]
    return ", ".join(f"{loading.component} {100 * loading.done // loading.total} %" for loading in found)


def seconds(value: float) -> str:
    """0.42 s, 4.2 s, 42 s, 7 min 2 s, 3 h 4 min."""
    if value < 60:
        return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(value: float) -> str:
    """A number of parameters: 5.1 M, 1.4 B."""
    return f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"


NOTICED = 0.1
"""Seconds of waiting that are worth a word."""


def summary(done: Done, elapsed: float, loading: float, waiting: float = 0.0) -> list[str]:
    """Where the video is, what it is, what it cost; `loading` until the engine was up, `waiting` for other requests."""
    params: dict[str, Any] = done.metadata["parameters"]
    frames, fps = params["num_frames"], params["fps"]
    before = {"load": loading} if loading else {}
    before |= {"wait": waiting} if waiting >= NOTICED else {}
    cost: dict[str, float] = before | done.metadata["seconds"]
    return [
        f"{shown_path(done.path)}  {params['width']}x{params['height']}, {frames} frames at {fps} fps "
        f"({frames / fps:.1f} s), {size(_file_size(done.path))}",
        f"seed {done.metadata['seed']}, {seconds(elapsed)} in all: "
        + ", ".join(f"{phase} {seconds(value)}" for phase, value in cost.items()),
    ]


def shown_path(path: str) -> str:
    """Relative, where it is below the working directory."""
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; unfolded if that is no terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def print_models(cards: Sequence[ModelCard], size_asked: str | None = None) -> None:
    """`engine models`."""
    rows = [
        (
            card.name,
            card.kind,
            ("2 x " if card.experts == 2 else "") + count(card.transformer_parameters),
            f"{card.width}x{card.height}, {card.num_frames} frames",
            card.steps,
            card.weights_missing or f"here, {size(card.weights_bytes)}",
        )
        for card in cards
    ]
    print_table(("model", "kind", "parameters", "usual video", "steps", "weights"), rows)
    memory = [
        (card.name, *(size(need.gpu) for need in card.levels), size(card.levels[-1].host_all),
         slowdown(card.levels[-1])) for card in cards if card.levels
    ]  # fmt: skip
    video = "a usual video" if size_asked is None else f"a video of {size_asked}"
    print(f"\nmemory of one GPU for {video}, at each memory level:\n")
    print_table(("model", *(f"level {level}" for level in range(4)), "host from 2 on", "a step at 3"), memory)
    if refused := [f"not by {card.name}: {card.size_refused}" for card in cards if card.size_refused]:
        print("\n".join(["", *refused]))
    print(f"\n{figures()}")


def figures() -> str:
    """Where these numbers come from."""
    coefficients = measured()
    named = msgspec.structs.asdict(coefficients).items()
    others = [name for name, value in named if isinstance(value, Coefficient) and not value.measured]
    said = f"Weights: from the networks, in bfloat16. The rest: measured on one {coefficients.gpu}"
    said += f", but for these, which are derived or goals: {', '.join(others)}." if others else "."
    return textwrap.fill(f"{said} All figures and their sources: configs/measured/memory.yaml.", 100)


def slowdown(need: Need) -> str:
    """How much longer a step takes than with all weights resident."""
    return "as fast" if need.slowdown < 1.005 else f"{need.slowdown:.2f} x as long"


def print_levels(found: Sequence[Need]) -> None:
    """What one video takes at each memory level."""
    rows = [(LEVELS[n.level], size(n.gpu), size(n.host_all) if n.host_all else "-", slowdown(n)) for n in found]
    print_table(("memory level", "one GPU", "host", "a step"), rows)


LEVELS = (
    "0, all resident", "1, the VAE in tiles", "2, what is not in use on the host", "3, the DiT's blocks streamed"
)  # fmt: skip


SHOWN_TENSORS = 3


def print_check(report: CheckReport) -> None:
    """`engine check`. Of the tensors that are wrong, the first of each kind; `--json` has all."""
    others = [name for name in report.fits if name != report.model]
    also = f" (or {', '.join(others)})" if others and report.model in report.fits else ""
    print(f"{report.directory}: {report.layout} layout, {report.model or 'model not known'}{also}\n")
    rows = [
        (
            c.name,
            files(c.files),
            ", ".join(sorted(c.dtypes)) or "-",
            count(c.parameters) if c.parameters else "-",
            size(c.bytes),
            ("complete" if report.model else "whole") if c.complete else "WRONG" if c.files else "MISSING",
        )
        for c in report.components
    ]
    print_table(("component", "files", "dtype", "parameters", "on disk", ""), rows)
    wrong = [f"{c.name}: {c.problem or tensors(c.wrong)}" for c in report.components if not c.complete]
    print("\n".join(["", *report.problems, *wrong, ""]))
    if report.gpu is None or report.cpu is None:
        return
    gpu, cpu = report.gpu, report.cpu
    needs = [(c.name, size(gpu.components[c.name]), size(cpu.components[c.name])) for c in report.components]
    needs.append(("all of them", size(gpu.resident), size(cpu.resident)))
    print_table(("weights in memory", "one GPU, bfloat16", "CPU, float32"), needs)
    print(f"\nshared host memory of the queues: {size(report.queue_bytes)}")
    if report.size is not None:
        video = report.size
        print(f"\na video of {video.width}x{video.height}, {video.frames} frames, takes with everything:\n")
        print_levels(report.levels)
        print(f"\n{figures()}")


def tensors(wrong: Mapping[str, Sequence[str]]) -> str:
    """How many are wrong in which way, and the first of each."""
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:SHOWN_TENSORS])}" + (", ..." if len(names) > SHOWN_TENSORS else "")
        for what, names in wrong.items()
    )


def files(names: Sequence[str]) -> str:
    """The only one, or the first of so many."""
    if len(names) < 2:
        return names[0] if names else "-"
    return f"{names[0]} and {len(names) - 1} more"


def print_tasks(tasks: Sequence[TaskInfo]) -> None:
    """`engine list`."""
    now = time.time()
    rows = [
        (
            task.id[:8],
            task.state,
            f"{task.phase} {task.step}/{task.steps}" if task.state == "running" else "",
            f"{seconds(max(0.0, now - task.submitted_at))} ago",
            task.prompt if len(task.prompt) <= 48 else task.prompt[:47] + "\u2026",
            task.error.message if task.error is not None else task.path,
        )
        for task in tasks
    ]
    print_table(("id", "state", "step", "submitted", "prompt", "video"), rows)


def state(stage: StageStatus) -> str:
    """Of a stage that starts: what it loads, and how much of it is there."""
    loading = stage.loading
    if loading is None or loading.done >= loading.total:
        return stage.state
    return f"loading {loading.component} {100 * loading.done // loading.total} %"


OUTLIVING = {
    "host": "weights and states outlive the stages in host memory",
    "gpu": "weights and states outlive the stages in GPU memory",
    "no": "weights do not outlive the stages: this GPU's driver has no memory that does",
}


def print_status(status: EngineStatus) -> None:
    """`engine status`."""
    accepting = "accepting requests" if status.accepting else "stopping"
    up = seconds(status.uptime_seconds)
    print(
        f"engine {status.engine} with {status.model}, pid {status.pid}, up {up}, {accepting}\n"
        f"{status.running} running, {status.waiting} waiting, {status.finished} done, {status.failed} failed; "
        f"supervisor {size(status.resident_bytes)}\n"
        f"{OUTLIVING[status.outliving]}{f', spare process {status.spare_pid}' if status.spare_pid else ''}"
        f"{f', stages are forked from process {status.forks_pid}' if status.forks_pid else ''}\n"
    )
    stages = [
        (
            s.name,
            state(s),
            s.pid or "-",
            s.device,
            s.restarts,
            size(s.resident_bytes),
            seconds(s.busy_seconds),
            s.quanta,
            s.computes.get("threads", "-"),
            s.computes.get("attention", "-"),
        )
        for s in status.stages
    ]
    columns = ("stage", "state", "pid", "device", "restarts", "memory", "busy", "quanta", "threads", "attention")
    print_table(columns, stages)
    print()
    queues = [
        (q.name, f"{q.depth}/{q.slots}", q.peak, q.puts, size(q.bytes), size(q.slot_bytes)) for q in status.queues
    ]
    print_table(("queue", "depth", "peak", "puts", "passed", "slot"), queues)
    if any(device.device != "cpu" or device.plan.level for device in status.memory):
        print()
        print_plans(status.memory)
    if status.weights:
        print()
        weights = [(name, content, loras(status, name) or "-") for name, content in status.weights.items()]
        print_table(("weights", "content hash", "LoRAs"), weights)


READY = (
    "ready levels: a change to one of these holds from the next step on. The others compute from copies of the weights "
    "in host memory, which are read first when such a level is asked for, unless the column of the copies says why not."
)


def print_memory_levels(devices: Sequence[DeviceMemory]) -> None:
    """`engine memory`: a row for each device, and below them what its levels are."""
    print_plans(devices)
    print(f"\n{textwrap.fill(READY, 100)}")


def print_plans(devices: Sequence[DeviceMemory]) -> None:
    """A row for each device; below them, of whose weights in host memory the pages could not be locked."""
    rows = [
        (d.device, level(d), mode(d), ", ".join(map(str, d.levels)), copies(d), used(d.sample), last_change(d.last))
        for d in devices
    ]
    columns = ("device", "memory level", "mode", "ready levels", "copies on the host", "GPU memory", "last change")
    print_table(columns, rows)
    for device in devices:
        if device.slow:
            print(f"\n{textwrap.fill(f'{device.device}: {device.slow}', 100)}")


def level(device: DeviceMemory) -> str:
    plan = device.plan
    return str(plan.level) + (
        "" if plan.blocks is None else f", {said_blocks(plan.blocks)} stay{'s' if plan.blocks == 1 else ''}"
    )


def mode(device: DeviceMemory) -> str:
    """Who chooses the level, and within what."""
    return device.mode + ("" if device.budget is None else f", budget {size(device.budget)}")


def copies(device: DeviceMemory) -> str:
    """How far they are, or why there are none."""
    found = device.copies
    if found.state == "reading":
        return f"{size(found.done)} of {size(found.total)}"
    return found.problem or found.state


def used(sample: Mapping[str, Any] | None) -> str:
    """What was last seen of a GPU."""
    if sample is None or sample["total"] is None:
        return "-"
    parts = [("ours", sample["ours"]), ("others'", sample["others"]), ("free", sample["free"])]
    return ", ".join(f"{size(amount)} {whose}" for whose, amount in parts if amount is not None)


def last_change(change: MemoryChange | None) -> str:
    if change is None:
        return "-"
    failed = "" if change.error is None else f"; failed: {change.error.message}"
    return f"{change.before.level} to {change.after.level} in {seconds(change.seconds)}: {change.why}{failed}"


def loras(status: EngineStatus, component: str) -> str:
    """What is merged into a component."""
    return ", ".join(f"{lora.file}:{lora.strength:g}" for lora in status.loras if lora.component == component)


def print_reloaded(done: Reloaded) -> None:
    """`engine reload` and `engine rollback`."""
    for name, content in done.weights.items():
        print(f"{name}: {'would become' if done.dry_run else 'is now'} {content[:12]}")
    for name, content in done.unchanged.items():
        print(f"{name}: {content[:12]}, as before")
    if done.bytes:
        print(f"{size(done.bytes)} read and verified in {done.seconds:.1f} s")
    if done.running:
        print(f"requests that finish on what was served before: {done.running}")


def print_replaced(done: Replaced) -> None:
    """`engine reload --stage`."""
    for seat, pid in done.pids.items():
        print(f"{seat}: process {pid}, ready {done.seconds[seat]:.2f} s after its predecessor had left")


def print_taken_over(done: SupervisorReloaded) -> None:
    """`engine reload --supervisor`."""
    print(f"engine {done.engine} has taken over; nothing was answered for {done.paused:.2f} s")


def print_versions(found: Sequence[VersionInfo]) -> None:
    """`engine versions`."""
    rows = [
        (v.component, v.content[:12], v.state, v.source, ", ".join(v.placed) or "-", size(v.bytes) if v.bytes else "-",
         v.served, v.running)
        for v in sorted(found, key=lambda v: (v.component, v.state != "serving"))
    ]  # fmt: skip
    print_table(("component", "version", "state", "from", "placed", "bytes", "videos", "running"), rows)


def print_loras(found: Sequence[LoraInfo]) -> None:
    """`engine lora list`."""
    rows = [
        (i.name, i.state, ", ".join(i.files), ", ".join(f"{name} {c[:12]}" for name, c in i.content.items()),
         i.rank or "-", i.tensors or "-", size(i.bytes) if i.bytes else "-", i.running)
        for i in found
    ]  # fmt: skip
    print_table(("LoRA", "state", "from", "adds", "rank", "tensors", "bytes", "running"), rows)


def print_memory(held: Sequence[Holding]) -> None:
    """`engine status --memory`."""
    rows = [
        (
            h.name, h.where, "-" if h.slot is None else h.slot, h.state, size(h.bytes), h.task[:8] if h.task else "-",
            "-" if h.sequence is None else h.sequence, h.writer or "-", h.reader or "-", h.generation[:12] or "-",
        )
        for h in held
    ]  # fmt: skip
    columns = ("memory", "where", "slot", "state", "bytes", "task", "sequence", "writer", "reader", "generation")
    print_table(columns, rows)
