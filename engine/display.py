"""What the command line shows: a progress bar, the summary of a finished video, tables.

Progress goes to stderr, results to stdout. Where stderr is no terminal, progress is plain lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TextColumn
from rich.table import Table
from rich.text import Text

from engine.catalogue import ModelCard
from ipc.messages import Done, EngineStatus, Progress, TaskInfo

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines of one phase."""
PLAIN_WIDTH = 200
"""Columns of a table that does not go to a terminal."""

PHASES = {
    "queued": "waiting", "text": "reading the prompt", "encode": "encoding the input", "denoise": "denoising",
    "decode": "decoding", "write": "writing",
}  # fmt: skip


class ProgressView(Protocol):
    """Shows how far a request is, between `with` and its end."""

    def update(self, progress: Progress) -> None: ...
    def note(self, text: str) -> None: ...
    def __enter__(self) -> ProgressView: ...
    def __exit__(self, *exc: object) -> None: ...


class SilentView:
    """Shows notes only: what the user asked for is one JSON object."""

    def update(self, progress: Progress) -> None:
        return None

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> SilentView:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class PlainView(SilentView):
    """A line when the phase changes, and now and then."""

    def __init__(self) -> None:
        self._phase = ""
        self._shown_at = 0.0

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase != self._phase or now - self._shown_at >= PLAIN_INTERVAL:
            self._phase, self._shown_at = progress.phase, now
            self.note(" ".join(filter(None, (PHASES[progress.phase], steps(progress), left(progress)))))


class BarView:
    """A bar on a terminal: phase, step of steps, seconds left."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:18}"), BarColumn(), TextColumn("{task.fields[steps]:>7}"))
        self._bar = Bar(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=None, steps="", left="")

    def update(self, progress: Progress) -> None:
        self._bar.update(
            self._task, description=PHASES[progress.phase], completed=progress.step, total=progress.steps or None,
            steps=steps(progress), left=left(progress),
        )  # fmt: skip

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


def seconds(value: float) -> str:
    """0.42 s, 4.2 s, 42 s, 7 min 2 s, 3 h 4 min."""
    if value < 60:
        return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(value: float) -> str:
    """Bytes, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.{0 if unit == 'B' or value >= 10 else 1}f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def count(value: float) -> str:
    """A number of parameters: 5.1 M, 1.4 B."""
    return f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"


def summary(done: Done, elapsed: float, loading: float) -> list[str]:
    """Where the video is, what it is, what it cost."""
    params: dict[str, Any] = done.metadata["parameters"]
    frames, fps = params["num_frames"], params["fps"]
    cost: dict[str, float] = ({"load": loading} if loading else {}) | done.metadata["seconds"]
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


def print_models(cards: Sequence[ModelCard]) -> None:
    """`engine models`."""
    rows = [
        (
            card.name,
            count(card.transformer_parameters),
            f"{card.width}x{card.height}, {card.num_frames} frames at {card.fps} fps",
            f"{card.steps} steps, guidance {card.guidance_scale:g}",
            card.weights_missing or f"here, {size(card.weights_bytes)}",
        )
        for card in cards
    ]
    print_table(("model", "parameters", "usual video", "usual sampling", "weights"), rows)


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


def print_status(status: EngineStatus) -> None:
    """`engine status`."""
    accepting = "accepting requests" if status.accepting else "stopping"
    up = seconds(status.uptime_seconds)
    print(
        f"engine {status.engine} with {status.model}, pid {status.pid}, up {up}, {accepting}\n"
        f"{status.running} running, {status.waiting} waiting, {status.finished} done, {status.failed} failed; "
        f"supervisor {size(status.resident_bytes)}\n"
    )
    stages = [
        (s.name, s.state, s.pid or "-", s.device, s.restarts, size(s.resident_bytes), seconds(s.busy_seconds), s.quanta)
        for s in status.stages
    ]
    print_table(("stage", "state", "pid", "device", "restarts", "memory", "busy", "quanta"), stages)
    print()
    queues = [
        (q.name, f"{q.depth}/{q.slots}", q.peak, q.puts, size(q.bytes), size(q.slot_bytes)) for q in status.queues
    ]
    print_table(("queue", "depth", "peak", "puts", "passed", "slot"), queues)
