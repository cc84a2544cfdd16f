"""Times of several variants on one device, taken in turns, with the clock and the power that each was measured at.

A card that is limited by its power holds a clock that depends on what ran before: figures of two runs cannot be
compared, figures of turns in one run can.
"""

from __future__ import annotations

import collections
import importlib.metadata
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple

import torch

from engine.cuda import management_handle

SAMPLE_INTERVAL = 0.05
"""Seconds between two looks at the clock."""
WARM_SECONDS = 10.0


class Timing(NamedTuple):
    """One variant: milliseconds per call, and the medians of the card meanwhile."""

    median: float
    least: float
    most: float
    mhz: float | None
    watts: float | None

    def __str__(self) -> str:
        held = "" if self.mhz is None else f"  at {self.mhz:.0f} MHz, {self.watts:.0f} W"
        return f"{self.median:10.3f} ms ({self.least:.3f} to {self.most:.3f}){held}"


class Card:
    """Looks at the clock and the power in a thread of its own, between `with` and its end; on a CPU, does nothing."""

    def __init__(self, device: str) -> None:
        self._device, self._on_gpu = device, device.startswith("cuda")
        self._label = ""
        self._samples: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Card:
        if self._on_gpu:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._on_gpu:
            self._thread.join()

    def turn(self, label: str) -> None:
        """Whose turn it is; "" for nobody's."""
        self._label = label

    def held(self, label: str) -> tuple[float | None, float | None]:
        """Median MHz and watts in the turns of `label`."""
        samples = self._samples.get(label)
        if not samples:
            return None, None
        clocks, watts = zip(*samples, strict=True)
        return statistics.median(clocks), statistics.median(watts)

    def _look(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        handle = management_handle(self._device)
        while not self._stop.wait(SAMPLE_INTERVAL):
            label = self._label
            clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
            if label and label == self._label:
                self._samples[label].append((clock, watts))
        pynvml.nvmlShutdown()


def in_turns(
    card: Card,
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    calls: int = 1,
    warm: float | None = WARM_SECONDS,
) -> dict[str, Timing]:
    """All in turns, at least once, until the device is warm after `warm` seconds (None: it is already); then `rounds`
    turns of `calls` calls each."""
    end = time.monotonic() + (warm if warm is not None and device.startswith("cuda") else 0)
    while warm is not None:
        for call in variants.values():
            call()
        synchronize(device)
        if time.monotonic() >= end:
            break
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            card.turn(name)
            taken[name].append(milliseconds(call, device, calls))
            card.turn("")
    return {name: Timing(statistics.median(t), min(t), max(t), *card.held(name)) for name, t in taken.items()}


def milliseconds(call: Callable[[], object], device: str, calls: int = 1) -> float:
    """Per call, of `calls` in a row: by CUDA events on a GPU, by the clock on a CPU."""
    if not device.startswith("cuda"):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return 1000 * (time.perf_counter() - began) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine_lines(device: str, *packages: str) -> list[str]:
    """What figures hold for: the device, the driver, the versions."""
    versions = []
    for name in ("torch", *packages):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    lines = [f"Python {platform.python_version()}, {', '.join(versions)}; {os.cpu_count()} cores"]
    if device.startswith("cuda"):
        import pynvml

        pynvml.nvmlInit()
        handle = management_handle(device)
        limit = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
        driver, name = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetName(handle)
        pynvml.nvmlShutdown()
        cudnn = torch.backends.cudnn.version()
        lines.insert(0, f"{name}, {limit:.0f} W, driver {driver}, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    return lines
