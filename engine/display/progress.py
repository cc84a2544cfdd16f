"""What is seen of a request: how far it is, on stderr, and the summary of its video.

Where stderr is no terminal, progress is plain lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TextColumn

from engine.amounts import seconds, size
from ipc.messages.server import Done, Progress
from ipc.messages.status import (
    LoadProgress,
    StageStatus,
)

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines of one phase."""

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
