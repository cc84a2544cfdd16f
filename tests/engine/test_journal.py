"""The journal keeps what was accepted until it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.admission import admit, resolved_params
from engine.journal import Ended, Ending, Entry, Journal
from engine.models import load_model
from engine.params import SystemParams, UserParams
from engine.tasks import KEPT_FINISHED
from ipc.errors import BadConfig, OutputError
from ipc.messages.server import Done, Progress
from tests.disks import run_on_small_disk, unsynced_bytes

MODEL = load_model("wan-demo")


def entry(tmp_path: Path, name: str) -> Entry:
    user = UserParams(prompt=name, output=str(tmp_path / f"{name}.mp4"), seed=7)
    job = admit(user, MODEL, SystemParams())
    return Entry(
        model="wan-demo",
        job=job,
        params=resolved_params(user, job, MODEL),
        submitted_at=time.time(),
        priority=0,
        deadline_at=None,
    )


def ending(of: Entry) -> Ending:
    """It was done."""
    done = Done(id=of.job.id, path=of.job.output, metadata={"task": of.job.id, "seconds": {"denoise": 0.1}})
    return Ending(event=done, progress=Progress(id=of.job.id, phase="write", step=2, steps=2))


async def test_unfinished_entries_come_back_in_order(tmp_path: Path) -> None:
    """Three are added, one ends: a second journal on the same directory finds the other two, oldest first, and how the
    one has ended, until that is to be forgotten."""
    entries = [entry(tmp_path, name) for name in ("a", "b", "c")]
    journal = Journal(tmp_path / "state")
    assert await journal.open() == []
    for e in entries:
        await journal.add(e)
    await journal.end(entries[1].job.id, ending(entries[1]))
    await journal.close()
    again = Journal(tmp_path / "state")
    assert await again.open() == [entries[0], entries[2]]
    assert await again.ended() == [Ended(entries[1], ending(entries[1]))]
    await again.close(forget=True)
    last = Journal(tmp_path / "state")
    assert await last.open() == [entries[0], entries[2]]
    assert await last.ended() == []
    await last.close()
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


async def test_the_latest_ends_are_kept(tmp_path: Path) -> None:
    """Of three more than there is room for, the first three are forgotten."""
    example = entry(tmp_path, "x")
    entries = [with_id(example, f"{number}") for number in range(KEPT_FINISHED + 3)]
    journal = Journal(tmp_path)
    await journal.open()
    await journal._on_thread(journal._execute, "PRAGMA synchronous=OFF", ())
    for e in entries:
        await journal.add(e)
        await journal.end(e.job.id, ending(e))
    assert await journal.ended() == [Ended(e, ending(e)) for e in entries[3:]]
    await journal.close()


def with_id(of: Entry, identity: str) -> Entry:
    return msgspec.structs.replace(of, job=msgspec.structs.replace(of.job, id=identity))


async def test_a_request_that_is_not_accepted_leaves_nothing(tmp_path: Path) -> None:
    """Its entry is withdrawn while it is being written."""
    journal = Journal(tmp_path)
    await journal.open()
    e = entry(tmp_path, "x")
    adding = asyncio.create_task(journal.add(e))
    await journal.withdraw(e.job.id, adding)
    await journal.close()
    again = Journal(tmp_path)
    assert (await again.open(), await again.ended()) == ([], [])
    await again.close()


async def test_an_end_of_another_format_is_forgotten(tmp_path: Path) -> None:
    """One that cannot be read among good ones: the good ones come back."""
    good = entry(tmp_path, "good")
    journal = Journal(tmp_path)
    await journal.open()
    await journal.add(good)
    await journal.end(good.job.id, ending(good))
    await journal._on_thread(journal._execute, "INSERT INTO ended VALUES (NULL, 'bad', x'80', x'80')", ())
    assert await journal.ended() == [Ended(good, ending(good))]
    await journal.close()


async def test_no_entry_is_there_beside_one_that_had_ended_before(tmp_path: Path) -> None:
    """The end of a request cannot be written. The next one, which may write to the same file, is not accepted while
    that is so; once it is, the first one is over on the disk as well: the two are never taken up together."""
    first, second = entry(tmp_path, "same"), entry(tmp_path, "same")
    journal = Journal(tmp_path)
    await journal.open()
    await journal.add(first)
    trap = "CREATE TRIGGER trap BEFORE INSERT ON ended BEGIN SELECT RAISE(ABORT, 'the disk fails'); END"
    await journal._on_thread(journal._execute, trap, ())
    with pytest.raises(OutputError, match="the disk fails"):
        await journal.end(first.job.id, ending(first))
    with pytest.raises(OutputError, match="not accepted"):
        await journal.add(second)
    shutil.copytree(tmp_path, tmp_path.with_name("killed"), ignore=shutil.ignore_patterns("*.mp4"))
    await journal._on_thread(journal._execute, "DROP TRIGGER trap", ())
    await journal.add(second)
    shutil.copytree(tmp_path, tmp_path.with_name("killed-later"))
    await journal.close()
    for name, expected in (("killed", [first]), ("killed-later", [second])):
        again = Journal(tmp_path.with_name(name))
        assert await again.open() == expected
        assert await again.ended() == ([] if name == "killed" else [Ended(first, ending(first))])
        await again.close()


async def test_an_end_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    """The end of a task cannot be written (the table is gone): the next chance writes it."""
    first, second = entry(tmp_path, "first"), entry(tmp_path, "second")
    journal = Journal(tmp_path)
    await journal.open()
    await journal.add(first)
    await journal.add(second)
    await journal._on_thread(journal._execute, "ALTER TABLE tasks RENAME TO away", ())
    with pytest.raises(OutputError, match="cannot be written"):
        await journal.end(first.job.id, ending(first))
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


async def ask(journal: Journal, statement: str) -> Any:
    """The one value that the journal's own connection answers."""
    connection = journal._connection
    assert connection is not None
    return (await journal._on_thread(lambda: connection.execute(statement).fetchone()))[0]


async def test_what_is_added_is_on_the_disk(tmp_path: Path) -> None:
    """When `add` returns, nothing of the entry is still to be written by the kernel. The control: with
    synchronous=OFF something is."""
    journal = Journal(tmp_path / "above" / "state")
    await journal.open()
    files = [tmp_path / "above" / "state" / f"journal.sqlite3{suffix}" for suffix in ("", "-wal")]
    assert await ask(journal, "PRAGMA synchronous") == 2
    for number in range(5):
        await journal.add(entry(tmp_path, f"{number}"))
        assert [unsynced_bytes(file) for file in files] == [0, 0]
    await journal._on_thread(journal._execute, "PRAGMA synchronous=OFF", ())
    await journal.add(entry(tmp_path, "control"))
    control = sum(unsynced_bytes(file) for file in files)
    await journal.close()
    if not control:
        pytest.skip("this file system does not tell what is on its disk")


async def test_what_is_added_outlives_the_process(tmp_path: Path) -> None:
    """The files as they are when `add` returns, copied without closing anything, hold every entry added, as one that
    has ended if that was said."""
    journal = Journal(tmp_path / "state")
    await journal.open()
    entries = [entry(tmp_path, f"{number}") for number in range(8)]
    for number, e in enumerate(entries):
        await journal.add(e)
        if number % 3 == 0:
            await journal.end(e.job.id, ending(e))
        shutil.copytree(tmp_path / "state", tmp_path / f"copy{number}")
    await journal.close()
    for number in range(8):
        copy = Journal(tmp_path / f"copy{number}")
        assert await copy.open() == [e for i, e in enumerate(entries[: number + 1]) if i % 3]
        assert [each.entry for each in await copy.ended()] == entries[: number + 1 : 3]
        await copy.close()


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond so many bytes: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_write_that_fails_anywhere(tmp_path: Path, file_limit: Callable[[int], None]) -> None:
    """No file may grow beyond so many bytes, in small steps from nothing to enough: an entry is there afterwards if,
    and only if, `add` said so; the journal is whole; with room again the next entry is added, and what has ended has
    ended."""
    first, second, third = (entry(tmp_path, name) for name in ("first", "second", "third"))
    outcomes = set()
    for limit in range(0, 60_000, 3000):
        journal = Journal(tmp_path / f"{limit}")
        await journal.open()
        await journal.add(first)
        file_limit(limit)
        try:
            await journal.add(second)
            kept = [second]
        except OutputError as error:
            assert "could not be journalled" in str(error) and str(tmp_path) not in str(error)
            kept = []
        with contextlib.suppress(OutputError):
            await journal.end(first.job.id, ending(first))
        file_limit(resource.RLIM_INFINITY)
        outcomes.add(bool(kept))
        await journal.add(third)
        assert await ask(journal, "PRAGMA integrity_check") == "ok"
        shutil.copytree(tmp_path / f"{limit}", tmp_path / f"{limit}-copy")
        await journal.close()
        for directory in (f"{limit}-copy", f"{limit}"):
            again = Journal(tmp_path / directory)
            assert await again.open() == [*kept, third]
            assert await again.ended() == [Ended(first, ending(first))]
            await again.close()
    assert outcomes == {False, True}


async def test_opening_where_nothing_can_be_written(tmp_path: Path, file_limit: Callable[[int], None]) -> None:
    """A new journal on a full disk is a `BadConfig`, wherever the writing stops; later it is opened, and is whole."""
    refused = 0
    for limit in range(0, 60_000, 1000):
        file_limit(limit)
        journal = Journal(tmp_path / f"{limit}")
        try:
            await journal.open()
            await journal.close()
        except BadConfig:
            refused += 1
        file_limit(resource.RLIM_INFINITY)
        again = Journal(tmp_path / f"{limit}")
        assert await again.open() == []
        await again.close()
    assert 0 < refused < 60


FULL_DISK = """
import asyncio, os
from pathlib import Path
import msgspec
from engine.journal import Ending, Entry, Journal
from ipc.errors import BadConfig, OutputError
from tests.disks import run_on_small_disk, unsynced_bytes

entry = msgspec.json.decode(sys.argv[2], type=Entry)
ending = msgspec.json.decode(sys.argv[3], type=Ending)

def another(name):
    return msgspec.structs.replace(entry, job=msgspec.structs.replace(entry.job, id=name))

async def main():
    state = Path(directory, "state")
    journal = Journal(state)
    await journal.open()
    await journal.add(another("before"))
    with open(directory + "/filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    for number in range(50):
        try:
            await journal.add(another(f"full{number}"))
            print(f"full{number}")
        except OutputError as error:
            assert "full" in str(error), error
            break
    try:
        await journal.end("before", ending)
        raise AssertionError("there was room")
    except OutputError:
        pass
    os.unlink(directory + "/filler")
    await journal.add(another("after"))
    await journal.close()
    remount("ro")
    try:
        await Journal(state).open()
        raise AssertionError("it could be written")
    except BadConfig:
        pass
    remount("rw")
    journal = Journal(state)
    print(*[e.job.id for e in await journal.open()])
    assert [e.entry.job.id for e in await journal.ended()] == ["before"]
    await journal.close()

asyncio.run(main())
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 1 MiB is filled up: entries are refused until there is room again, what was added before and after is
    there, and what ended meanwhile is not. Read-only, the journal is a `BadConfig`."""
    example = entry(tmp_path, "example")
    given = [msgspec.json.encode(each).decode() for each in (example, ending(example))]
    printed = run_on_small_disk(tmp_path, FULL_DISK, *given)
    accepted = printed[: printed.index("after") // 2]
    assert printed == [*accepted, *accepted, "after"]
