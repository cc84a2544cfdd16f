"""`engine reload --supervisor`: the program of a running engine is replaced, and nobody notices; or it is not, and
nobody notices either."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.client import Client
from engine.handover import FORMAT
from engine.version import VERSION
from ipc.errors import ReloadFailed, ServerUnavailable
from ipc.messages.server import Done
from tests.engine.wire import EngineProcess, RawClient, environment, frame, run_engine, wait_for

ROOT = Path(__file__).parents[2]

HAND_OVERS = 20
PER_SECOND = 200

SMALL: dict[str, Any] = {"prompt": "a red circle moves left", "height": 32, "width": 32, "num_frames": 5, "steps": 4}
LONG: dict[str, Any] = SMALL | {"num_frames": 17, "steps": 20, "seed": 5}


@contextlib.contextmanager
def knocking(path: Path) -> Iterator[dict[str, Any]]:
    """Clients that come all the time; what became of them is in the map at the end."""
    outcome: dict[str, Any] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.engine.knocking", str(path), str(PER_SECOND)], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield outcome
        finally:
            output, _ = process.communicate("", timeout=120)
    outcome.update(json.loads(output))


class Working(threading.Thread):
    """One request after the other until it is told to stop; the frames of each, as a hash."""

    def __init__(self, client: Client, directory: Path, number: int, read_video: Any) -> None:
        super().__init__()
        self.client, self.directory, self.number, self.read_video = client, directory, number, read_video
        self.enough = threading.Event()
        self.hashes: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                path = self.directory / f"{self.number}-{len(self.hashes)}.mp4"
                self.client.generate(**SMALL, seed=self.number, output=str(path))
                self.hashes.append(self.read_video(path).sha256)
        except BaseException as error:
            self.error = error


def stage_pids(client: Client) -> dict[str, tuple[int | None, int, int]]:
    return {stage.name: (stage.pid, stage.epoch, stage.restarts) for stage in client.status().stages}


def entries(directory: Path) -> int:
    """Requests in the journal of an engine that has stopped."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(directory / "state" / "journal.sqlite3")) as journal:
        return int(journal.execute("SELECT count(*) FROM tasks").fetchone()[0])


@pytest.mark.alone
@pytest.mark.timeout(600)
def test_twenty_hand_overs_at_two_hundred_connects_a_second(
    engine_process: EngineProcess, short_dir: Path, read_video: Any
) -> None:
    """While 200 clients connect every second and two have videos made, the program is replaced 20 times: nobody is
    refused, nobody is lost, every video is that of an undisturbed engine. The process and its stages are the same, and
    descriptors are not left behind."""
    engine = engine_process
    engine.wait_ready()
    client = Client(engine.socket)
    golden = []
    for number in range(2):
        client.generate(**SMALL, seed=number, output=str(short_dir / f"golden-{number}.mp4"))
        golden.append(read_video(short_dir / f"golden-{number}.mp4").sha256)
    before, files, finished = stage_pids(client), engine.open_files(), client.status().finished
    workers = [Working(client, short_dir, number, read_video) for number in range(2)]
    with knocking(engine.socket) as outcome:
        for worker in workers:
            worker.start()
        for _ in range(HAND_OVERS):
            assert client.reload_supervisor().engine == VERSION
        for worker in workers:
            worker.enough.set()
            worker.join()
    assert outcome["refused"] == outcome["lost"] == 0, outcome
    assert outcome["rate"] > 0.9 * PER_SECOND
    assert [worker.error for worker in workers] == [None, None]
    for worker, expected in zip(workers, golden, strict=True):
        assert len(worker.hashes) > 2
        assert set(worker.hashes) == {expected}
    status = client.status()
    assert (status.pid, status.waiting, status.running, status.failed) == (engine.process.pid, 0, 0, 0)
    assert status.finished == finished + sum(len(worker.hashes) for worker in workers)
    assert stage_pids(client) == before
    wait_for(lambda: engine.open_files() <= files + 1, "no descriptor to be left behind")
    assert engine.log.read_text().count("takes the place of") == HAND_OVERS
    assert "integrity" not in engine.log.read_text()


# What a client has going.


def test_a_client_is_in_the_middle_of_everything(engine_process: EngineProcess, short_dir: Path) -> None:
    """Half of a frame was sent, answers fill a socket and are not read, a request is followed, a hello was not said,
    240 others are there: after the hand-over each goes on where it was, and the end of the request is told once."""
    engine = engine_process
    engine.wait_ready()
    client = Client(engine.socket)
    half, greedy, follower = (RawClient(engine.socket) for _ in range(3))
    silent = RawClient(engine.socket, greet=False)
    crowd = [RawClient(engine.socket) for _ in range(240)]  # more descriptors than one packet carries
    accepted = follower.ask(frame(type="submit", ref=2, params=LONG | {"output": f"{short_dir}/v.mp4"}))
    question = frame(type="status", ref=7, memory=True)
    half.send(question[:9])
    flood = threading.Thread(target=greedy.send, args=(b"".join(frame(type="status", ref=n) for n in range(2000)),))
    flood.start()
    time.sleep(0.3)  # answers fill the socket
    client.reload_supervisor()
    assert half.ask(question[9:])["ref"] == 7
    assert silent.ask(frame(type="hello", ref=1, version=1))["type"] == "welcome"
    assert [reply["ref"] for reply in (greedy.receive() for _ in range(300)) if reply is not None] == [*range(300)]
    events = []
    while not events or events[-1]["type"] == "progress":
        event = follower.receive()
        assert event is not None
        events.append(event)
    assert events[-1]["type"] == "done"
    assert {event["id"] for event in events} == {accepted["id"]}
    assert follower.ask(frame(type="list", ref=3))["type"] == "tasks"
    assert all(client.ask(frame(type="list", ref=4))["ref"] == 4 for client in crowd)
    greedy.socket.shutdown(2)
    flood.join()
    for each in (half, greedy, follower, silent, *crowd):
        each.close()


@pytest.mark.timeout(300)
def test_a_stage_dies_while_the_program_is_replaced(short_dir: Path, read_video: Any) -> None:
    """While the program is replaced, twice, the dit is killed, and the spare that is to take its place or has: the dit
    comes back, and the video is that of an undisturbed engine."""
    with EngineProcess(short_dir, "--warm-spare", placement="split") as engine:
        engine.wait_ready()
        client = Client(engine.socket)
        client.generate(**LONG, output=str(short_dir / "golden.mp4"))
        wait_for(lambda: client.status().spare_pid is not None, "a spare")
        accepted = client.submit(**LONG, output=str(short_dir / "v.mp4"))
        spare, pid = client.status().spare_pid, stage_pids(client)["dit"][0]
        assert pid is not None
        victims = ((0.3, pid), (0.6, spare))
        killers = [threading.Timer(when, os.kill, (victim, signal.SIGKILL)) for when, victim in victims]
        for killer in killers:
            killer.start()
        for _ in range(2):
            client.reload_supervisor()
        client.result(accepted.id)
        assert stage_pids(client)["dit"][0] not in (pid, spare, None)
        restarts = {name: known[2] for name, known in stage_pids(client).items()}
        assert restarts.pop("dit") in (1, 2)
        assert set(restarts.values()) == {0}
    hashes = {read_video(short_dir / name).sha256 for name in ("golden.mp4", "v.mp4")}
    assert len(hashes) == 1


# The program on disk.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the program, to be changed under a running engine."""
    for folder in ("engine", "ipc", "hotreload", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def change(tree: Path, file: str, old: str, new: str) -> None:
    text = (tree / file).read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    write(tree / file, text.replace(old, new))


def write(path: Path, text: str) -> None:
    """With a time of its own: Python takes a file that has the size and the second of the one before for the same."""
    later = path.stat().st_mtime + 2
    path.write_text(text)
    os.utime(path, (later, later))


BROKEN = {
    "does not start": ("engine/reexec.py", "def main(", "def main(:", "status 1"),
    "lacks a file": ("engine/reexec.py", "import msgspec\n", "import msgspec, nothing_of_this_name\n", "status 1"),
    "takes another format": (
        "engine/handover.py", f"FORMAT = {FORMAT}", f"FORMAT = {FORMAT + 1}", f"format {FORMAT}"
    ),
    "does not know a field": ("engine/process.py", "    oom_kills: int\n", "", "oom_kills"),
    "wants a field": ("engine/tasks.py", "    finished: int\n", "    finished: int\n    lost: int\n", "lost"),
    "has other seats": ("engine/devices.py", "{\"text\": device,", "{\"text\": None,", "seats"),
    "finds fault": ("engine/scheduler.py", "        return problems\n", '        return ["a fault"]\n', "a fault"),
    "loses descriptors": (
        "engine/crew.py", "        self.placed.put_back(state.placed, fds)\n", "", "descriptors are of nothing",
    ),
    "hangs": ("engine/reexec.py", "    problem = \"\"\n", "    time.sleep(1000)\n", "did not answer within 8 s"),
    "dies": ("engine/reexec.py", "    problem = \"\"\n", "    os.kill(os.getpid(), 9)\n", "status -9"),
    "says nonsense": ("ipc/messages/program.py", 'tag="program_rehearsed"', 'tag="nonsense"', "does not understand"),
}  # fmt: skip
"""What is wrong with the new program -> the file, what is replaced in it, by what, and a word of the error."""


@pytest.mark.timeout(300)
def test_a_program_that_cannot_go_on(tree: Path, short_dir: Path, read_video: Any) -> None:
    """At each stage of the rehearsal the new program fails in its own way: the operator is told how, the old one goes
    on, keeps its clients and its request, and leaves no process behind. So it does when the rehearsal went well, and
    then the interpreter is gone: the journal is open again. Once all is mended, the newer version that is on disk takes
    over, with the tasks of the one before."""
    nowhere = tree / "nowhere"
    change(tree, "engine/rehearsal.py", "REHEARSAL_TIMEOUT = 60.0", "REHEARSAL_TIMEOUT = 8.0")
    gone = f"os.execve({str(nowhere / 'python')!r} if os.path.exists({str(nowhere)!r}) else PROGRAM[0],"
    change(tree, "engine/replacement.py", "os.execve(PROGRAM[0],", gone)
    with EngineProcess(short_dir, tree=tree) as engine, contextlib.ExitStack() as clients:
        engine.wait_ready()
        client = Client(engine.socket)
        follower = clients.enter_context(RawClient(engine.socket))
        request = LONG | {"steps": 1000, "num_frames": 33, "output": f"{short_dir}/v.mp4"}
        accepted = follower.ask(frame(type="submit", ref=2, params=request))
        before, files = stage_pids(client), engine.open_files()
        for wrong, (file, old, new, word) in BROKEN.items():
            text = (tree / file).read_text()
            change(tree, file, old, new)
            with pytest.raises(ReloadFailed, match=word) as caught:
                client.reload_supervisor()
            assert "the running program goes on" in str(caught.value), wrong
            write(tree / file, text)
            assert stage_pids(client) == before, wrong
        assert "takes the place" not in engine.log.read_text()
        os.truncate(engine.log, 0)  # tracebacks of the broken programs
        wait_for(lambda: engine.open_files() <= files, "no descriptor to be left behind")
        children = Path(f"/proc/{engine.process.pid}/task/{engine.process.pid}/children").read_text().split()
        ours = {client.status().forks_pid, *(pid for pid, _, _ in before.values())}
        assert set(map(int, children)) == ours
        nowhere.mkdir()
        with pytest.raises(ReloadFailed, match="No such file"):
            client.reload_supervisor()
        nowhere.rmdir()
        first = client.generate(**SMALL, priority=10, seed=1, output=str(short_dir / "first.mp4"))
        change(tree, "engine/version.py", f'"{VERSION}"', '"99.0"')
        ran = run_engine("reload", "--supervisor", "--socket", engine.socket)
        assert (ran.returncode, ran.stdout.split(";")[0]) == (0, "engine 99.0 has taken over"), ran.stderr
        assert client.status().engine == client.server().engine == "99.0"
        assert client.result(first.id) == first
        assert stage_pids(client) == before
        client.cancel(accepted["id"])
        while (event := follower.receive()) is not None and event["type"] == "progress":
            pass
        assert event is not None and event["error"]["code"] == "cancelled"
    assert entries(short_dir) == 0


@pytest.mark.timeout(300)
def test_kills_in_the_middle(tree: Path, short_dir: Path, read_video: Any) -> None:
    """SIGKILL during the rehearsal, and then of an engine whose next program has just begun: the engine that is started
    after that finishes everything that was accepted, with the frames of an undisturbed one."""
    deaths = {
        '    problem = ""\n': '    problem = ""\n    os.kill(os.getppid(), 9)\n',
        "        os.close(fd)\n": "        os.close(fd)\n        os.kill(os.getpid(), 9)\n",
    }
    ids, golden = set[str](), ""
    for number, (old, new) in enumerate(deaths.items()):
        with EngineProcess(short_dir, tree=tree) as engine:
            engine.exit_codes = (-signal.SIGKILL,)
            engine.wait_ready()
            client = Client(engine.socket)
            if not ids:
                golden = client.generate(**LONG, output=str(short_dir / "golden.mp4")).id
            ids |= {client.submit(**LONG, output=str(short_dir / f"{number}-{n}.mp4")).id for n in range(3)}
            text = (tree / "engine/reexec.py").read_text()
            change(tree, "engine/reexec.py", old, new)
            with pytest.raises(ServerUnavailable):
                client.reload_supervisor()
            engine.process.wait(60)
            write(tree / "engine/reexec.py", text)
    with EngineProcess(short_dir) as engine:
        client = Client(engine.socket)
        assert {task.id for task in client.tasks()} == ids | {golden}
        for identity in ids:
            assert isinstance(client.result(identity), Done)
    hashes = {read_video(path).sha256 for path in short_dir.glob("*.mp4")}
    assert len(hashes) == 1
    assert len(list(short_dir.glob("*.mp4"))) == 1 + len(ids)
    assert entries(short_dir) == 0


def test_sigterm_in_the_middle(short_dir: Path) -> None:
    """SIGTERM at some moment of a hand-over: the program that is there then stops as it should."""
    with EngineProcess(short_dir) as engine:
        engine.wait_ready()
        timer = threading.Timer(1.5, engine.process.send_signal, (signal.SIGTERM,))
        timer.start()
        with contextlib.suppress(ServerUnavailable):
            while True:
                Client(engine.socket).reload_supervisor()
        timer.join()
        assert engine.process.wait(60) == 0
    assert not engine.socket.exists()
