"""When each quantum ran, and where, and when memory levels changed: the latest of them, and the same as a file for
Perfetto.

Pure: no clock and no I/O.
"""

from __future__ import annotations

import collections
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.amounts import said_blocks, size
from ipc.errors import NotFound
from ipc.messages.names import Phase, Seat
from ipc.messages.reports import QuantumDone, QuantumDropped, QuantumFailed
from ipc.messages.status import Copied, MemoryChange, Span

KEPT_QUANTA = 2048
"""Of about 20 requests of 50 steps and 81 frames."""

KEPT_CHANGES = 128
"""Of memory levels. Each is up to a kilobyte, and all have to fit into a frame beside the quanta."""

STAGES, DEVICES = 1, 2
"""The groups of rows in the file, which are "processes" there."""


class Trace:
    """The latest quanta that were run, and changes of memory levels."""

    def __init__(
        self, devices: Mapping[Seat, str | None], spans: Iterable[Span] = (), changes: Iterable[MemoryChange] = ()
    ) -> None:
        """`devices`: the compute token that each seat needs; `spans`, `changes`: of the program before this one."""
        self._devices = devices
        self._spans = collections.deque(spans, maxlen=KEPT_QUANTA)
        self._changes = collections.deque(changes, maxlen=KEPT_CHANGES)
        self._granted: dict[Seat, dict[tuple[str, Phase, int], float]] = {seat: {} for seat in devices}
        """Times of the grants that are not answered, of each seat."""

    def move(self, devices: Mapping[Seat, str | None]) -> None:
        """The seats need other compute tokens from now on."""
        self._devices = devices

    def grant(self, seat: Seat, identity: str, phase: Phase, index: int, now: float) -> None:
        """The process at this seat was told to run a quantum."""
        self._granted[seat][identity, phase, index] = now

    def answer(self, seat: Seat, report: QuantumDone | QuantumFailed | QuantumDropped) -> None:
        """It answered. What the program before this one has granted counts as granted when it began."""
        granted = self._granted[seat].pop((report.id, report.phase, report.index), None)
        if isinstance(report, QuantumDropped):
            return
        self._spans.append(
            Span(
                task=report.id, seat=seat, device=self._devices[seat], phase=report.phase, index=report.index,
                granted=report.begin if granted is None else granted, begin=report.begin,
                end=report.begin + report.seconds, failed=isinstance(report, QuantumFailed),
                copied=report.copied if isinstance(report, QuantumDone) else None,
                delivered=report.delivered if isinstance(report, QuantumDone) else None,
            )
        )  # fmt: skip

    def lose(self, seat: Seat) -> None:
        """Its process is dead: what was granted to it will not be answered."""
        self._granted[seat].clear()

    def change(self, change: MemoryChange) -> None:
        """A device keeps to another memory plan, or could not."""
        self._changes.append(change)

    def changes(self) -> list[MemoryChange]:
        """In their order."""
        return list(self._changes)

    def spans(self) -> list[Span]:
        """In the order of the answers."""
        return list(self._spans)


def of_tasks(spans: Sequence[Span], start: str | None, last: bool) -> list[Span]:
    """Those of tasks whose id begins with `start`, or of the task that began last, or all. `NotFound` if there are
    none."""
    if not spans:
        raise NotFound("this engine has not run anything yet")
    if last:
        began: dict[str, float] = {}
        for span in spans:
            began[span.task] = min(span.begin, began.get(span.task, span.begin))
        start = max(began, key=began.__getitem__)
    found = [span for span in spans if start is None or (start and span.task.startswith(start))]
    if not found:
        raise NotFound(f"nothing is remembered of a request whose id starts with {start!r}: see `engine list`")
    return found


def chrome_trace(spans: Sequence[Span], clock: float, changes: Sequence[MemoryChange] = ()) -> dict[str, Any]:
    """At least one span, and changes of memory levels, as an object of Chrome's trace event format, which Perfetto and
    chrome://tracing open; `clock` as in `Traced`.

    A row for each seat, and one for each compute token with whatever ran with it; a slice for each quantum, in
    microseconds since the first grant or copy. Where weights come from host memory, a row for the copies to each
    device, with a slice for those of each quantum; another for the copies of what quanta made, such as frames. In a row
    for each device an instant for each change, of those between the first grant and the last end.
    """
    spans = sorted(spans, key=lambda span: span.begin)
    copies = [copies for span in spans for copies in _copies_of(span)]
    begins = [span.granted for span in spans] + [copied.begin for _, copied, _ in copies]
    zero, end = min(begins), max(span.end for span in spans)
    changes = [change for change in changes if zero <= change.at <= end]
    places = [place for span in spans for place in _places(span)] + [row for row, _, _ in copies]
    rows = _rows(places + [_row(change) for change in changes])
    events = _titles(rows)
    for change in changes:
        group, name = _row(change)
        events.append(_instant(change, zero) | {"pid": group, "tid": rows[group, name]})
    for span in spans:
        for group, name in _places(span):
            events.append(_slice(span, zero) | {"pid": group, "tid": rows[group, name]})
    for (group, name), copied, span in copies:
        events.append(_copies_slice(span, copied, zero) | {"pid": group, "tid": rows[group, name]})
    began = datetime.datetime.fromtimestamp(zero + clock, datetime.UTC)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"began": began.isoformat()}}


def _places(span: Span) -> list[tuple[int, str]]:
    """(group, row) of each row that shows it."""
    stage = (STAGES, str(span.seat))
    return [stage] if span.device is None else [stage, (DEVICES, span.device)]


def _copies_of(span: Span) -> list[tuple[tuple[int, str], Copied, Span]]:
    """Its copies, each with its row."""
    device = span.device or span.seat
    copies = ((f"{device} copies", span.copied), (f"{device} copies out", span.delivered))
    return [((DEVICES, row), copied, span) for row, copied in copies if copied is not None]


def _row(change: MemoryChange) -> tuple[int, str]:
    return (DEVICES, f"{change.device} memory level")


def _rows(places: Iterable[tuple[int, str]]) -> dict[tuple[int, str], int]:
    """A number for each row, no two the same: Perfetto takes it for the thread id of a system."""
    found = dict.fromkeys(places)
    return {place: number for number, place in enumerate(sorted(found, key=lambda place: place[0]), 1)}


def _titles(rows: Mapping[tuple[int, str], int]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": group, "args": {"name": name}}
        for group, name in ((STAGES, "stages"), (DEVICES, "devices"))
    ]
    for (group, name), number in rows.items():
        at = {"ph": "M", "pid": group, "tid": number}
        events.append({"name": "thread_name", **at, "args": {"name": name}})
        events.append({"name": "thread_sort_index", **at, "args": {"sort_index": number}})
    return events


def _slice(span: Span, zero: float) -> dict[str, Any]:
    """A complete event, without its place."""
    begin, end = (round((time - zero) * 1e6, 3) for time in (span.begin, span.end))
    return {
        "name": f"{span.phase} {span.index}", "cat": span.phase, "ph": "X", "ts": begin, "dur": round(end - begin, 3),
        "args": {
            "task": span.task, "phase": span.phase, "index": span.index, "failed": span.failed,
            "milliseconds_after_grant": round((span.begin - span.granted) * 1e3, 3),
        },
    }  # fmt: skip


def _copies_slice(span: Span, copied: Copied, zero: float) -> dict[str, Any]:
    """A complete event, without its place."""
    begin, end = (round((time - zero) * 1e6, 3) for time in (copied.begin, copied.end))
    rate = copied.bytes / copied.seconds / 1e9 if copied.seconds else 0.0
    return {
        "name": size(copied.bytes), "cat": "copies", "ph": "X", "ts": begin, "dur": round(end - begin, 3),
        "args": {
            "task": span.task, "phase": span.phase, "index": span.index, "bytes": copied.bytes,
            "milliseconds": round(copied.seconds * 1e3, 3), "gigabytes_per_second": round(rate, 2),
        },
    }  # fmt: skip


def _instant(change: MemoryChange, zero: float) -> dict[str, Any]:
    """Without its place."""
    wanted = f"level {change.after.level}" + (
        "" if change.after.blocks is None else f", {said_blocks(change.after.blocks)}"
    )
    return {
        "name": wanted if change.error is None else f"not {wanted}", "cat": "memory", "ph": "i", "s": "t",
        "ts": round((change.at - zero) * 1e6, 3),
        "args": {
            "from": change.before.level, "why": change.why, "milliseconds": round(change.seconds * 1e3, 3),
            "error": None if change.error is None else change.error.message,
        },
    }  # fmt: skip
