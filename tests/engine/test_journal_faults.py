"""A disk that fails at the Nth write, truncation or sync of the journal, N = 1, 2, 3, ... until there is none left."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from engine.journal import Ended, Entry, Journal
from ipc.errors import BadConfig, OutputError
from tests.engine.test_journal import ask, ending, entry
from tests.power import Recorder

FULL, WRITE, FSYNC, TRUNCATE = 13, 778, 1034, 1546
"""SQLITE_FULL, and SQLITE_IOERR_WRITE, _FSYNC and _TRUNCATE: what SQLite's layer says for ENOSPC and for EIO."""


class FailingDisk(Recorder):
    """Lets what SQLite does to its files fail: the `nth` from when that is set, counted from 1; with `lasting`, all
    from there on. None: nothing."""

    def __init__(self, full: bool) -> None:
        super().__init__()
        self._full = full
        self._nth: int | None = None
        self._lasting = False
        self._count = 0

    def fail(self, nth: int | None, lasting: bool = False) -> None:
        self._nth, self._lasting, self._count = nth, lasting, 0

    @property
    def fired(self) -> bool:
        return self._nth is not None and self._count >= self._nth

    def _fails(self) -> bool:
        self._count += 1
        return self._nth is not None and (self._count == self._nth or (self._lasting and self.fired))

    def _write(self, file: int, data: int, size: int, at: int) -> int:
        return (FULL if self._full else WRITE) if self._fails() else super()._write(file, data, size, at)

    def _truncate(self, file: int, size: int) -> int:
        return TRUNCATE if self._fails() else super()._truncate(file, size)

    def _sync(self, file: int, flags: int) -> int:
        return FSYNC if self._fails() else super()._sync(file, flags)


async def added(journal: Journal, wanted: Entry) -> list[Entry]:
    """The entry, if it was added; nothing if that was refused, in words without a path."""
    try:
        await journal.add(wanted)
    except OutputError as error:
        assert "could not be journalled" in str(error) and str(Path(wanted.job.output).parent) not in str(error)
        return []
    return [wanted]


async def entries_of(directory: Path) -> list[Entry]:
    entries, _ = await all_of(directory)
    return entries


async def all_of(directory: Path) -> tuple[list[Entry], list[Ended]]:
    """Those that have not ended, and those that have."""
    journal = Journal(directory)
    try:
        return await journal.open(), await journal.ended()
    finally:
        await journal.close()


async def sweep(disk: FailingDisk, directory: Path, lasting: bool, kind: type[Journal] = Journal) -> tuple[int, int]:
    """Two entries are added and one ends with a fault at the 1st, 2nd, 3rd, ... thing that is done, over
    checkpoints; then another is added on a disk that works. What was added is there, and nothing else, for who comes
    after a kill and for who comes after an end; the file is whole. How many faults there were, and refusals."""
    first, second, third, last = (entry(directory, name) for name in ("first", "second", "third", "last"))
    refused = 0
    for nth in itertools.count(1):
        journal = kind(directory / f"{nth}")
        await journal.open()
        await journal._on_thread(journal._execute, "PRAGMA wal_autocheckpoint=4", ())
        await journal.add(first)
        disk.fail(nth, lasting)
        kept = await added(journal, second)
        with contextlib.suppress(OutputError):
            await journal.end(first.job.id, ending(first))
        kept += await added(journal, third)
        fired = disk.fired
        disk.fail(None)
        refused += 2 - len(kept)
        await journal.add(last)
        assert await ask(journal, "PRAGMA integrity_check") == "ok", f"fault {nth}"
        shutil.copytree(directory / f"{nth}", directory / f"{nth}-killed")
        await journal.close()
        for left in (f"{nth}-killed", f"{nth}"):
            found = await all_of(directory / left)
            assert found == ([*kept, last], [Ended(first, ending(first))]), f"fault {nth}"
        if not fired:
            return nth - 1, refused
    raise AssertionError("the faults do not end")


@pytest.mark.parametrize("full", [False, True], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for a while"])
async def test_anything_that_is_written_may_fail(tmp_path: Path, full: bool, lasting: bool) -> None:
    """An entry is there afterwards if, and only if, `add` said so."""
    disk = FailingDisk(full)
    with disk.recording():
        faults, refused = await sweep(disk, tmp_path, lasting)
    assert faults > 10 and refused > 2


@pytest.mark.parametrize("full", [False, True], ids=["EIO", "ENOSPC"])
async def test_a_start_may_fail_at_anything_that_is_written(tmp_path: Path, full: bool) -> None:
    """A journal that is opened, new or after a kill, on a disk that fails: `BadConfig`, or it is open. What was in it
    is there the next time."""
    wanted, disk, refused = entry(tmp_path, "wanted"), FailingDisk(full), 0
    with disk.recording():
        journal = Journal(tmp_path / "live")
        await journal.open()
        await journal.add(wanted)
        shutil.copytree(tmp_path / "live", tmp_path / "killed")
        await journal.close()
        for before, expected in ((tmp_path / "killed", [wanted]), (None, [])):
            for nth in itertools.count(1):
                state = tmp_path / f"{len(expected)}-{nth}"
                if before is not None:
                    shutil.copytree(before, state)
                disk.fail(nth)
                try:
                    assert await entries_of(state) == expected
                except BadConfig:
                    refused += 1
                fired = disk.fired
                disk.fail(None)
                assert await entries_of(state) == expected, f"fault {nth}"
                if not fired:
                    break
            assert nth > 2
    assert refused > 2


class Careless(Journal):
    """Takes what could not be written for written."""

    def _write(self, row: tuple[Any, ...] | None = None) -> None:
        with contextlib.suppress(sqlite3.Error):
            super()._write(row)


async def test_an_entry_that_is_lost_is_found(tmp_path: Path) -> None:
    """The control."""
    disk = FailingDisk(full=False)
    with disk.recording(), pytest.raises(AssertionError, match=r"fault \d+"):
        await sweep(disk, tmp_path, False, Careless)
