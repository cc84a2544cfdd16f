"""What models there are, what a checkpoint is, and what a video takes: `engine models`, `engine check`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import msgspec

from engine.amounts import count, size
from engine.catalogue import ModelCard
from engine.check import CheckReport
from engine.display.tables import print_table
from engine.footprint import Coefficient, Need, measured


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
