"""Writes a trace, and says what is in it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from engine.trace import KEPT_QUANTA, chrome_trace, of_tasks
from ipc.errors import OutputError
from ipc.messages.server import Traced


def check_target(out: Path) -> None:
    """Before something takes its time: `OutputError` if it can be told now that the file cannot be written."""
    folder = out.absolute().parent
    if not folder.is_dir():
        problem = "there is no such directory"
    elif out.is_dir():
        problem = "it is a directory"
    elif not os.access(out if out.exists() else folder, os.W_OK):
        problem = "this user may not write there"
    else:
        return
    raise OutputError(f"the trace cannot be written to {out}: {problem}")


def write_trace(out: Path, traced: Traced, identity: str | None = None, last: bool = False) -> str:
    """Of the tasks that `of_tasks` finds; a line for people. Raises `NotFound`, or `OutputError` if the file cannot be
    written."""
    spans = of_tasks(traced.spans, identity, last)
    try:
        out.write_bytes(msgspec.json.encode(chrome_trace(spans, traced.clock, traced.changes)))
    except OSError as error:
        raise OutputError(f"the trace cannot be written to {out}: {error.strerror}") from error
    requests = len({span.task for span in spans})
    of = "1 request" if requests == 1 else f"{requests} requests"
    quanta = "1 quantum" if len(spans) == 1 else f"{len(spans)} quanta"
    cut = len(traced.spans) == KEPT_QUANTA and traced.spans[0] in spans
    older = f" (the engine keeps {KEPT_QUANTA}: what ran before is not in it)" if cut else ""
    return f"{out}: {quanta} of {of}{older}; open it in ui.perfetto.dev"
