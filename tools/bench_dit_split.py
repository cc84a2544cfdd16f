"""A part of tools/bench_dit.py: where the time of one forward goes, each kind of work against its floor.

Every product and every attention is put between two CUDA events as it is called; the rest is what is left of the whole.
The events cost nothing where the launches run ahead of the GPU, which they do at the sizes that are measured here.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ipc.architecture import TransformerConfig
from stages.models import feed_forward, transformer
from tools.bench_dit_parts import Setup
from tools.gpu_timing import WARM_SECONDS, synchronize

FLOP_PER_CLOCK = 4096
"""Of one multiprocessor of a Hopper GPU, dense in bfloat16."""
BANDWIDTH = 3.35e12
"""Bytes a second of an H100's memory."""
KINDS = ("attention", "cross-attention", "products", "the rest")


class Split(NamedTuple):
    """Of one forward, by kind of work."""

    milliseconds: dict[str, float]
    flop: dict[str, float]


class Brackets:
    """Times what is called within it: products and attention by their kind, and all of it together."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._marks: list[tuple[str, Any, Any]] = []
        self._flop: dict[str, float] = collections.defaultdict(float)
        self._inside = False
        self._patches: list[Any] = []

    def __enter__(self) -> Brackets:
        for owner, name, kind, flop in (
            (transformer, "attention", _attention_kind, _attention_flop),
            (feed_forward, "linear_gelu", lambda *given: "products", lambda kind, x, weight, bias: _product(x, weight)),
            (F, "linear", lambda *given: "products", lambda x, weight, bias=None: _product(x, weight)),
        ):
            patch = mock.patch.object(owner, name, self._bracketed(getattr(owner, name), kind, flop))
            patch.start()
            self._patches.append(patch)
        self._began = self._mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._marks.append(("whole", self._began, self._mark()))
        for patch in self._patches:
            patch.stop()

    def split(self) -> Split:
        """After the end, once the device is done."""
        taken: dict[str, float] = collections.defaultdict(float)
        for kind, begin, end in self._marks:
            taken[kind] += begin.elapsed_time(end) if self._on_gpu else 1000 * (end - begin)
        whole = taken.pop("whole")
        taken["the rest"] = whole - sum(taken.values())
        return Split({kind: taken[kind] for kind in KINDS}, dict(self._flop))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _bracketed(
        self, function: Callable[..., Tensor], kind: Callable[..., str], flop: Callable[..., float]
    ) -> Callable[..., Tensor]:
        def called(*given: Any, **named: Any) -> Tensor:
            if self._inside:  # the product in plain torch's product with GELU
                return function(*given, **named)
            self._inside, name, begin = True, kind(*given), self._mark()
            try:
                return function(*given, **named)
            finally:
                self._marks.append((name, begin, self._mark()))
                self._flop[name] += flop(*given, **named)
                self._inside = False

        return called


def _attention_kind(q: Tensor, k: Tensor, v: Tensor, backend: str) -> str:
    return "attention" if q.shape[1] == k.shape[1] else "cross-attention"


def _attention_flop(q: Tensor, k: Tensor, v: Tensor, backend: str) -> float:
    return 4.0 * q.numel() * k.shape[1]


def _product(x: Tensor, weight: Tensor) -> float:
    return 2.0 * x.numel() * weight.shape[0]


def rest_bytes(config: TransformerConfig, tokens: int) -> float:
    """What the passes between the products of all blocks must read and write: the residual stream, a branch and the
    normed rows three times; the queries and keys twice, with the table of RoPE, and the queries of cross-attention."""
    passes, norms = 3 * (2 * 4 + 2 + 2), 3 * (2 + 2)
    return float(config.num_layers * tokens * (config.dim * (passes + norms) + 2 * config.attention_head_dim * 4))


def report(setup: Setup, config: TransformerConfig, tokens: int, call: Callable[[], object], rounds: int) -> None:
    """A line for each kind of work: the median milliseconds of the rounds, and the floor at the clock that was held."""
    end = time.monotonic() + (WARM_SECONDS if setup.device.startswith("cuda") else 0)
    while True:
        call()
        synchronize(setup.device)
        if time.monotonic() >= end:
            break
    splits = []
    for _ in range(rounds):
        setup.card.turn("split")
        with Brackets(setup.device) as brackets:
            call()
        synchronize(setup.device)
        setup.card.turn("")
        splits.append(brackets.split())
    median = {kind: statistics.median(split.milliseconds[kind] for split in splits) for kind in KINDS}
    whole, (mhz, watts) = sum(median.values()), setup.card.held("split")
    held = "" if mhz is None else f" at {mhz:.0f} MHz, {watts:.0f} W"
    setup.say(f"  {tokens} tokens, {rounds} rounds: {whole:.1f} ms{held}")
    for kind in KINDS:
        flop, floor = splits[0].flop.get(kind, 0.0), ""
        if mhz is not None and flop:
            peak = torch.cuda.get_device_properties(setup.device).multi_processor_count * FLOP_PER_CLOCK * mhz * 1e6
            rate = flop / median[kind] / 1e9
            floor = f", {flop / 1e12:.1f} TFLOP at {rate:.0f} TFLOP/s, floor {1e3 * flop / peak:.1f} ms"
        elif mhz is not None:
            moved = rest_bytes(config, tokens)
            floor = f", {moved / 1e9:.1f} GB to move, floor {1e3 * moved / BANDWIDTH:.1f} ms"
        setup.say(f"  {kind:15} {median[kind]:9.2f} ms, {median[kind] / whole:.1%}{floor}")
