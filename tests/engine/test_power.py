"""Power that goes at any moment: what was accepted is in the journal when it comes back. `tests/power.py` says what a
loss of power is here."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections import Counter
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.journal import Journal
from tests.engine.test_journal import ending, entry
from tests.engine.test_server import serving
from tests.engine.wire import RawClient, frame
from tests.power import Disk, Note, Recorder

ENTRIES = 40
PAGES = 60
"""A checkpoint comes after so many pages, so that a short recording has some; SQLite's default is 1000."""
SURVIVAL = (0.0, 1.0, 0.5, 0.9)
"""Of what was not synced, at each moment: nothing, everything, about half, most."""


class Lost(AssertionError):
    """The journal does not hold what it must, or holds what it must not."""


async def record(directory: Path, *pragmas: str) -> list[Note]:
    """A journal that is made and filled, of which a third ends, and closed, with what was said of it and when."""
    recorder = Recorder()
    with recorder.recording():
        journal = Journal(directory / "state")
        await journal.open()
        for pragma in (f"wal_autocheckpoint={PAGES}", *pragmas):
            await journal._on_thread(journal._execute, f"PRAGMA {pragma}", ())
        for number in range(ENTRIES):
            e = entry(directory, f"{number}")
            recorder.say("adding", e.job.id)
            await journal.add(e)
            recorder.say("added", e.job.id)
            if number % 3 == 0:
                recorder.say("ending", e.job.id)
                await journal.end(e.job.id, ending(e))
                recorder.say("ended", e.job.id)
        shutil.copytree(directory / "state", directory / "whole")
        recorder.say("whole", "")
        await journal.close()
    return recorder.notes


async def cut_everywhere(notes: list[Note], directory: Path, seed: int) -> int:
    """Power goes after every note, in each way of `SURVIVAL`; how often it went. Raises `Lost`."""
    disk, said, cuts = Disk(), Counter[str](), 0
    ids: dict[str, set[str]] = {what: set() for what in ("adding", "added", "ending", "ended")}
    for number, note in enumerate(notes):
        if note.what in ids:
            ids[note.what].add(note.name)
            continue
        disk.take(note)
        said[note.what] += 1
        for survival in SURVIVAL:
            cuts += 1
            place = directory / f"{cuts}"
            disk.after_power_loss(place, Random(f"{seed} {cuts}"), survival)
            found, over = await reopened(place)
            if missing := ids["added"] - found - over:
                raise Lost(f"seed {seed}, after note {number}: {len(missing)} accepted requests are not there")
            if odd := (found - (ids["adding"] - ids["ended"])) | (over - ids["ending"]) | (found & over):
                raise Lost(f"seed {seed}, after note {number}: {len(odd)} requests are there that must not be")
    assert said["write"] > 100 and said["sync"] > ENTRIES / 2, said
    return cuts


async def reopened(place: Path) -> tuple[set[str], set[str]]:
    """Ids of those that have not ended, and of those that have."""
    journal = Journal(place)
    try:
        entries = await journal.open()
        return {e.job.id for e in entries}, {each.entry.job.id for each in await journal.ended()}
    finally:
        await journal.close()


@pytest.mark.timeout(400)
async def test_what_was_added_survives_a_loss_of_power_at_any_moment(tmp_path: Path) -> None:
    """From the first write to the end of the journal, over several checkpoints: what `add` returned for is there, what
    `end` returned for has ended, and the journal opens, whatever of the unsynced sectors is lost."""
    (tmp_path / "cuts").mkdir()
    notes = await record(tmp_path)
    assert sum(n.what == "sync" and n.name == "journal.sqlite3" for n in notes) >= 3, "checkpoints were made"
    assert (notes[-1].what, notes[-1].name) == ("delete", "journal.sqlite3-wal"), "it was closed"
    cuts = await cut_everywhere(notes, tmp_path / "cuts", secrets.randbits(32))
    assert cuts > 1000


@pytest.mark.parametrize("mode", ["OFF", "NORMAL"])
async def test_a_journal_that_does_not_sync_is_found(tmp_path: Path, mode: str) -> None:
    """Control: with synchronous=OFF nothing is synced, with NORMAL only checkpoints are."""
    (tmp_path / "cuts").mkdir()
    notes = await record(tmp_path, f"synchronous={mode}")
    with pytest.raises(Lost, match="requests are"):
        await cut_everywhere(notes, tmp_path / "cuts", 1)


async def test_the_recording_is_all_that_was_written(tmp_path: Path) -> None:
    """Control of the model: if everything survives, the replayed files are the real ones, byte for byte."""
    disk = Disk()
    for note in takewhile(lambda note: note.what != "whole", await record(tmp_path)):
        disk.take(note)
    disk.after_power_loss(tmp_path / "replayed", Random(0), 1.0)
    real, replayed = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("whole", "replayed"))
    assert real == replayed
    assert real.keys() == {"journal.sqlite3", "journal.sqlite3-wal"}


async def test_an_accepted_request_survives_a_loss_of_power(short_dir: Path, tmp_path: Path) -> None:
    """A client on the socket submits ten; when it reads `accepted`, power goes and takes all that is not synced: this
    request, and every one before it, is in the journal."""
    recorder = Recorder()

    def submit_all() -> None:
        with RawClient(short_dir / "engine.sock") as client:
            for number in range(10):
                params: dict[str, Any] = {"prompt": "x", "output": str(short_dir / f"{number}.mp4")}
                reply = client.ask(frame(type="submit", ref=number, params=params, subscribe=False))
                recorder.say("accepted", reply["id"])

    with recorder.recording():
        async with serving(short_dir, state_dir=str(tmp_path / "state")):
            await asyncio.to_thread(submit_all)
            notes = list(recorder.notes)
    disk, accepted = Disk(), set[str]()
    for number, note in enumerate(notes):
        if note.what != "accepted":
            disk.take(note)
            continue
        accepted.add(note.name)
        disk.after_power_loss(tmp_path / f"{number}", Random(0), 0.0)
        found, over = await reopened(tmp_path / f"{number}")
        assert found | over >= accepted
    assert len(accepted) == 10
