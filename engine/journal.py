"""The journal: what was accepted is on disk before the client hears of it, and stays until it has ended.

SQLite in WAL mode with synchronous=FULL. Everything runs on the journal's own thread, so that the event loop never
waits for a disk. A task that has ended leaves the journal at once; its metadata is in its file.

Resource handling: one connection and one thread from `open` to `close`. Error handling: what SQLite reports becomes
`BadConfig` at start and `OutputError` where a client waits for it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ipc.errors import BadConfig, OutputError
from ipc.messages import Job

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY,
    submitted_at REAL NOT NULL,
    entry BLOB NOT NULL
) STRICT
"""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted, unfinished task. Times are seconds since the epoch."""

    job: Job
    params: dict[str, Any]
    submitted_at: float
    priority: int
    deadline_at: float | None


class Journal:
    """Accepted and unfinished tasks, on disk."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "journal.sqlite3"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> list[Entry]:
        """Open or make the journal; returns what an earlier run left unfinished, oldest first."""
        try:
            return await self._on_thread(self._open)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise BadConfig(f"the journal in the state directory cannot be used: {error}") from error
            raise BadConfig("another engine uses this state directory: give this one its own --state-dir") from error
        except (OSError, sqlite3.Error, msgspec.MsgspecError) as error:
            raise BadConfig(f"the journal in the state directory cannot be used: {error}") from error

    async def add(self, entry: Entry) -> None:
        """Returns when the entry is on disk."""
        row = (entry.job.id, entry.submitted_at, msgspec.msgpack.encode(entry))
        try:
            await self._on_thread(self._execute, "INSERT INTO tasks VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            raise OutputError(f"the request was not accepted, because it could not be journalled: {error}") from error

    async def remove(self, identity: str) -> None:
        """The task has ended; returns when that is on disk."""
        await self._on_thread(self._execute, "DELETE FROM tasks WHERE id = ?", (identity,))

    async def close(self) -> None:
        """Finish what was asked for and close the file."""
        if self._connection is not None:
            await self._on_thread(self._connection.close)
            self._connection = None
        self._thread.shutdown(wait=False)

    async def _on_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    def _open(self) -> list[Entry]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        self._path.chmod(0o600)
        # One engine per journal: two would both carry out what is in it.
        self._connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(_SCHEMA)
        rows = self._connection.execute("SELECT entry FROM tasks ORDER BY submitted_at, rowid").fetchall()
        return [msgspec.msgpack.decode(row[0], type=Entry) for row in rows]

    def _execute(self, statement: str, values: tuple[Any, ...]) -> None:
        assert self._connection is not None, "the journal is not open"
        self._connection.execute(statement, values)
