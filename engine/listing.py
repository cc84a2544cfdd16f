"""The rows of `engine list` as they go on the wire. What has ended never changes: its row is made once and kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from ipc.frames import MAX_FRAME
from ipc.messages.status import TaskInfo

LISTED_PROMPT = 200
"""Characters of each prompt in `list`."""

ROOM = MAX_FRAME - 1024
"""Bytes of a frame for the rows."""

_encoder = msgspec.msgpack.Encoder()


class Row(NamedTuple):
    """A `TaskInfo`, encoded: a few hundred bytes, at most some kilobytes, as paths and errors have their bounds."""

    encoded: msgspec.Raw
    finished: bool


def row_of(task: TaskInfo) -> Row:
    """With its prompt shortened to `LISTED_PROMPT` characters."""
    listed = msgspec.structs.replace(task, prompt=shortened(task.prompt, LISTED_PROMPT))
    return Row(msgspec.Raw(_encoder.encode(listed)), task.state not in ("queued", "running"))


def fitting(rows: Iterable[Row]) -> tuple[list[msgspec.Raw], int]:
    """Those that fit into one frame, in their order, and how many do not: the oldest finished ones go first."""
    rows = list(rows)
    if sum(len(row.encoded) for row in rows) <= ROOM:
        return [row.encoded for row in rows], 0
    unfinished = [i for i, row in enumerate(rows) if not row.finished]
    finished = [i for i, row in enumerate(rows) if row.finished]
    room, kept = ROOM, set[int]()
    for i in unfinished + finished[::-1]:
        room -= len(rows[i].encoded)
        if room < 0:
            break
        kept.add(i)
    return [rows[i].encoded for i in sorted(kept)], len(rows) - len(kept)


def shortened(text: str, most: int) -> str:
    """At most so many characters of it."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"
