"""The server around a real supervisor: limits, slow readers, other users, and its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.events import TaskSpec
from engine.listing import LISTED_PROMPT, fitting, row_of
from engine.params import SystemParams
from engine.paths import SocketClaim
from engine.server import Server
from engine.session import Limits
from engine.supervisor import Supervisor
from engine.tasks import Task
from ipc.errors import BadRequest, Busy
from ipc.frames import MAX_FRAME, encode_frame
from ipc.messages.server import Done, Progress, TaskList, TaskRows
from ipc.messages.status import TaskInfo
from tests.engine.wire import RawClient, environment, frame
from tests.stages.rig import make_job

STATUS = frame(type="status", ref=9)
Wait = Callable[..., Coroutine[Any, Any, None]]


@asynccontextmanager
async def serving(directory: Path, limits: Limits | None = None, **system: Any) -> AsyncIterator[Server]:
    """A server in this process. Its stages are left to load; nothing here needs them."""
    claim = SocketClaim(directory / "engine.sock")
    async with Supervisor(SystemParams(placement="fused", device="cpu", threads=1, **system)) as supervisor:
        server = Server(supervisor, claim, limits)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()
    assert server.clients == 0


async def in_thread(directory: Path, talk: Callable[[RawClient], Any], greet: bool = True) -> Any:
    """A blocking conversation beside the loop."""

    def run() -> Any:
        with RawClient(directory / "engine.sock", greet) as client:
            return talk(client)

    return await asyncio.to_thread(run)


async def test_one_client_too_many_is_told_so(short_dir: Path, wait_until: Wait) -> None:
    """At the limit a new connection gets `busy` with a time to wait; when a client has left, the next is welcome."""
    async with serving(short_dir, Limits(clients=2)) as server:
        clients = [await asyncio.to_thread(RawClient, short_dir / "engine.sock") for _ in range(2)]
        refusal = await in_thread(short_dir, lambda c: (c.receive(), c.receive()), greet=False)
        assert refusal[0]["error"]["code"] == "busy"
        assert refusal[0]["retry_after"] > 0
        assert refusal[1] is None
        clients.pop().close()
        await wait_until(lambda: server.clients == 1, "the first client to be forgotten")
        assert (await in_thread(short_dir, lambda c: c.ask(STATUS)))["type"] == "status"
        clients.pop().close()


async def test_a_client_that_says_nothing_is_hung_up_on(short_dir: Path) -> None:
    """Without a hello before the deadline: `protocol_error`, then the end."""
    async with serving(short_dir, Limits(handshake=0.1)):
        error = await in_thread(short_dir, lambda c: c.refusal_then_end(), greet=False)
        assert error == {"code": "protocol_error", "message": "no hello came within 0.1 seconds"}


async def test_a_frame_that_drips_is_cut_off(short_dir: Path) -> None:
    """A byte now and then does not keep an unfinished frame alive past its deadline."""

    def drip(client: RawClient) -> dict[str, Any]:
        client.socket.settimeout(0.05)
        data = iter(frame(type="list", ref=1) * 10**4)
        client.send(b"\x00\x0f\xff\xff")
        while True:
            try:
                return client.refusal_then_end()
            except TimeoutError:
                client.send(bytes([next(data)]))

    async with serving(short_dir, Limits(frame=0.5)):
        error = await in_thread(short_dir, drip)
        assert error == {"code": "protocol_error", "message": "a frame was not complete after 0.5 seconds"}


async def test_an_idle_client_is_kept(short_dir: Path) -> None:
    """The deadlines are for the handshake and for started frames; between messages a client may be silent."""
    async with serving(short_dir, Limits(handshake=0.1, frame=0.1)):

        def talk(client: RawClient) -> str:
            client.socket.settimeout(0.4)
            with pytest.raises(TimeoutError):
                client.receive()
            client.socket.settimeout(10)
            return str(client.ask(STATUS)["type"])

        assert await in_thread(short_dir, talk) == "status"


async def test_who_does_not_read_is_cut_off_and_nobody_else_waits(short_dir: Path, wait_until: Wait) -> None:
    """A client asks 20,000 times and reads nothing: the server keeps one answer for it, others are served meanwhile,
    and at the deadline the connection is gone."""
    async with serving(short_dir, Limits(drain=1.0, burst=20_000)) as server:
        loop = asyncio.get_running_loop()
        greedy = await asyncio.to_thread(RawClient, short_dir / "engine.sock")
        greedy.socket.setblocking(False)
        flood = memoryview(STATUS * 20_000)

        async def ask_on() -> None:
            await loop.sock_sendall(greedy.socket, flood)

        asking = asyncio.create_task(ask_on())
        [session] = server.sessions.values()
        await wait_until(lambda: session.outgoing > 0, "an answer that waits to be read")
        assert (await in_thread(short_dir, lambda c: c.ask(STATUS)))["type"] == "status"
        await wait_until(lambda: server.clients == 0, "the greedy client to be cut off", timeout=10)
        asking.cancel()
        await asyncio.wait([asking])
        greedy.close()


async def test_a_task_is_followed_once_per_connection_and_up_to_a_limit(short_dir: Path) -> None:
    """Subscribing again gives `ok` and no second stream; over the limit it is `busy`, and nothing is accepted."""
    async with serving(short_dir, Limits(followed=2)) as server:

        def submit(ref: int, subscribe: bool) -> bytes:
            params = {"prompt": "x", "output": str(short_dir / f"{ref}.mp4")}
            return frame(type="submit", ref=ref, params=params, subscribe=subscribe)

        def reply(client: RawClient, data: bytes) -> dict[str, Any]:
            got = client.ask(data)
            while got["ref"] is None:
                got = client.receive() or {}
            return got

        def talk(client: RawClient) -> None:
            first = reply(client, submit(11, True))
            assert (first["type"], first["ref"]) == ("accepted", 11)
            assert reply(client, frame(type="subscribe", ref=12, id=first["id"]))["type"] == "ok"
            second = reply(client, submit(13, False))
            assert reply(client, frame(type="subscribe", ref=14, id=second["id"]))["type"] == "ok"
            third = reply(client, submit(15, True))
            assert (third["error"]["code"], third["ref"]) == ("busy", 15)
            fourth = reply(client, submit(16, False))
            assert fourth["type"] == "accepted"
            assert reply(client, frame(type="subscribe", ref=17, id=fourth["id"]))["error"]["code"] == "busy"

        await in_thread(short_dir, talk)
        assert len(server.supervisor.tasks()) == 3


async def test_a_disconnect_cancels_nothing(short_dir: Path, wait_until: Wait) -> None:
    """The client leaves after `accepted`; its task is still there, and another client can follow it."""
    async with serving(short_dir) as server:
        params = {"prompt": "x", "output": str(short_dir / "v.mp4")}
        accepted = await in_thread(short_dir, lambda c: c.ask(frame(type="submit", ref=2, params=params)))
        await wait_until(lambda: server.clients == 0, "the client to be gone")
        [task] = server.supervisor.tasks()
        assert (task.id, task.state) == (accepted["id"], "queued")

        def follow(client: RawClient) -> Any:
            assert client.ask(frame(type="subscribe", ref=2, id=task.id))["type"] == "ok"
            return client.receive()

        event = await in_thread(short_dir, follow)
        assert (event["type"], event["id"]) == ("progress", task.id)


async def test_a_full_queue_says_when_to_come_back(short_dir: Path) -> None:
    """`busy` carries `retry_after` on the wire."""
    async with serving(short_dir, max_queue=1):

        def talk(client: RawClient) -> dict[str, Any]:
            def ask(ref: int) -> dict[str, Any]:
                params = {"prompt": "x", "output": f"{short_dir}/{ref}.mp4"}
                return client.ask(frame(type="submit", ref=ref, subscribe=False, params=params))

            assert ask(2)["type"] == "accepted"
            return ask(3)

        refused = await in_thread(short_dir, talk)
        assert refused["error"]["code"] == "busy"
        assert refused["retry_after"] > 0


async def test_listeners_hear_the_end_when_the_engine_stops(short_dir: Path) -> None:
    """A followed task that is not finished when the engine stops ends with `server_unavailable`; then the connection
    ends, and by then the path is free for the next engine."""
    path = short_dir / "engine.sock"
    claim = SocketClaim(path)
    supervisor = Supervisor(SystemParams(placement="fused", device="cpu"))
    server = Server(supervisor, claim)
    await supervisor.start()
    await server.start()
    accepted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def talk(client: RawClient) -> list[dict[str, Any]]:
        params = {"prompt": "x", "output": str(short_dir / "v.mp4")}
        assert client.ask(frame(type="submit", ref=2, params=params))["type"] == "accepted"
        loop.call_soon_threadsafe(accepted.set)
        events = []
        while (event := client.receive()) is not None:
            events.append(event)
        SocketClaim(path).close()
        return events

    talking = asyncio.create_task(in_thread(short_dir, talk))
    await accepted.wait()
    await supervisor.stop()
    await server.stop()
    events = await talking
    assert (events[-1]["type"], events[-1]["error"]["code"]) == ("failed", "server_unavailable")
    assert not path.exists()


async def test_a_failing_answer_is_the_engines_fault_and_stays_small(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug while answering is logged with its traceback; the client learns that it happened, and goes on."""
    async with serving(short_dir) as server:
        with monkeypatch.context() as patched:
            patched.setattr(server.supervisor, "rows", lambda: 1 // 0)
            refused = await in_thread(short_dir, lambda c: (c.ask(frame(type="list", ref=2)), c.ask(STATUS)))
    assert refused[0]["error"] == {"code": "internal", "message": "the engine failed; its log says more"}
    assert refused[1]["type"] == "status"
    assert "ZeroDivisionError" in caplog.text


async def test_a_refused_change_is_in_the_log(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With who asked for what, and why not."""
    async with serving(short_dir):
        changed = frame(type="lora_remove", ref=2, name="gone")
        refused = await in_thread(short_dir, lambda c: c.ask(changed))
    assert refused["error"]["code"] == "not_found"
    assert f"refused 'lora_remove' of process {os.getpid()}: {refused['error']['message']}" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_another_user_is_refused_even_if_the_modes_let_it_in(short_dir: Path) -> None:
    """With the modes opened by hand, a process of uid 65534 gets `permission_denied`."""
    code = textwrap.dedent(
        """
        import os, socket, sys
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(sys.argv[1])
            print(client.recv(65536))
        """
    )
    async with serving(short_dir):
        path = short_dir / "engine.sock"
        os.chmod(short_dir, 0o755)
        os.chmod(path, 0o666)
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert "permission_denied" in ran.stdout, ran.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_root_may_ask_but_not_shut_down_anothers_engine(short_dir: Path) -> None:
    """An engine of uid 65534 answers root's status and refuses root's shutdown."""
    code = textwrap.dedent(
        """
        import asyncio, os, sys
        from pathlib import Path
        from engine.params import SystemParams
        from engine.paths import SocketClaim
        from engine.server import Server
        from engine.supervisor import Supervisor
        async def main():
            async with Supervisor(SystemParams(placement="fused", device="cpu")) as supervisor:
                os.seteuid(65534)
                server = Server(supervisor, SocketClaim(Path(sys.argv[1])))
                await server.start()
                print("listening", flush=True)
                await asyncio.to_thread(sys.stdin.read)
                await server.stop()
                os.seteuid(0)
        asyncio.run(main())
        """
    )
    os.chown(short_dir, 65534, 65534)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(short_dir / "engine.sock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        with RawClient(short_dir / "engine.sock") as client:
            answers = [client.ask(data) for data in (STATUS, frame(type="shutdown", ref=2), STATUS)]
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert [answer["type"] for answer in answers] == ["status", "refused", "status"]
    assert answers[1]["error"]["code"] == "permission_denied"


def test_a_list_is_cut_to_one_frame() -> None:
    """Of more tasks than fit, unfinished ones and the newest finished ones are kept, in order, and the rest counted."""
    rows = [
        TaskInfo(
            id=f"{n:032x}", state="queued" if n % 100 == 0 else "done", phase="queued", step=0, steps=0, priority=0,
            submitted_at=float(n), prompt="p" * 5000, path="/" + "d" * 1000,
        )
        for n in range(2000)
    ]  # fmt: skip
    fit, omitted = fitting([row_of(row) for row in rows])
    kept = [msgspec.msgpack.decode(row, type=TaskInfo) for row in fit]
    assert len(kept) + omitted == 2000
    assert omitted > 0
    assert [row.submitted_at for row in kept] == sorted(row.submitted_at for row in kept)
    assert sum(row.state == "queued" for row in kept) == 20
    assert kept[-1].id == rows[-1].id
    assert all(len(row.prompt) == LISTED_PROMPT for row in kept)
    assert MAX_FRAME // 2 < len(msgspec.msgpack.encode(fit)) <= MAX_FRAME
    assert fitting([row_of(row) for row in rows[:10]])[1] == 0


def test_the_row_of_an_ended_task_is_made_once() -> None:
    """While the task goes on, the row tells how far it is, also when it has ended and nobody is told yet; from then on
    it is the same object."""
    job = make_job()
    spec = TaskSpec(id=job.id, encode=False, denoise=4, chunks=1, cost={})
    task = Task(job, spec, {"priority": 0}, 0.0)
    for step in (1, 2):
        task.report(Progress(id=job.id, phase="denoise", step=step, steps=4))
        row = task.row()
        assert not row.finished
        assert msgspec.msgpack.decode(row.encoded, type=TaskInfo) == task.info()
    task.end(Done(id=job.id, path=job.output, metadata={}))
    assert not task.row().finished and task.row().encoded == row.encoded
    task.tell()
    ended = task.row()
    assert ended.finished and task.row() is ended
    assert msgspec.msgpack.decode(ended.encoded, type=TaskInfo) == task.info()
    frame = encode_frame(TaskRows(ref=7, tasks=[ended.encoded], omitted=1))
    assert frame == encode_frame(TaskList(ref=7, tasks=[task.info()], omitted=1))


async def test_it_serves_on_any_loop_and_leaves_signals_alone(short_dir: Path) -> None:
    """Embedded in somebody's asyncio service, on the standard loop, the server changes no signal handler."""
    import signal

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    async with serving(short_dir):
        assert (await in_thread(short_dir, lambda c: c.ask(STATUS)))["type"] == "status"
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


async def test_an_engine_in_another_program_is_not_replaced(short_dir: Path) -> None:
    """Its program is its host's: `permission_denied`."""
    async with serving(short_dir):
        reply = await in_thread(short_dir, lambda c: c.ask(frame(type="reload_supervisor", ref=4)))
        assert (reply["ref"], reply["error"]["code"]) == (4, "permission_denied")


async def test_clients_are_held_for_a_while_at_most(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server holds its clients, nobody is answered. As one's request takes too long to be looked at, that
    ends with `busy`, and after the release everybody is answered."""
    monkeypatch.setattr("engine.server.HOLD_TIMEOUT", 0.3)
    looking, seen = threading.Event(), threading.Event()

    def check(user: object) -> None:
        looking.set()
        seen.wait()
        raise BadRequest("nothing")

    async with serving(short_dir) as server:
        monkeypatch.setattr(server.supervisor, "check", check)
        slow = asyncio.create_task(
            in_thread(short_dir, lambda c: c.ask(frame(type="submit", ref=1, params={"prompt": "x"})))
        )
        await asyncio.to_thread(looking.wait)
        with pytest.raises(Busy, match="still being looked at"):
            await server.hold()
        other = asyncio.create_task(in_thread(short_dir, lambda c: c.ask(STATUS), greet=True))
        await asyncio.sleep(0.2)
        assert not other.done()
        server.release()
        assert (await other)["type"] == "status"
        seen.set()
        assert (await slow)["error"]["code"] == "bad_request"
        await server.hold()
        server.release()


async def test_a_crowd_is_taken_up_as_others_leave(short_dir: Path) -> None:
    """Ten times as many clients as there are places come at once, ask and leave: nobody is refused."""

    def ask() -> str:
        with RawClient(short_dir / "engine.sock") as client:
            return str(client.ask(STATUS)["type"])

    async with serving(short_dir, Limits(clients=4)):
        with ThreadPoolExecutor(40) as pool:
            loop = asyncio.get_running_loop()
            answers = await asyncio.gather(*(loop.run_in_executor(pool, ask) for _ in range(40)))
    assert answers == ["status"] * 40
