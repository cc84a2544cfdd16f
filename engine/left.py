"""What an engine that was killed has left: requests that have not ended, how others have, and videos that are whole of
which it did not come to write down that they are.

The writer gives a video its name before the journal has that the request has ended. A kill between the two leaves a
request that looks as if it had not ended, and its video, which says whose it is (`ipc/result.py`). It is taken for
ended then: ids are random and never a client's choice, so nobody else's file says that it is this request's, unless by
the hand of somebody who may write in that directory, and could as well remove the video.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.adapters import KeptAdapter
from engine.journal import Ended, Ending, Entry, Journal
from engine.params import ModelParams
from engine.tasks import chunks_of
from ipc.errors import OutputError
from ipc.files import Directory
from ipc.messages.job import Job
from ipc.messages.server import Done, Progress
from ipc.result import clean, comment_of, json_name, json_text, metadata_of, write_json

LOOK_TIMEOUT = 60.0
"""Seconds in which all videos are looked at. One that was not is made again."""
OVERHEAD = 16 << 20
"""Bytes that a video may have beside its frames."""

log = logging.getLogger(__name__)


class Left(NamedTuple):
    """What there is to take up."""

    entries: Sequence[Entry] = ()
    """Of requests that have not ended, oldest first."""
    ended: Sequence[Ended] = ()
    """The latest last."""
    adapters: Sequence[KeptAdapter] = ()


async def take_stock(journal: Journal, model: ModelParams) -> Left:
    """Open the journal. The adapters are of one model, the requests of all. `BadConfig` if it cannot be used."""
    entries = await journal.open()
    adapters = await journal.adapters(model.name)
    ended = await journal.ended()
    done = await _look(entries) if entries else {}
    for entry in entries:
        if (metadata := done.get(entry.job.id)) is not None:
            log.info("%s was done before the engine was killed: its video is in its place", entry.job.id)
            ended.append(Ended(entry, _done(entry.job, metadata, model)))
            await _write_down(journal, ended[-1])
    return Left([entry for entry in entries if entry.job.id not in done], ended, adapters)


async def _look(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Id -> metadata of those that are done. Files are read in a thread, which is waited for so long and no longer."""
    found: dict[str, dict[str, Any]] = {}
    enough = threading.Event()

    def look() -> None:
        for entry in entries:
            if enough.is_set():
                return
            if (metadata := find_result(entry.job)) is not None:
                found[entry.job.id] = metadata

    try:
        async with asyncio.timeout(LOOK_TIMEOUT):
            await asyncio.to_thread(look)
    except TimeoutError:
        log.warning("not all videos of unfinished requests were looked at within %g s", LOOK_TIMEOUT)
    finally:
        enough.set()
    return dict(found)


def _done(job: Job, metadata: dict[str, Any], model: ModelParams) -> Ending:
    chunks = chunks_of(job, model)
    progress = Progress(id=job.id, phase="write", step=chunks, steps=chunks)
    return Ending(event=Done(id=job.id, path=job.output, metadata=metadata), progress=progress)


async def _write_down(journal: Journal, done: Ended) -> None:
    """If that cannot be, it is tried again with what is journalled next, and the video is found again until then."""
    try:
        await journal.end(done.entry.job.id, done.ending)
    except OutputError as error:
        log.error("%s", error)


def find_result(job: Job) -> dict[str, Any] | None:
    """The metadata of a request whose video is in its place, whole and on the disk, as is its JSON afterwards, if that
    was asked for. None: it is to be done (again).

    What an attempt has left under temporary names is removed first. A writer that was stopped, and so has outlived its
    engine, cannot put that in place any more.
    """
    try:
        with Directory(os.path.dirname(job.output)) as directory:
            clean(directory, job)
            if (comment := _comment(directory, job)) is None:
                return None
            if job.metadata_json:
                _complete_json(directory, job, comment.decode())
            directory.sync()
    except (OSError, ValueError):
        return None
    return metadata_of(comment)


def _comment(directory: Directory, job: Job) -> bytes | None:
    most = job.num_frames * job.height * job.width * 3 + OVERHEAD
    with directory.open(os.path.basename(job.output)) as file:
        return comment_of(file, job.id) if os.fstat(file.fileno()).st_size <= most else None


def _complete_json(directory: Directory, job: Job, comment: str) -> None:
    """It has its name before the video has, but power may have gone before that was on the disk."""
    expected = json_text(comment).encode()
    with contextlib.suppress(OSError), directory.open(json_name(job)) as file:
        if file.read(len(expected) + 1) == expected:
            return
    temporary = f"{Path(job.partial).name}.json"
    write_json(directory.create(temporary), comment)
    directory.place({temporary: json_name(job)})
