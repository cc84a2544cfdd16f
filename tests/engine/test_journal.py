"""The journal keeps what was accepted until it has ended."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

import pytest

from engine.admission import admit, resolved_params
from engine.journal import Entry, Journal
from engine.models import load_model
from engine.params import SystemParams, UserParams
from ipc.errors import BadConfig, OutputError


def entry(tmp_path: Path, name: str) -> Entry:
    user = UserParams(prompt=name, output=str(tmp_path / f"{name}.mp4"), seed=7)
    job = admit(user, load_model("wan-demo"), SystemParams())
    return Entry(
        model="wan-demo",
        job=job,
        params=resolved_params(user, job),
        submitted_at=time.time(),
        priority=0,
        deadline_at=None,
    )


async def test_unfinished_entries_come_back_in_order(tmp_path: Path) -> None:
    """Three are added, one ends: a second journal on the same directory finds the other two, oldest first."""
    entries = [entry(tmp_path, name) for name in ("a", "b", "c")]
    journal = Journal(tmp_path / "state")
    assert await journal.open() == []
    for e in entries:
        await journal.add(e)
    await journal.remove(entries[1].job.id)
    await journal.close()
    again = Journal(tmp_path / "state")
    assert await again.open() == [entries[0], entries[2]]
    await again.close()
    assert (tmp_path / "state" / "journal.sqlite3").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


async def test_a_row_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    """One row of another format among good ones: the good ones come back, the bad one is kept beside, and once."""
    good = entry(tmp_path, "good")
    journal = Journal(tmp_path)
    await journal.open()
    await journal.add(good)
    await journal.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite3", isolation_level=None)) as connection:
        connection.execute("INSERT INTO tasks VALUES ('bad', 0, x'80')")
    for _ in range(2):
        again = Journal(tmp_path)
        assert await again.open() == [good]
        await again.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite3")) as connection:
        assert connection.execute("SELECT id FROM rejected").fetchall() == [("bad",)]


async def test_what_could_not_be_removed_is_removed_later(tmp_path: Path) -> None:
    """The end of a task cannot be written (the table is gone): the next chance removes it."""
    first, second = entry(tmp_path, "first"), entry(tmp_path, "second")
    journal = Journal(tmp_path)
    await journal.open()
    await journal.add(first)
    await journal.add(second)
    await journal._on_thread(journal._execute, "ALTER TABLE tasks RENAME TO away", ())
    with pytest.raises(OutputError, match="cannot be written"):
        await journal.remove(first.job.id)
    await journal._on_thread(journal._execute, "ALTER TABLE away RENAME TO tasks", ())
    await journal.close()
    again = Journal(tmp_path)
    assert await again.open() == [second]
    await again.close()


async def test_a_broken_journal_is_refused(tmp_path: Path) -> None:
    """A file that is no database is a BadConfig that says so, not a lost queue."""
    (tmp_path / "journal.sqlite3").write_bytes(b"not a database at all" * 100)
    with pytest.raises(BadConfig, match="journal"):
        await Journal(tmp_path).open()
