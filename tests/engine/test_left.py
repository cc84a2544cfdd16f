"""Which file is taken for the result of a request that an engine which was killed has left, and which is not."""

from __future__ import annotations

import asyncio
import json
import os
import random
import stat
import time
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest

from engine import left
from engine.journal import Entry, Journal
from engine.left import find_result, take_stock
from engine.models import load_model
from ipc.messages.job import Job
from ipc.messages.server import Done
from ipc.result import MOST_BOXES, SEAL_BYTES
from stages.writer import Video
from tests.engine.test_journal import entry, with_id

MODEL = load_model("wan-demo")
FRAMES = np.broadcast_to(np.array((200, 30, 60), np.uint8), (9, 32, 48, 3))
"""Of one colour: the file is small, and every byte of it is tried."""


def request(folder: Path, name: str = "v", *, metadata_json: bool = False) -> Entry:
    """Of a small video, with a prompt that could be taken for an id."""
    of = entry(folder, name)
    lies = '", "task": "0", "' + "{}" * 3
    job = msgspec.structs.replace(
        of.job, width=48, height=32, num_frames=9, metadata_json=metadata_json,
        metadata={"parameters": {"prompt": lies, "task": "1"}, "task": of.job.id, "zahl": 0.1, "红色": None},
    )  # fmt: skip
    return msgspec.structs.replace(of, job=job)


def made(job: Job, metadata: Any = None) -> bytes:
    """The video, written by the writer; with its metadata, if there are no others."""
    video = Video(job)
    video.add(FRAMES)
    video.complete(job.metadata if metadata is None else metadata, lambda: None)
    video.close()
    return Path(job.output).read_bytes()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return request(tmp_path).job


def test_a_video_is_found_with_its_metadata(job: Job, tmp_path: Path) -> None:
    """As it was written; it plays, and says in its comment what it says to us. Nothing is there beside it."""
    made(job)
    assert find_result(job) == job.metadata
    with av.open(job.output) as container:
        assert json.loads(container.metadata["comment"]) == job.metadata
        assert len(list(container.decode(video=0))) == 9
    assert os.listdir(tmp_path) == ["v.mp4"]


def test_a_flipped_bit_anywhere(job: Job) -> None:
    """One bit of any byte of the file is another: it is not taken for the result."""
    whole = made(job)
    dice = random.Random(3)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        Path(job.output).write_bytes(damaged)
        assert find_result(job) is None, f"byte {place}"
    Path(job.output).write_bytes(whole)
    assert find_result(job) is not None


def test_a_file_that_is_cut_or_longer(job: Job) -> None:
    """Of any length but its own, or followed by something."""
    whole = made(job)
    for length in range(len(whole)):
        Path(job.output).write_bytes(whole[:length])
        assert find_result(job) is None, length
    for more in (b"\0", whole[-SEAL_BYTES:], whole):
        Path(job.output).write_bytes(whole + more)
        assert find_result(job) is None


def test_random_damage(job: Job) -> None:
    """Bytes that are changed, removed, repeated and moved: never a result, and never anything but that answer."""
    whole = made(job)
    dice = random.Random(4)
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            at, size = dice.randrange(len(damaged)), dice.randint(1, 64)
            match dice.randrange(3):
                case 0:
                    damaged[at : at + size] = dice.randbytes(size)
                case 1:
                    del damaged[at : at + size]
                case 2:
                    damaged[at:at] = damaged[:size]
        if damaged != whole:
            Path(job.output).write_bytes(damaged)
            assert find_result(job) is None


def test_the_video_of_another_request(tmp_path: Path) -> None:
    """Whole, at the name of this one; also if this one's id is written over the other's in it."""
    mine, other = request(tmp_path).job, request(tmp_path, "other").job
    content = made(other)
    Path(mine.output).write_bytes(content)
    assert find_result(mine) is None
    forged = content.replace(other.id.encode(), mine.id.encode())
    assert forged != content
    Path(mine.output).write_bytes(forged)
    assert find_result(mine) is None
    assert find_result(other) == other.metadata


def test_a_video_without_a_seal(job: Job) -> None:
    """As another program would write it, or an older engine."""
    whole = made(job)
    Path(job.output).write_bytes(whole[:-SEAL_BYTES])
    with av.open(job.output) as container:
        assert json.loads(container.metadata["comment"])["task"] == job.id
    assert find_result(job) is None


def test_metadata_that_nobody_could_be_told(job: Job) -> None:
    """Somebody who may write there has made a whole video with this request's id: its metadata are no map, or too long,
    too deep or too large to be sent. The request is done again, and the engine starts."""
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"x": deep}
    for wrong in ([job.id], {"task": job.id, "n": 10**30}, {"task": job.id, "x": "x" * (1 << 19)}):
        made(job, wrong)
        assert find_result(job) is None
    made(job, {"task": job.id, "x": deep})
    found = find_result(job)
    assert found is None or msgspec.msgpack.decode(msgspec.msgpack.encode(found)) == found


@pytest.mark.parametrize("what", ["link", "fifo", "directory", "device", "nothing", "linked directory", "no directory"])
def test_what_is_no_file(tmp_path: Path, what: str) -> None:
    """It is not opened, or not read, and nothing is waited for."""
    (tmp_path / "out").mkdir()
    job = request(tmp_path / "out").job
    path = Path(job.output)
    made(job)
    kept = path.rename(tmp_path / "kept.mp4")
    match what:
        case "link":
            path.symlink_to(kept)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "linked directory":
            path.parent.rmdir()
            (tmp_path / "elsewhere").mkdir()
            kept.rename(tmp_path / "elsewhere" / path.name)
            path.parent.symlink_to(tmp_path / "elsewhere")
            assert path.is_file()
        case "no directory":
            path.parent.rmdir()
    assert find_result(job) is None


def test_a_stranger_s_file_costs_little(job: Job) -> None:
    """One with a million boxes, and one larger than the video can be, which says all the right things: at once."""
    began = time.monotonic()
    with open(job.output, "wb") as file:
        file.write((8).to_bytes(4, "big") + b"free")
        file.write(((8).to_bytes(4, "big") + b"free") * 1_000_000)
    assert find_result(job) is None
    whole = made(job)
    huge = 1 << 36
    with open(job.output, "wb") as file:  # sparse
        file.write(whole[:-SEAL_BYTES])
        file.write((1).to_bytes(4, "big") + b"free" + (huge - len(whole)).to_bytes(8, "big"))
        file.seek(huge - SEAL_BYTES)
        file.write(whole[-SEAL_BYTES:])
    assert os.path.getsize(job.output) == huge
    assert find_result(job) is None
    assert time.monotonic() - began < 5
    assert MOST_BOXES < 1000


def test_the_json_is_completed(tmp_path: Path) -> None:
    """Missing, another's, a link or unreadable: it is there afterwards with what is in the video. One that is right is
    left alone, and without a wish for one there is none."""
    job = request(tmp_path, metadata_json=True).job
    made(job)
    beside = tmp_path / "v.json"
    right, status = beside.read_bytes(), beside.stat()
    assert find_result(job) == job.metadata
    assert beside.stat() == status
    (tmp_path / "precious").write_bytes(right)
    for wrong in ("missing", "shorter", "longer", "link"):
        beside.unlink()
        match wrong:
            case "shorter":
                beside.write_bytes(right[:-1])
            case "longer":
                beside.write_bytes(right + b"\n")
            case "link":
                beside.symlink_to(tmp_path / "precious")
        assert find_result(job) == job.metadata
        assert beside.read_bytes() == right and not beside.is_symlink()
    beside.unlink()
    (tmp_path / "precious").unlink()
    assert find_result(msgspec.structs.replace(job, metadata_json=False)) == job.metadata
    assert os.listdir(tmp_path) == ["v.mp4"]


def test_the_names_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer may have been killed before it had synced them: they are before the request is taken for done."""
    job, fsync, order = request(tmp_path, metadata_json=True).job, os.fsync, list[str]()
    made(job)

    def note(fd: int) -> None:
        fsync(fd)
        order.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", note)
    find_result(job)
    assert order == ["directory"]
    order.clear()
    (tmp_path / "v.json").unlink()
    find_result(job)
    assert order[:2] == ["file", "directory"]


def test_a_json_that_cannot_be_written(tmp_path: Path) -> None:
    """The request is to be done again, as its result is not complete."""
    job = request(tmp_path, metadata_json=True).job
    made(job)
    (tmp_path / "v.json").unlink()
    (tmp_path / "v.json").mkdir()
    assert find_result(job) is None


def test_a_writer_that_outlives_its_engine_puts_nothing_in_place(job: Job, tmp_path: Path) -> None:
    """It was stopped when its file was whole and had its temporary name still. Once the next engine has looked, it has
    none that could be exchanged for the final one."""
    video = Video(job)
    video.add(FRAMES)

    def look() -> None:
        assert os.listdir(tmp_path) == [os.path.basename(job.partial)]
        assert find_result(job) is None

    with pytest.raises(FileNotFoundError):
        video.complete(job.metadata, look)
    video.close()
    assert os.listdir(tmp_path) == []


async def journal_of(folder: Path, *entries: Entry) -> None:
    """Of an engine that was killed."""
    journal = Journal(folder / "state")
    await journal.open()
    for each in entries:
        await journal.add(each)
    await journal.close()


async def test_stock_is_taken(tmp_path: Path) -> None:
    """Of three requests, of this model and another one, one is done each: those have ended, which the journal has then,
    and are not looked at again. Two that have the same output are never both done."""
    done, undone, elsewhere = (request(tmp_path, name) for name in ("done", "undone", "elsewhere"))
    elsewhere = msgspec.structs.replace(elsewhere, model="another")
    same = with_id(done, "0" * 32)
    for each in (done, elsewhere):
        made(each.job)
    await journal_of(tmp_path, same, done, undone, elsewhere)
    for _ in range(2):
        journal = Journal(tmp_path / "state")
        found = await take_stock(journal, MODEL)
        await journal.close()
        assert found.entries == [same, undone]
        assert [each.entry for each in found.ended] == [done, elsewhere]
        assert [each.ending.event for each in found.ended] == [
            Done(id=each.job.id, path=each.job.output, metadata=each.job.metadata) for each in (done, elsewhere)
        ]
        for each in (done, elsewhere):
            Path(each.job.output).unlink(missing_ok=True)


async def test_stock_on_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    """That a request is done cannot be journalled: it is done all the same, and is found again."""
    done = request(tmp_path)
    made(done.job)
    await journal_of(tmp_path, done)
    fails = "CREATE TRIGGER fails BEFORE INSERT ON ended BEGIN SELECT RAISE(ABORT, 'the disk fails'); END"
    for statement in (fails, "DROP TRIGGER fails"):
        journal = Journal(tmp_path / "state")
        await journal.open()
        await journal._on_thread(journal._execute, statement, ())
        await journal.close()
        again = Journal(tmp_path / "state")
        found = await take_stock(again, MODEL)
        await again.close()
        assert (found.entries, [each.entry for each in found.ended]) == ([], [done])
    last = Journal(tmp_path / "state")
    assert await last.open() == []
    await last.close()


async def test_a_file_system_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start waits for so long and no longer; what was not looked at by then is done again, and nothing is touched
    any more."""
    first, second = request(tmp_path, "first"), request(tmp_path, "second")
    for each in (first, second):
        made(each.job)
    await journal_of(tmp_path, first, second)
    looked: list[str] = []

    def hang(job: Job) -> None:
        looked.append(job.id)
        time.sleep(0.5)

    monkeypatch.setattr(left, "find_result", hang)
    monkeypatch.setattr(left, "LOOK_TIMEOUT", 0.1)
    journal = Journal(tmp_path / "state")
    began = time.monotonic()
    found = await take_stock(journal, MODEL)
    assert time.monotonic() - began < 0.45
    await journal.close()
    assert found.entries == [first, second] and list(found.ended) == []
    await asyncio.sleep(0.7)
    assert looked == [first.job.id]
