"""The writer on file systems that refuse at every call, and in directories that are swapped under it."""

from __future__ import annotations

import errno
import io
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import ipc.result
import stages.writer
from ipc.errors import BadRequest, OutputError
from ipc.files import Directory
from ipc.messages.job import Job
from ipc.messages.stage import Run
from ipc.tensor_queue import TensorQueue
from stages.media import read_frames
from stages.stage import Stage
from stages.writer import WholeWrites
from tests.disks import run_on_small_disk
from tests.stages.rig import Rig, is_empty, make_job

CALLS = ("open", "link", "replace", "unlink", "fsync")
"""Of module os: all that the writer does to the file system, but for what it writes (`Faults._raw_file`)."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
CHUNKS = [np.random.default_rng(i).integers(0, 256, (frames, 32, 48, 3), np.uint8) for i, frames in enumerate((5, 4))]


class Faults:
    """Lets the file system calls of this process, and each write to a file of the writer's, fail: the `nth`, counted
    from 1, and with `lasting` all after it."""

    def __init__(self, nth: int, number: int, lasting: bool = False) -> None:
        self.nth, self.number, self.lasting = nth, number, lasting
        self.count = 0
        self.writes = 0

    @property
    def fired(self) -> bool:
        return self.count >= self.nth

    def _faulty(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.nth or (self.lasting and self.fired):
                raise OSError(self.number, os.strerror(self.number))
            return call(*arguments, **options)

        return count

    def _raw_file(self) -> type[io.FileIO]:
        """What is below Python's buffers, with writes that are counted."""
        faulty = self._faulty(io.FileIO.write)

        def write(file: io.FileIO, data: Any) -> int:
            self.writes += 1
            return int(faulty(file, data))

        return type("Raw", (io.FileIO,), {"write": write})

    @contextmanager
    def __call__(self) -> Iterator[None]:
        raw = self._raw_file()

        def binary(fd: int, mode: str) -> io.BufferedRandom:
            return io.BufferedRandom(raw(fd, mode))

        def text(fd: int, mode: str, encoding: str) -> io.TextIOWrapper:
            return io.TextIOWrapper(io.BufferedWriter(raw(fd, mode)), encoding)

        calls = {name: self._faulty(getattr(os, name)) for name in CALLS}
        whole = type("Whole", (stages.writer.WholeWrites, raw), {})
        with (
            mock.patch.multiple(os, fdopen=binary, **calls),
            mock.patch.multiple(stages.writer, WholeWrites=whole),
            mock.patch.object(ipc.result, "open", text, create=True),
        ):
            yield


@pytest.fixture
def writer(rig: Rig) -> Stage:
    return rig.load("writer")


@pytest.fixture
def frames(rig: Rig) -> Iterator[TensorQueue]:
    """The vae's end of the queue."""
    queue = rig.memory.queues["frames"]
    with TensorQueue.attach(queue.spec, queue.fds, "producer", 1) as producer:
        yield producer


def put(frames: TensorQueue, job: Job, index: int, chunk: NDArray[np.uint8]) -> None:
    with frames.put(job.id, index, "uint8", chunk.shape, 1.0) as view:
        np.frombuffer(view, np.uint8).reshape(chunk.shape)[:] = chunk


def write(writer: Stage, frames: TensorQueue, job: Job, between: Callable[[], object] = lambda: None) -> None:
    """A whole video; `between` the chunks something may happen. Whatever becomes of it, it is dropped at the end."""
    writer.begin(job)
    try:
        for index, chunk in enumerate(CHUNKS):
            put(frames, job, index, chunk)
            writer.step(Run(id=job.id, phase="write", index=index, seconds={} if index else None))
            if index == 0:
                between()
    finally:
        writer.drop(job.id)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def attempt(writer: Stage, frames: TensorQueue, job: Job, faults: Faults) -> str | None:
    """One video under faults; what the client is told, or None when it is done."""
    try:
        with faults():
            write(writer, frames, job)
    except OutputError as error:
        assert os.strerror(faults.number) in str(error)
        assert os.path.dirname(job.output) not in str(error)
        return str(error)
    return None


def fill(directory: Path, before: dict[str, bytes]) -> None:
    for path in directory.iterdir():
        path.unlink()
    for name, content in before.items():
        (directory / name).write_bytes(content)


def sweep(writer: Stage, frames: TensorQueue, directory: Path, number: int, before: dict[str, bytes]) -> int:
    """Let the 1st, 2nd, 3rd, ... call or write fail until none is left: a failed request leaves the directory as
    `before`, a done one has made both files, whole. How many there are."""
    fill(directory, {})
    write(writer, frames, make_job(directory / "v.mp4", metadata_json=True))
    whole = contents(directory)
    for nth in range(1, 1000):
        fill(directory, before)
        faults = Faults(nth, number)
        job = make_job(directory / "v.mp4", metadata_json=True)
        told = attempt(writer, frames, job, faults)
        if told is not None:
            assert contents(directory) == before, f"call {nth}: {told}"
        else:  # what failed, if something did, was the removal of what is not needed any more
            assert contents(directory) == whole, f"call {nth}"
        if not faults.fired:
            assert faults.writes > 10, "a small part of a video takes one write"
            return nth - 1
    raise AssertionError("the calls do not end")


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_any_call_may_fail(writer: Stage, frames: TensorQueue, rig: Rig, tmp_path: Path, number: int) -> None:
    """Each time an `OutputError` and the directory as it was, with an older video and its JSON untouched; every slot is
    free, and the next request is served."""
    assert sweep(writer, frames, tmp_path, number, {"v.mp4": b"older", "v.json": b"older"}) > 20
    assert is_empty(rig)
    assert writer.state().tasks == frozenset()


def test_any_call_may_fail_where_nothing_was(writer: Stage, frames: TensorQueue, tmp_path: Path) -> None:
    """As above, in an empty directory, which stays empty."""
    assert sweep(writer, frames, tmp_path, errno.EIO, {}) > 20


@pytest.mark.parametrize("forgets", ["_restore", "_keep"])
def test_the_sweep_notices_a_writer_that_leaves_something(
    writer: Stage, frames: TensorQueue, tmp_path: Path, forgets: str
) -> None:
    """The control: a writer that does not put back, or does not keep, what had the final name is found out."""
    with mock.patch.object(Directory, forgets, lambda *_: None), pytest.raises(AssertionError, match=r"call \d+"):
        sweep(writer, frames, tmp_path, errno.EIO, {"v.mp4": b"older", "v.json": b"older"})


class Careless(WholeWrites):
    """Takes what could not be written for written."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def test_the_sweep_notices_a_write_that_is_lost(writer: Stage, frames: TensorQueue, tmp_path: Path) -> None:
    """The control: a request is called done, and its file is not whole."""
    with mock.patch.object(stages.writer, "WholeWrites", Careless), pytest.raises(AssertionError, match=r"call \d+"):
        sweep(writer, frames, tmp_path, errno.EIO, {})


def test_a_file_system_that_fails_for_good_leaves_the_writer_alive(
    writer: Stage, frames: TensorQueue, rig: Rig, tmp_path: Path
) -> None:
    """From the Nth call on everything fails, the cleaning up too: an `OutputError`, never a crash or half a file at the
    final name; when the file system is back, a request of that name is done and leaves nothing else."""
    for nth in range(1, 1000):
        fill(tmp_path, {"v.mp4": b"older"})
        faults = Faults(nth, errno.EROFS, lasting=True)
        job = make_job(tmp_path / "v.mp4")
        attempt(writer, frames, job, faults)
        video = (tmp_path / "v.mp4").read_bytes()
        assert video == b"older" or (video[4:8] == b"ftyp" and b"moov" in video and b"mdat" in video)
        assert is_empty(rig)
        assert writer.state().tasks == frozenset()
        if not faults.fired:
            break
        write(writer, frames, job)
        assert set(contents(tmp_path)) == {"v.mp4"}, f"call {nth}"
    assert nth > 15


def test_a_video_is_on_the_disk_before_it_has_its_name(
    writer: Stage, frames: TensorQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gets a final name was synced as it is, and that name is synced before the request is done: a loss of power
    after that loses nothing."""
    synced, order = dict[int, bytes](), list[str]()
    fsync, replace = os.fsync, os.replace

    def note_sync(fd: int) -> None:
        fsync(fd)
        status = os.fstat(fd)
        order.append("directory" if stat.S_ISDIR(status.st_mode) else "file")
        if order[-1] == "file":
            synced[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def note_name(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        replace(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        path = tmp_path / target
        assert synced[path.stat().st_ino] == path.read_bytes()
        order.append(target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    write(writer, frames, make_job(tmp_path / "v.mp4", metadata_json=True))
    assert order == ["file", "file", "v.json", "v.mp4", "directory"]


def test_a_chunk_granted_ahead_of_a_refused_one_is_refused_too(
    writer: Stage, frames: TensorQueue, rig: Rig, tmp_path: Path
) -> None:
    """The disk refuses chunk 0 while chunk 1 is on its way: the same `OutputError` for both. Dropped, and begun again,
    the video is done."""
    job = make_job(tmp_path / "v.mp4")
    writer.begin(job)
    told = []
    with Faults(1, errno.ENOSPC)():
        for index, chunk in enumerate(CHUNKS):
            put(frames, job, index, chunk)
            with pytest.raises(
                OutputError, match=r"v\.mp4 could not be written: No space left.*; free some"
            ) as refused:
                writer.step(Run(id=job.id, phase="write", index=index))
            told.append(str(refused.value))
    assert told[0] == told[1]
    writer.drop(job.id)
    assert is_empty(rig)
    write(writer, frames, job)
    assert set(contents(tmp_path)) == {"v.mp4"}


REAL_DISK = """
import errno, os
import av
import msgspec
import numpy as np
from ipc.messages.job import Job
from stages.writer import Video, first_error

job = msgspec.json.decode(sys.argv[2], type=Job)
frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
outcomes = []

def attempt(options):
    remount(options)
    video = None
    try:
        video = Video(job)
        video.add(frames)
        video.complete({"prompt": "x" * 5000}, lambda: None)
        return "done"
    except (OSError, av.FFmpegError) as error:
        return errno.errorcode[first_error(error).errno]
    finally:
        if video is not None:
            video.close()

for pages in range(1, 64):
    outcomes.append(attempt(f"size={pages * 4096}"))
    left = sorted(os.listdir(directory))
    assert left == (["v.json", "v.mp4"] if outcomes[-1] == "done" else []), (pages, left, outcomes)
    if outcomes[-1] == "done":
        break
before = {name: open(directory + "/" + name, "rb").read() for name in left}
outcomes.append(attempt("ro"))
assert before == {name: open(directory + "/" + name, "rb").read() for name in os.listdir(directory)}
outcomes.append(attempt("rw,size=1m"))
print(*outcomes)
"""


def test_a_disk_that_is_really_full_or_read_only(tmp_path: Path) -> None:
    """A tmpfs of 1, 2, 3, ... pages in a mount namespace of its own: ENOSPC and an empty directory, until there is
    room for the video. Read-only: EROFS, and the files of before untouched; writable again: done."""
    job = msgspec.json.encode(make_job(tmp_path / "v.mp4", metadata_json=True)).decode()
    *full, first, read_only, last = run_on_small_disk(tmp_path, REAL_DISK, job)
    assert set(full) == {"ENOSPC"} and len(full) > 5
    assert (first, read_only, last) == ("done", "EROFS", "done")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory that nothing may be written to, with a file that nothing may change, read or remove."""
    directory = tmp_path / "outside"
    (directory / "b").mkdir(parents=True)
    victims = [directory / "victim.mp4", directory / "b" / "victim.mp4"]
    for victim in victims:
        victim.write_bytes(b"precious")
    yield directory
    assert sorted(path for path in directory.rglob("*") if path.is_file()) == sorted(victims)
    assert all(victim.read_bytes() == b"precious" for victim in victims)


def swap(directory: Path, target: Path) -> None:
    """Put a symbolic link in the place of a directory."""
    directory.rename(directory.with_name(f"{directory.name}-moved"))
    directory.symlink_to(target)


@pytest.mark.parametrize("component", ["root", "root/a", "root/a/b"])
def test_a_directory_swapped_before_the_first_write(
    writer: Stage, frames: TensorQueue, tmp_path: Path, outside: Path, component: str
) -> None:
    """After the request was accepted, a part of its path becomes a link out of the root: an `OutputError` that says so;
    nothing is written anywhere, and the cleaning up after a crash touches nothing there either."""
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (outside / "a").symlink_to(outside)
    job = make_job(tmp_path / "root" / "a" / "b" / "victim.mp4", metadata_json=True)
    swap(tmp_path / component, outside)
    with pytest.raises(OutputError, match="its directory was replaced since the request was accepted"):
        write(writer, frames, job)


@pytest.mark.parametrize("component", ["root", "root/a", "root/a/b"])
def test_a_directory_swapped_between_two_writes(
    writer: Stage, frames: TensorQueue, tmp_path: Path, outside: Path, component: str
) -> None:
    """The same between the first chunk and the last: the video goes into the directory that was opened."""
    directory = tmp_path / "root" / "a" / "b"
    directory.mkdir(parents=True)
    (outside / "a").symlink_to(outside)
    inode = directory.stat().st_ino
    write(writer, frames, make_job(directory / "victim.mp4"), lambda: swap(tmp_path / component, outside))
    [found] = [path for path in tmp_path.rglob("victim.mp4") if not path.is_relative_to(outside)]
    assert found.parent.stat().st_ino == inode


@pytest.mark.parametrize("suffix", ["", ".json", ".old", ".json.old"])
@pytest.mark.parametrize("kind", ["link", "fifo", "hard link"])
def test_traps_at_the_temporary_names(
    writer: Stage, frames: TensorQueue, tmp_path: Path, outside: Path, suffix: str, kind: str
) -> None:
    """Whoever guesses a temporary name puts a link or a FIFO there, before the first write or after it: it is removed,
    or the request fails; nothing is written through it, and nothing waits."""
    directory = tmp_path / "root"
    directory.mkdir()
    (directory / "v.mp4").write_bytes(b"older")

    def trap(path: str) -> None:
        match kind:
            case "link":
                os.symlink(outside / "victim.mp4", path)
            case "fifo":
                os.mkfifo(path)
            case "hard link":
                os.link(outside / "victim.mp4", path)

    early = make_job(directory / "v.mp4", metadata_json=True)
    trap(early.partial + suffix)
    write(writer, frames, early)
    assert set(os.listdir(directory)) == {"v.mp4", "v.json"}
    late = make_job(directory / "v.mp4", metadata_json=True)
    try:
        write(writer, frames, late, lambda: trap(late.partial + suffix))
    except OutputError as error:
        assert "File exists" in str(error)
    assert set(os.listdir(directory)) == {"v.mp4", "v.json"}


def test_a_link_at_the_final_name_is_replaced(
    writer: Stage, frames: TensorQueue, tmp_path: Path, outside: Path, read_video: Callable[[Path], Any]
) -> None:
    """A link to a file outside appears where the video is to be: the video takes the place of the link."""
    root = tmp_path / "root"
    root.mkdir()
    for name in ("v.mp4", "v.json"):
        (root / name).symlink_to(outside / "victim.mp4")
    write(writer, frames, make_job(root / "v.mp4", metadata_json=True))
    assert not (root / "v.mp4").is_symlink() and not (root / "v.json").is_symlink()
    assert len(read_video(root / "v.mp4").frames) == 9


@pytest.mark.parametrize("place", ["file", "directory", "fifo", "socket", "device"])
def test_an_init_file_that_is_swapped_is_not_read(tmp_path: Path, outside: Path, place: str) -> None:
    """After it was accepted, the init file or its directory becomes a link, or something that is no file: `BadRequest`
    at once, without a word of what is there."""
    path = tmp_path / "root" / "victim.mp4"
    if place == "directory":
        (tmp_path / "root").symlink_to(outside)
    else:
        path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        match place:
            case "file":
                path.symlink_to(outside / "victim.mp4")
            case "fifo":
                os.mkfifo(path)
            case "socket":
                listener.bind(os.path.relpath(path))
            case "device":
                path = Path("/dev/zero")
        with pytest.raises(BadRequest, match=rf"^the init file '{path.name}' cannot be read: "):
            next(read_frames(str(path), 1, 16, 16))
