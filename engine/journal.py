"""The journal: what was accepted is on disk before the client hears of it, and how it ended before anybody hears that.

SQLite in WAL mode with synchronous=FULL. Everything runs on the journal's own thread, so that the event loop never
waits for a disk. How the last tasks have ended stays in it until the engine is stopped: one that is killed has perhaps
not told everybody.

Resource handling: one connection and one thread from `open` to `close`. Error handling: what SQLite reports becomes
`BadConfig` at start and `OutputError` where a client waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from engine.adapters import KeptAdapter
from engine.states import Descriptors, State
from engine.tasks import KEPT_FINISHED
from ipc.errors import BadConfig, OutputError
from ipc.messages.job import Job
from ipc.messages.server import Done, Failed, Progress

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY,
    submitted_at REAL NOT NULL,
    entry BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS ended (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    entry BLOB NOT NULL,
    how BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS rejected (id TEXT, submitted_at REAL, entry BLOB) STRICT;
CREATE TABLE IF NOT EXISTS adapters (model TEXT NOT NULL, kept BLOB NOT NULL) STRICT;
"""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted, unfinished task. Times are seconds since the epoch."""

    model: str
    job: Job
    params: dict[str, Any]
    submitted_at: float
    priority: int
    deadline_at: float | None


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended, and how far it was."""

    event: Done | Failed
    progress: Progress


class Ended(NamedTuple):
    """A task that has ended, as the journal has it."""

    entry: Entry
    ending: Ending


class JournalState(State, frozen=True, kw_only=True):
    """A `Journal` that is closed, but not given up. `claim` is the place of its descriptor."""

    ended: dict[str, bytes | None]
    """As `Journal._ended`."""
    claim: int


class Journal:
    """Accepted tasks on disk: those that have not ended, and how the last ones have.

    What is on disk of one request is there of all that were over before it was accepted, too.
    """

    def __init__(self, directory: Path, state: JournalState | None = None, fds: Descriptors | None = None) -> None:
        """`state`: what the program before this one, whose journal it was, has left to be done."""
        self._path = directory / "journal.sqlite3"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._connection: sqlite3.Connection | None = None
        self._ended: dict[str, bytes | None] = {}
        """Tasks of which it is not known to be on the disk that they have ended, how (an `Ending`), or, None, that they
        were not accepted after all."""
        self._claim = -1
        """A descriptor of the directory, locked: the right to this journal, also while the file is closed."""
        self._paused = False
        self._goes_on = asyncio.Event()
        """Not set from `pause` to `resume`."""
        self._goes_on.set()
        if state is not None and fds is not None:
            self._ended, self._claim = dict(state.ended), fds.take(state.claim)

    async def open(self) -> list[Entry]:
        """Open or make the journal; returns what an earlier run left unfinished, oldest first.

        A row that cannot be read (a newer or older engine wrote it) is set aside in the table `rejected` and logged.
        """
        try:
            return await self._on_thread(self._open)
        except (OSError, sqlite3.Error) as error:
            await self.close()
            raise self._unusable(error) from error

    @staticmethod
    def _unusable(error: Exception) -> BadConfig:
        busy = isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_BUSY
        if busy or isinstance(error, BlockingIOError):
            return BadConfig("another engine uses this state directory: give this one its own --state-dir")
        return BadConfig(f"the journal in the state directory cannot be used: {error}")

    async def add(self, entry: Entry) -> None:
        """Returns when the entry is on disk. `OutputError` or `BadConfig` if it cannot be."""
        if self._paused:  # it could not be opened again at once
            await self.resume()
        row = (entry.job.id, entry.submitted_at, msgspec.msgpack.encode(entry))
        try:
            await self._on_thread(self._write, row)
        except sqlite3.Error as error:
            raise OutputError(f"the request was not accepted, because it could not be journalled: {error}") from error

    async def end(self, identity: str, ending: Ending) -> None:
        """The task has ended; returns when that is on disk. `OutputError` if it cannot be written; the next call and
        `close` try again."""
        await self._take_out(identity, msgspec.msgpack.encode(ending))

    async def ended(self) -> list[Ended]:
        """How the last `KEPT_FINISHED` tasks have ended, since an engine was last stopped; the latest last. One that
        cannot be read is logged. `BadConfig` if the file cannot."""
        return await self._read(self._read_ended)

    async def adapters(self, model: str) -> list[KeptAdapter]:
        """The adapters that `keep_adapters` was last given for a model. One that cannot be read is logged. `BadConfig`
        if the file cannot."""
        return await self._read(self._adapters, model)

    async def keep_adapters(self, model: str, adapters: Sequence[KeptAdapter]) -> None:
        """Returns when these are on disk, in the place of all that were kept for this model. `OutputError` or
        `BadConfig` if they cannot be; those before are kept then."""
        if self._paused:
            await self.resume()
        try:
            rows = [(model, msgspec.msgpack.encode(each)) for each in adapters]
            await self._on_thread(self._keep_adapters, model, rows)
        except sqlite3.Error as error:
            raise OutputError(f"nothing was changed, because it could not be journalled: {error}") from error

    async def withdraw(self, identity: str, adding: asyncio.Task[None]) -> None:
        """Remove an entry that `adding` is still writing: the request is not accepted. Raises as `end`."""
        await asyncio.wait([adding])
        await self._take_out(identity, None)

    async def close(self, *, forget: bool = False) -> None:
        """Finish what was asked for and close the file. `forget` how tasks have ended: all who asked were told."""
        if self._connection is not None:
            await self._on_thread(self._close, self._connection, forget)
            self._connection = None
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1
        self._thread.shutdown(wait=False)

    async def pause(self) -> None:
        """Close the file, and nothing else: the next program is to open it. What ends meanwhile is kept for that."""
        assert self._connection is not None, "the journal is not open"
        self._paused = True
        self._goes_on.clear()
        try:
            await self._on_thread(self._close, self._connection)
        except Exception:
            self._paused = False
            self._goes_on.set()
            raise
        self._connection = None

    @property
    def is_paused(self) -> bool:
        """The file is closed, and wanted again."""
        return self._paused

    async def resume(self) -> None:
        """After `pause`: there is no next program."""
        try:
            await self._on_thread(self._open)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        else:
            self._paused = False
        finally:
            self._goes_on.set()

    def state(self, fds: Descriptors) -> JournalState:
        return JournalState(ended=dict(self._ended), claim=fds.put(self._claim))

    async def _take_out(self, identity: str, how: bytes | None) -> None:
        self._ended[identity] = how
        await self._goes_on.wait()
        if self._paused:
            raise OutputError("the journal could not be opened again")
        try:
            await self._on_thread(self._write)
        except sqlite3.Error as error:
            raise OutputError(f"the journal cannot be written: {error}") from error

    async def _read(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._on_thread(call, *args)
        except sqlite3.Error as error:
            await self.close()
            raise self._unusable(error) from error

    async def _on_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    def _open(self) -> list[Entry]:
        make_directory(self._path.parent)
        if self._claim < 0:
            self._claim = _claim(self._path.parent)
        self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        self._path.chmod(0o600)
        # One engine per journal: two would both carry out what is in it.
        self._connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.executescript(_SCHEMA)
        self._write()
        rows = self._connection.execute("SELECT id, entry FROM tasks ORDER BY submitted_at, rowid").fetchall()
        return [entry for row in rows if (entry := self._decode(*row)) is not None]

    def _decode(self, identity: str, raw: bytes) -> Entry | None:
        try:
            return msgspec.msgpack.decode(raw, type=Entry)
        except msgspec.MsgspecError as error:
            log.error("request %s in the journal cannot be read and is set aside: %s", identity, error)
            self._execute("INSERT INTO rejected SELECT * FROM tasks WHERE id = ?", (identity,))
            self._execute("DELETE FROM tasks WHERE id = ?", (identity,))
            return None

    def _read_ended(self) -> list[Ended]:
        assert self._connection is not None, "the journal is not open"
        found = []
        for identity, entry, how in self._connection.execute("SELECT id, entry, how FROM ended ORDER BY number"):
            try:
                decode = msgspec.msgpack.decode
                found.append(Ended(decode(entry, type=Entry), decode(how, type=Ending)))
            except msgspec.MsgspecError as error:
                log.error("how request %s has ended cannot be read and is forgotten: %s", identity, error)
        return found

    def _adapters(self, model: str) -> list[KeptAdapter]:
        assert self._connection is not None, "the journal is not open"
        found = []
        for (raw,) in self._connection.execute("SELECT kept FROM adapters WHERE model = ? ORDER BY rowid", (model,)):
            try:
                found.append(msgspec.msgpack.decode(raw, type=KeptAdapter))
            except msgspec.MsgspecError as error:
                log.error("a LoRA in the journal cannot be read and is forgotten: %s", error)
        return found

    def _keep_adapters(self, model: str, rows: Sequence[tuple[str, bytes]]) -> None:
        assert self._connection is not None, "the journal is not open"
        with self._all_or_nothing():
            self._execute("DELETE FROM adapters WHERE model = ?", (model,))
            self._connection.executemany("INSERT INTO adapters VALUES (?, ?)", rows)

    def _write(self, row: tuple[Any, ...] | None = None) -> None:
        """A new entry, and what has ended: one that writes to the same file as one that has ended must not be there
        beside it."""
        ended = dict(self._ended)
        if row is None and not ended:
            return
        with self._all_or_nothing():
            if row is not None:
                self._execute("INSERT INTO tasks VALUES (?, ?, ?)", row)
            for identity, how in ended.items():
                if how is not None:
                    move = "INSERT INTO ended (id, entry, how) SELECT id, entry, ? FROM tasks WHERE id = ?"
                    self._execute(move, (how, identity))
                self._execute("DELETE FROM tasks WHERE id = ?", (identity,))
            self._execute("DELETE FROM ended WHERE number <= (SELECT max(number) FROM ended) - ?", (KEPT_FINISHED,))
        for identity in ended:
            del self._ended[identity]

    def _close(self, connection: sqlite3.Connection, forget: bool = False) -> None:
        try:
            self._write()
            if forget:
                self._execute("DELETE FROM ended", ())
        except sqlite3.Error as error:
            log.error("what has ended of late could not be journalled (%d requests): %s", len(self._ended), error)
        connection.close()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A transaction."""
        self._execute("BEGIN IMMEDIATE", ())
        try:
            yield
            self._execute("COMMIT", ())
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):  # the disk is full: SQLite has done so already
                self._execute("ROLLBACK", ())
            raise

    def _execute(self, statement: str, values: tuple[Any, ...]) -> None:
        assert self._connection is not None, "the journal is not open"
        self._connection.execute(statement, values)


def _claim(directory: Path) -> int:
    """A locked descriptor of the directory. BlockingIOError if another engine has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def make_directory(directory: Path) -> None:
    """Make a directory of mode 0700, and what is missing above it, so that it is still there after a loss of power:
    SQLite syncs the directory in which the journal is, and nobody else the ones above."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
