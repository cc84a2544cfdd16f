"""Both clients against a real `engine serve`, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine import AsyncClient, Client, UserParams
from engine.connection import Deadlines
from ipc.errors import (
    BadConfig,
    BadRequest,
    Busy,
    Cancelled,
    EngineError,
    Failure,
    NotFound,
    ProtocolError,
    ServerUnavailable,
    VersionMismatch,
)  # fmt: skip
from ipc.frames import encode_frame
from ipc.messages.client import PROTOCOL_VERSION
from ipc.messages.server import Done, Progress, Refused, Welcome
from tests.engine.wire import EngineProcess

SMALL: dict[str, Any] = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "steps": 2, "seed": 1}
LONG = {**SMALL, "steps": 1000}
"""Keeps the engine busy until it is cancelled."""
HASTY = Deadlines(connect=0.5, reply=0.5, submit=0.5, cancel=0.5, probe=0.2)
PATIENT = Deadlines(connect=10, reply=4, submit=10, cancel=10, probe=0.2)
"""Of an engine that answers, though it may have to wait for a core."""


@pytest.fixture(params=["Client", "AsyncClient"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method of either client, so that every test runs with both: `call(path, "status")`."""

    def blocking(path: Path, method: str, *args: Any, deadlines: Deadlines | None = None, **kwargs: Any) -> Any:
        return getattr(Client(path, deadlines), method)(*args, **kwargs)

    def on_a_loop(path: Path, method: str, *args: Any, deadlines: Deadlines | None = None, **kwargs: Any) -> Any:
        async def main() -> Any:
            return await getattr(AsyncClient(path, deadlines), method)(*args, **kwargs)

        return asyncio.run(main())

    return blocking if request.param == "Client" else on_a_loop


def test_generate_reports_progress_and_ends_with_the_file(
    engine_process: EngineProcess, tmp_path: Path, call: Callable[..., Any], read_video: Any
) -> None:
    """A request by keywords: progress events with both steps, then `Done` with the file and its metadata."""
    seen: list[Progress] = []
    done = call(
        engine_process.socket,
        "generate",
        on_progress=seen.append,
        output=str(tmp_path / "v.mp4"),
        metadata_json=True,
        **SMALL,
    )
    assert isinstance(done, Done)
    assert done.path == str(tmp_path / "v.mp4")
    assert read_video(done.path).frames.shape == (5, 32, 32, 3)
    assert done.metadata["parameters"]["steps"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.json", "v.mp4"]
    assert {event.id for event in seen} == {done.id}


def test_a_relative_output_is_the_clients(
    engine_process: EngineProcess, tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`output="here.mp4"` is made in the directory of the client, not of the engine; so is the default."""
    monkeypatch.chdir(tmp_path)
    accepted = call(engine_process.socket, "submit", UserParams(**SMALL, output="here.mp4"))
    assert accepted.params["output"] == str(tmp_path / "here.mp4")
    assert call(engine_process.socket, "result", accepted.id).path == str(tmp_path / "here.mp4")


def test_submit_then_result_from_another_client(
    engine_process: EngineProcess, tmp_path: Path, call: Callable[..., Any]
) -> None:
    """`accepted` has every default filled in; any client can wait for the end, during and after it."""
    accepted = call(engine_process.socket, "submit", output=str(tmp_path / "v.mp4"), **SMALL)
    assert accepted.params["solver"] == "unipc"
    done = call(engine_process.socket, "result", accepted.id)
    assert done == Client(engine_process.socket).result(accepted.id)


def test_cancel_ends_a_task_for_its_listeners(
    engine_process: EngineProcess, tmp_path: Path, call: Callable[..., Any]
) -> None:
    """While one thread waits, another cancels: the waiting one gets `Cancelled`, no file is there, `list` says so."""
    accepted = call(engine_process.socket, "submit", output=str(tmp_path / "v.mp4"), **LONG)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call, engine_process.socket, "result", accepted.id)
        call(engine_process.socket, "cancel", accepted.id)
        with pytest.raises(Cancelled):
            waiting.result(timeout=30)
    [task] = [task for task in call(engine_process.socket, "tasks") if task.id == accepted.id]
    assert task.state == "cancelled"
    assert not list(tmp_path.iterdir())
    call(engine_process.socket, "cancel", accepted.id)


@pytest.mark.parametrize("method", ["cancel", "result"])
def test_an_unknown_id_is_not_found(engine_process: EngineProcess, call: Callable[..., Any], method: str) -> None:
    """`NotFound`, with where to look."""
    with pytest.raises(NotFound, match="engine list"):
        call(engine_process.socket, method, "f" * 32)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 0}, "from 1 to"),
        ({"steps": "many"}, "steps must be a whole number; got 'many'"),
        ({"hieght": 32}, "did you mean 'height'"),
        ({"num_frames": 6}, "nearest is 5 or 9"),
        ({"output": "/nowhere/v.mp4"}, "does not exist"),
    ],
)
def test_a_bad_request_says_what_to_change(
    engine_process: EngineProcess, tmp_path: Path, call: Callable[..., Any], fields: dict[str, Any], says: str
) -> None:
    """`BadRequest`, whether the client or the engine finds it, and nothing is queued."""
    before = call(engine_process.socket, "status")
    with pytest.raises(BadRequest, match=says):
        call(engine_process.socket, "submit", **{**SMALL, "output": str(tmp_path / "v.mp4"), **fields})
    after = call(engine_process.socket, "status")
    assert (after.waiting, after.running, after.failed) == (before.waiting, before.running, before.failed)


def test_threads_share_one_client(engine_process: EngineProcess, tmp_path: Path) -> None:
    """Four threads, one `Client`, a request each: four files."""
    client = Client(engine_process.socket)
    with client, ThreadPoolExecutor(4) as pool:
        paths = [tmp_path / f"{n}.mp4" for n in range(4)]
        dones = list(pool.map(lambda path: client.generate(UserParams(**SMALL, output=str(path))), paths))
    assert [done.path for done in dones] == [str(path) for path in paths]
    assert all(path.is_file() for path in paths)


async def test_tasks_share_one_async_client(engine_process: EngineProcess, tmp_path: Path) -> None:
    """Four requests at a time through one `AsyncClient`."""
    async with AsyncClient(engine_process.socket) as client:
        dones = await asyncio.gather(*(client.generate(**SMALL, output=str(tmp_path / f"{n}.mp4")) for n in range(4)))
    assert len({done.path for done in dones}) == 4


async def test_cancelling_the_waiting_task_cancels_the_request(engine_process: EngineProcess, tmp_path: Path) -> None:
    """asyncio's cancel of `generate` reaches the engine."""
    client = AsyncClient(engine_process.socket)
    first: asyncio.Queue[str] = asyncio.Queue()
    generating = asyncio.create_task(
        client.generate(on_progress=lambda e: first.put_nowait(e.id), **LONG, output=str(tmp_path / "v.mp4"))
    )
    identity = await first.get()
    generating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await generating
    assert [task.state for task in await client.tasks() if task.id == identity] == ["cancelled"]


def test_an_error_in_on_progress_cancels_the_request(
    engine_process: EngineProcess, tmp_path: Path, call: Callable[..., Any]
) -> None:
    """The callback's own exception comes out, and the engine stops working for it."""

    def refuse(event: Progress) -> None:
        raise KeyError(event.id)

    with pytest.raises(KeyError) as caught:
        call(engine_process.socket, "generate", on_progress=refuse, **LONG, output=str(tmp_path / "v.mp4"))
    states = {task.id: task.state for task in Client(engine_process.socket).tasks()}
    assert states[caught.value.args[0]] == "cancelled"


def test_a_slow_listener_sees_the_newest_progress(engine_process: EngineProcess, tmp_path: Path) -> None:
    """`events` of a task that has ended begins with its last progress and ends with `Done`."""
    client = Client(engine_process.socket)
    done = client.generate(**SMALL, output=str(tmp_path / "v.mp4"))
    events = list(client.events(done.id))
    assert events[-1] == done
    assert len(events) == 2


def test_busy_carries_when_to_come_back(short_dir: Path, call: Callable[..., Any]) -> None:
    """A full queue: `Busy` with `retry_after`."""
    with EngineProcess(short_dir, "--max-queue", "1") as engine:
        call(engine.socket, "submit", **LONG, output=str(short_dir / "1.mp4"))
        with pytest.raises(Busy) as caught:
            call(engine.socket, "submit", **LONG, output=str(short_dir / "2.mp4"))
        assert caught.value.retry_after is not None
        assert caught.value.retry_after > 0


def test_shutdown_returns_when_the_path_is_free(short_dir: Path, call: Callable[..., Any]) -> None:
    """After `shutdown` another engine can start at once; what was accepted is in the journal and in its list."""
    with EngineProcess(short_dir) as engine:
        accepted = call(engine.socket, "submit", **LONG, output=str(short_dir / "v.mp4"))
        call(engine.socket, "shutdown", drain=False)
        assert not engine.socket.exists()
        with EngineProcess(short_dir) as again:
            [task] = call(again.socket, "tasks")
            assert task.id == accepted.id
            call(again.socket, "cancel", accepted.id)


@contextlib.contextmanager
def impostor(path: Path, behave: Callable[[socket.socket], None]) -> Iterator[None]:
    """A server of one connection that does `behave`, then hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                behave(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join(timeout=30)
        assert not thread.is_alive()


def until_left(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def welcome(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(encode_frame(Welcome(ref=1, version=PROTOCOL_VERSION, engine="?", model="?", pid=1)))


def test_nobody_there(short_dir: Path, call: Callable[..., Any]) -> None:
    """No socket, a stale socket, a directory that is none: `ServerUnavailable` with what to do."""
    stale = short_dir / "stale.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    (short_dir / "file").touch()
    for path in (short_dir / "none.sock", stale, short_dir / "file" / "engine.sock", short_dir / "no" / "engine.sock"):
        with pytest.raises(ServerUnavailable, match=r"engine serve.*--socket"):
            call(path, "status")


def test_a_path_that_is_too_long(call: Callable[..., Any]) -> None:
    """`BadConfig`, not an OSError about AF_UNIX."""
    with pytest.raises(BadConfig, match="at most 107"):
        call(Path("/tmp/" + "x" * 120), "status")


def say(data: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(data)


def refuse(code: str) -> Callable[[socket.socket], None]:
    return say(encode_frame(Refused(error=Failure(code, "the reason"), retry_after=1.5)))


def listen_then_refuse(connection: socket.socket) -> None:
    connection.recv(65536)
    refuse("version_mismatch")(connection)


def hang_up(connection: socket.socket) -> None:
    return None


def hang_up_in_the_middle(connection: socket.socket) -> None:
    connection.recv(9)


def welcome_then_hang(connection: socket.socket) -> None:
    welcome(connection)
    until_left(connection)


def welcome_to_everything(connection: socket.socket) -> None:
    welcome(connection)
    welcome(connection)
    until_left(connection)


@pytest.mark.parametrize(
    ("behave", "error", "says"),
    [
        (hang_up, ServerUnavailable, "ended the connection"),
        (hang_up_in_the_middle, ServerUnavailable, "ended the connection"),
        (say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), ProtocolError, "frame length"),
        (say(b"\x00\x00\x00\x01\xc1"), ProtocolError, "undecodable"),
        (until_left, ServerUnavailable, "did not answer within 0.5 seconds"),
        (welcome_then_hang, ServerUnavailable, "did not answer within 0.5 seconds"),
        (welcome_to_everything, ProtocolError, "got Welcome as the answer to GetStatus"),
        (refuse("busy"), Busy, "the reason"),
        (listen_then_refuse, VersionMismatch, "the reason"),
        (refuse("a_code_of_tomorrow"), EngineError, "the reason"),
    ],
)
def test_every_kind_of_bad_server_is_a_typed_error(
    short_dir: Path,
    call: Callable[..., Any],
    behave: Callable[[socket.socket], None],
    error: type[Exception],
    says: str,
) -> None:
    """It hangs up, talks nonsense, says nothing, or refuses: an exception that tells which, within the deadline."""
    with impostor(short_dir / "engine.sock", behave), pytest.raises(error, match=says) as caught:
        call(short_dir / "engine.sock", "status", deadlines=HASTY)
    if isinstance(caught.value, Busy):
        assert caught.value.retry_after == 1.5


def test_a_server_that_dies_while_we_wait(short_dir: Path, call: Callable[..., Any]) -> None:
    """SIGKILL during `result`: `ServerUnavailable` at once, which says what becomes of the task."""
    with EngineProcess(short_dir) as engine, ThreadPoolExecutor(1) as pool:
        accepted = call(engine.socket, "submit", **LONG, output=str(short_dir / "v.mp4"))
        progress = threading.Event()
        waiting = pool.submit(call, engine.socket, "result", accepted.id, lambda event: progress.set())
        assert progress.wait(30)
        engine.kill()
        with pytest.raises(ServerUnavailable, match="journal"):
            waiting.result(timeout=30)


def test_a_server_that_hangs_while_we_wait_is_noticed(short_dir: Path, call: Callable[..., Any]) -> None:
    """SIGSTOP during `result`: no event comes, the sign of life is asked for and does not come: `ServerUnavailable`."""
    with EngineProcess(short_dir) as engine:
        accepted = call(engine.socket, "submit", **LONG, output=str(short_dir / "v.mp4"))
        progress = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                call, engine.socket, "result", accepted.id, lambda event: progress.set(), deadlines=PATIENT
            )
            assert progress.wait(30)
            engine.process.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(ServerUnavailable, match="did not answer"):
                    waiting.result(timeout=30)
            finally:
                engine.process.send_signal(signal.SIGCONT)
        call(engine.socket, "cancel", accepted.id)


def test_a_quiet_task_is_waited_for(short_dir: Path, call: Callable[..., Any]) -> None:
    """While the stages load no event comes for longer than the client's patience; the engine's signs of life keep it
    waiting, and the video arrives."""
    with EngineProcess(short_dir) as engine:
        patient = Deadlines(probe=0.1)
        done = call(engine.socket, "generate", **SMALL, output=str(short_dir / "v.mp4"), deadlines=patient)
        assert Path(done.path).is_file()
