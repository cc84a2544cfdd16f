"""The engine is killed about when a request ends: what the next one knows of it is what its client may have heard, and
nothing is done again whose video is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine import Client, Supervisor, SystemParams, requests
from engine.journal import Journal
from ipc.errors import BadRequest, Cancelled, EngineError, OutputError, ServerUnavailable
from ipc.messages.server import Done
from tests.conftest import Video, until
from tests.engine.reloading import ask
from tests.engine.striking import ENDS
from tests.engine.wire import EngineProcess, wait_for

THROUGH = (sys.executable, "-m", "tests.engine.striking")
PLACED = "the video is in its place"
"""The first moment: the writer has given it its name, and nobody has heard of it."""
WRITTEN = ("that is written", "its client is being told", "its client is told")
"""Moments at which it is in the journal that a request has ended."""


class Found(NamedTuple):
    """The files of a request, and which ones they are: none is the same after it was written again."""

    files: dict[str, tuple[int, int]]
    """Name -> inode, time of the last change of its content in ns."""

    @classmethod
    def at(cls, output: Path) -> Found:
        paths = [path for path in output.parent.iterdir() if path.name.removeprefix(".").startswith(output.stem)]
        return cls({path.name: ((status := path.lstat()).st_ino, status.st_mtime_ns) for path in paths})


@contextlib.contextmanager
def killed_at(directory: Path, moment: str) -> Iterator[Client]:
    """A client of an engine that is killed at a moment of the end of its first request. Returns when it is dead."""
    order = directory / "placing"
    how = {"STRIKE": moment} if moment in ENDS else {"WORKER": "tests.engine.placing_worker", "PLACING": str(order)}
    with EngineProcess(directory, through=THROUGH, **how) as engine:
        engine.exit_codes = (-signal.SIGKILL,)
        if moment == PLACED:
            order.write_text(f"{engine.process.pid}")
        engine.wait_ready()
        yield Client(engine.socket)
        assert engine.process.wait(60) == -signal.SIGKILL


@contextlib.contextmanager
def the_next(directory: Path) -> Iterator[Client]:
    """A client of the engine after that, when it has done what there was to do."""
    with EngineProcess(directory) as engine:
        engine.wait_ready()
        client = Client(engine.socket)
        wait_for(lambda: all(task.state not in ("queued", "running") for task in client.tasks()), "all to be done")
        yield client


def rows(directory: Path) -> dict[str, int]:
    """How many there are in the tables of the journal of an engine that is not there. It is left as it is."""
    copy = shutil.copytree(directory / "state", directory / f"state-{time.monotonic_ns()}")
    with contextlib.closing(sqlite3.connect(copy / "journal.sqlite3")) as journal:
        return {name: journal.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("tasks", "ended")}


def ran(client: Client) -> set[str]:
    """Ids of the tasks of which this engine has computed something."""
    return {span.task for span in client.trace().spans}


def comment(output: Path) -> Any:
    return json.loads(Video(output).metadata["comment"])


@pytest.mark.parametrize("moment", [PLACED, *ENDS])
def test_what_is_done_is_not_done_again(short_dir: Path, moment: str) -> None:
    """At whichever moment the engine is killed: to the next one the request is done, with the metadata that is in the
    file; nothing was computed, no file was touched, and when it stops the journal is empty."""
    output = short_dir / "v.mp4"
    with killed_at(short_dir, moment) as client:
        identity = client.submit(ask(output, metadata_json=True)).id
    before = Found.at(output)
    assert {name for name in before.files if not name.startswith(".")} == {"v.mp4", "v.json"}
    assert rows(short_dir) == ({"tasks": 0, "ended": 1} if moment in WRITTEN else {"tasks": 1, "ended": 0})
    with the_next(short_dir) as client:
        (task,) = client.tasks()
        assert (task.id, task.state, task.path, task.error) == (identity, "done", str(output), None)
        done = client.result(identity)
        assert (done.id, done.path, done.metadata) == (identity, str(output), comment(output))
        assert done.metadata["task"] == identity and done.metadata["seconds"]["denoise"] > 0
        assert ran(client) == set()
        again = client.generate(ask(short_dir / "w.mp4"))
        assert done.metadata.keys() == again.metadata.keys()
        (usual,) = [task for task in client.tasks() if task.id == again.id]
        assert (task.phase, task.step, task.steps) == (usual.phase, usual.step, usual.steps)
    after = Found.at(output)
    assert after.files == {name: found for name, found in before.files.items() if not name.startswith(".")}
    assert Video(output).sha256 == Video(again.path).sha256
    assert json.loads((short_dir / "v.json").read_text()) == done.metadata
    assert rows(short_dir) == {"tasks": 0, "ended": 0}


@pytest.mark.parametrize("json_is", ["missing", "another's", "in a directory that cannot be written"])
def test_the_json_beside_it_is_there_in_the_end(short_dir: Path, json_is: str) -> None:
    """Power took the name of the JSON and left the video's: it is written; the video is not."""
    output = short_dir / "out" / "v.mp4"
    output.parent.mkdir()
    with killed_at(short_dir, PLACED) as client:
        identity = client.submit(ask(output, metadata_json=True)).id
    before = Found.at(output).files["v.mp4"]
    (short_dir / "out" / "v.json").unlink()
    if json_is == "another's":
        (short_dir / "out" / "v.json").write_text("{}")
    if json_is == "in a directory that cannot be written":
        (short_dir / "out" / "v.json").mkdir()
    with the_next(short_dir) as client:
        if json_is == "in a directory that cannot be written":
            with pytest.raises(OutputError):
                client.result(identity)
            return
        assert client.result(identity).metadata == json.loads((short_dir / "out" / "v.json").read_text())
        assert ran(client) == set()
    assert Found.at(output).files["v.mp4"] == before
    assert sorted(os.listdir(output.parent)) == ["v.json", "v.mp4"]


@pytest.mark.parametrize("there", ["another request's", "damaged", "a link to it", "nothing"])
def test_what_is_not_its_video_is_made_again(short_dir: Path, there: str) -> None:
    """Somebody puts something else in the place of the video before the engine is started again: the request is done,
    with the frames that it has."""
    output, kept = short_dir / "v.mp4", short_dir / "kept.mp4"
    with EngineProcess(short_dir) as engine:
        engine.wait_ready()
        other = Path(Client(engine.socket).generate(ask(short_dir / "o.mp4", seed=4)).path)
    with killed_at(short_dir, PLACED) as client:
        identity = client.submit(ask(output)).id
    output.rename(kept)
    match there:
        case "another request's":
            shutil.copy(other, output)
        case "damaged":
            content = bytearray(kept.read_bytes())
            content[len(content) // 2] ^= 1
            output.write_bytes(content)
        case "a link to it":
            output.symlink_to(kept)
    with the_next(short_dir) as client:
        assert client.result(identity).metadata["task"] == identity
        assert ran(client) == {identity}
    assert Video(output).sha256 == Video(kept).sha256 != Video(other).sha256
    assert not output.is_symlink()


@pytest.mark.parametrize("moment", ENDS)
def test_what_has_failed_stays_so(short_dir: Path, moment: str) -> None:
    """The directory of the video is gone when it is to be written, and there again when the next engine is started: if
    its client may have heard that the request failed, so it did, for the same reason; else it is done."""
    output = short_dir / "out" / "v.mp4"
    output.parent.mkdir()
    heard: EngineError | None = None
    with killed_at(short_dir, moment) as client:
        identity = client.submit(ask(output, steps=40)).id
        output.parent.rmdir()
        try:
            client.result(identity)
        except OutputError as error:
            heard = error
        except ServerUnavailable:
            pass
    output.parent.mkdir()
    with the_next(short_dir) as client:
        (task,) = client.tasks()
        assert task.id == identity
        if moment in WRITTEN:
            assert task.state == "failed"
            assert task.phase in ("decode", "write")
            with pytest.raises(OutputError, match=r"v\.mp4 could not be written: No such file or directory") as again:
                client.result(identity)
            assert heard is None or str(heard) == str(again.value)
            assert ran(client) == set()
        else:
            assert heard is None, "it was told before it was written"
            assert isinstance(client.result(identity), Done)
    assert output.exists() == (moment not in WRITTEN)


@pytest.mark.parametrize("moment", ENDS)
def test_what_was_cancelled_stays_so(short_dir: Path, moment: str) -> None:
    """Nobody hears `ok` of a cancel that the next engine knows nothing of."""
    output, confirmed = short_dir / "v.mp4", False
    with killed_at(short_dir, moment) as client:
        identity = client.submit(ask(output, steps=80)).id
        with contextlib.suppress(EngineError):
            client.cancel(identity)
            confirmed = True
    with the_next(short_dir) as client:
        (task,) = client.tasks()
        assert (task.id, task.state) == (identity, "cancelled" if moment in WRITTEN else "done")
        if moment in WRITTEN:
            with pytest.raises(Cancelled):
                client.result(identity)
        else:
            assert not confirmed
    assert output.exists() == (moment not in WRITTEN)


@pytest.mark.parametrize("moment", [PLACED, *ENDS])
def test_a_later_request_to_the_same_file(short_dir: Path, moment: str) -> None:
    """One is done, and the next one replaces its video, when the engine is killed: both are known as done, the video is
    the later one's, and neither is done again."""
    output = short_dir / "v.mp4"
    with EngineProcess(short_dir) as engine:
        engine.wait_ready()
        client = Client(engine.socket)
        first = client.generate(ask(output))
        first_frames = Video(output).sha256
        engine.kill()
    with killed_at(short_dir, moment) as client:
        second = client.submit(ask(output, seed=4)).id
    before = Found.at(output)
    with the_next(short_dir) as client:
        assert [(task.id, task.state) for task in client.tasks()] == [(first.id, "done"), (second, "done")]
        assert client.result(first.id) == first
        assert client.result(second).metadata == comment(output)
        assert comment(output)["task"] == second
        assert ran(client) == set()
    assert Found.at(output).files["v.mp4"] == before.files["v.mp4"]
    assert Video(output).sha256 != first_frames


# The journal's disk.


@contextlib.asynccontextmanager
async def engine(folder: Path) -> AsyncIterator[tuple[Supervisor, Journal]]:
    params = SystemParams(placement="fused", device="cpu", threads=1, state_dir=str(folder / "state"))
    async with Supervisor(params) as supervisor:
        assert supervisor._journal is not None
        yield supervisor, supervisor._journal


class Disk:
    """That of a journal, which does not take up what has ended until it is let go on."""

    def __init__(self, journal: Journal) -> None:
        self.reached, self._go_on, self._write = threading.Event(), threading.Event(), journal._write
        journal._write = self.write  # type: ignore[method-assign]

    def write(self, row: tuple[Any, ...] | None = None) -> None:
        if row is None:
            self.reached.set()
            self._go_on.wait()
        self._write(row)

    def go_on(self) -> None:
        self._go_on.set()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_nobody_hears_of_an_end_before_the_disk_has_it(tmp_path: Path, cancelled: bool) -> None:
    """While that is being written, the request is running for all: in the list, in the status, for who waits for it,
    who cancels it, and who wants to write to the same file. Then all hear of it."""
    async with engine(tmp_path) as (supervisor, journal):
        disk = Disk(journal)
        user = ask(tmp_path / "v.mp4", steps=80 if cancelled else 2)
        identity = (await supervisor.submit(user)).id
        waiting = [asyncio.create_task(supervisor.result(identity))]
        if cancelled:
            waiting.append(asyncio.create_task(supervisor.cancel(identity)))
        await until(disk.reached.is_set, "the end")
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        (task,) = supervisor.tasks()
        assert task.state in ("queued", "running") and task.error is None
        status = supervisor.status()
        assert (status.waiting + status.running, status.finished, status.failed) == (1, 0, 0)
        with pytest.raises(BadRequest, match="another unfinished request"):
            await supervisor.submit(user)
        waiting.append(asyncio.create_task(supervisor.cancel(identity)))
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        disk.go_on()
        await asyncio.wait(waiting, timeout=10)
        assert all(task.done() for task in waiting)
        (task,) = supervisor.tasks()
        assert task.state == ("cancelled" if cancelled else "done")
        status = supervisor.status()
        assert (status.waiting + status.running, status.finished, status.failed) == (0, not cancelled, cancelled)
        assert [ended.entry.job.id for ended in await journal.ended()] == [identity]
        with contextlib.suppress(Cancelled):
            assert (await waiting[0]).id == identity
        assert supervisor.check_integrity() == []


async def test_a_disk_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end is told when it was waited for long enough, and the log says so; it is written when the disk goes on."""
    monkeypatch.setattr(requests, "LONGEST_WRITE", 0.3)
    async with engine(tmp_path) as (supervisor, journal):
        disk = Disk(journal)
        done = await asyncio.wait_for(supervisor.generate(ask(tmp_path / "v.mp4", steps=1)), 60)
        assert "disk has not answered for 0.3 s" in caplog.text
        disk.go_on()
        assert [ended.ending.event for ended in await journal.ended()] == [done]


async def test_a_disk_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end is told all the same, and the log says why it was not written; with the next request it is. If the engine
    is killed before, a request that is done is known by its video."""
    async with engine(tmp_path) as (supervisor, journal):
        trap = "CREATE TRIGGER trap BEFORE INSERT ON ended BEGIN SELECT RAISE(ABORT, 'the disk fails'); END"
        await journal._on_thread(journal._execute, trap, ())
        done = await supervisor.generate(ask(tmp_path / "v.mp4", steps=1))
        assert "the journal cannot be written: the disk fails" in caplog.text
        shutil.copytree(tmp_path / "state", tmp_path / "killed" / "state")
        await journal._on_thread(journal._execute, "DROP TRIGGER trap", ())
        later = await supervisor.generate(ask(tmp_path / "w.mp4", steps=1))
        assert [ended.ending.event for ended in await journal.ended()] == [done, later]
    async with engine(tmp_path / "killed") as (supervisor, journal):
        await journal._on_thread(journal._execute, "DROP TRIGGER trap", ())
        assert await supervisor.result(done.id) == done
        assert supervisor.trace().spans == []


async def test_an_engine_that_stops_has_told_everybody(tmp_path: Path) -> None:
    """It is stopped while an end is being written: who waits hears of that end, and of no other."""
    async with engine(tmp_path) as (supervisor, journal):
        disk = Disk(journal)
        identity = (await supervisor.submit(ask(tmp_path / "v.mp4", steps=1))).id
        waiting = asyncio.create_task(supervisor.result(identity))
        await until(disk.reached.is_set, "the end")
        stopping = asyncio.create_task(supervisor.stop())
        await asyncio.sleep(0.1)
        assert not waiting.done() and not stopping.done()
        disk.go_on()
        await stopping
        assert waiting.done() and waiting.result().id == identity
    assert rows(tmp_path) == {"tasks": 0, "ended": 0}
