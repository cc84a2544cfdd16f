"""Clients that come, go, ask, err and shut the engine down, on a real engine, and a model that says what each of them
must be told. Hypothesis draws what they do; when the two disagree it prints the steps."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.engine.wire import WAIT, EngineProcess, RawClient, frame, hello

MAX_QUEUE = 3
MOST_CLIENTS = 6
SEQUENCES = 20
MOST_RESTARTS, MOST_VIDEOS = 3, 4
"""In all sequences together: they take seconds."""
SECONDS = 600
"""8 s each on two free cores, three minutes on busy ones."""
LONG = {"prompt": "x", "steps": 1000, "num_frames": 33}
"""Half a minute of work at least: it does not end by itself while a sequence runs."""
SHORT = {"prompt": "x", "steps": 1, "height": 16, "width": 16, "num_frames": 1}
BAD: list[tuple[Any, str]] = [
    ({}, "lacks 'prompt'"), ({"prompt": ""}, "empty"), ({"prompt": "x", "steps": 0}, "steps"), ([], "table"),
    ({"prompt": "x", "output": "/nonexistent/v.mp4"}, "outside"), ({"prompt": "x", "hieght": 1}, "did you mean"),
]  # fmt: skip
GARBAGE = [b"\0\0\0\0", b"\xff" * 8, b"\0\0\0\1\xc1", frame(type="launch", ref=1), hello(), frame(type="status")]


class Host:
    """The engine of all sequences, which are many; it is started again after each shutdown."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.root = directory, directory / "root"
        self.root.mkdir()
        self.shutdowns = self.videos = 0
        self._start()

    def _start(self) -> None:
        self.engine = EngineProcess(self.directory, "--output-root", self.root, "--max-queue", str(MAX_QUEUE))
        self.engine.wait_listening()

    def restart(self) -> None:
        """It was asked to leave: it does, with exit code 0, and another takes its place."""
        self.engine.process.wait(WAIT)
        self.engine.__exit__(None, None, None)
        self._start()

    def close(self) -> None:
        self.engine.__exit__(None, None, None)


class Client:
    """One connection and what it has been told."""

    def __init__(self, path: Path) -> None:
        self.raw = RawClient(path)
        self.following: set[str] = set()
        """Tasks whose end it has still to hear of."""
        self.ends: dict[str, dict[str, Any]] = {}
        self._ref = 100

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The reply, which carries the ref; events may come before it."""
        self._ref += 1
        self.raw.send(frame(type=kind, ref=self._ref, **fields))
        while (message := self._read())["ref"] is None:
            pass
        assert message["ref"] == self._ref, message
        return message

    def end_of(self, identity: str) -> dict[str, Any]:
        """The event that ends a task."""
        while identity not in self.ends:
            assert self._read()["ref"] is None
        return self.ends[identity]

    def hear_out(self) -> None:
        """Read to the end of the connection."""
        while (message := self.raw.receive()) is not None:
            self._note(message)

    def _read(self) -> dict[str, Any]:
        message = self.raw.receive()
        assert message is not None, "the engine hung up"
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        if message["type"] in ("progress", "done", "failed"):
            assert message["id"] in self.following, f"an event of a task that is not followed: {message}"
            if message["type"] != "progress":
                self.following.discard(message["id"])
                self.ends[message["id"]] = message


class Protocol(RuleBasedStateMachine):
    """The model: which tasks there are and in what state, who is connected, and who follows what."""

    host: Host
    after_cancel = "cancelled"
    """The state of a task that was queued, or running, when it was cancelled."""
    clients = Bundle("clients")
    tasks = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.connected: list[Client] = []
        self.state: dict[str, str] = {}
        """Task -> queued (or running), done, cancelled; in the order of submission."""
        self.output: dict[str, str] = {}
        self.names = 0

    @initialize(target=clients)
    def start(self) -> Client:
        self._cancel_all()  # what a sequence that failed has left
        client = self._connect()
        status = client.ask("status")["status"]
        assert status["waiting"] + status["running"] == 0
        self.counted = (status["finished"], status["failed"])
        return client

    def teardown(self) -> None:
        for client in self.connected:
            client.raw.close()
        self._cancel_all()

    # Coming and going.

    @precondition(lambda self: len(self.connected) < MOST_CLIENTS)
    @rule(target=clients)
    def connect(self) -> Client:
        return self._connect()

    @rule(client=consumes(clients))
    def disconnect(self, client: Client) -> None:
        self._present(client).raw.close()
        self.connected.remove(client)

    @rule(client=consumes(clients))
    def half_close(self, client: Client) -> None:
        """It has said all it will say: it gets its answer, then the end."""
        client = self._present(client)
        client.raw.send(frame(type="list", ref=7))
        client.raw.socket.shutdown(socket.SHUT_WR)
        while (message := client.raw.receive()) is not None and message["ref"] is None:
            pass
        assert message is not None and (message["type"], message["ref"]) == ("tasks", 7)
        client.hear_out()
        self.connected.remove(client)

    @rule(client=consumes(clients), garbage=st.sampled_from(GARBAGE))
    def send_garbage(self, client: Client, garbage: bytes) -> None:
        """A reason, then the end; nothing that was accepted is touched."""
        client = self._present(client)
        client.raw.send(garbage)
        while (message := client.raw.receive()) is not None and message["type"] in ("progress", "done", "failed"):
            pass
        assert message is not None and message["error"]["code"] == "protocol_error"
        assert message["ref"] is None
        client.hear_out()
        self.connected.remove(client)

    @rule(client=clients)
    def shut_down(self, client: Client) -> None:
        """Everyone hears that what they follow was not finished, then the end. The next engine has it all again, and
        nothing of what had ended."""
        if self.host.shutdowns == MOST_RESTARTS or client not in self.connected:
            return
        self.host.shutdowns += 1
        assert client.ask("shutdown", drain=False)["type"] == "ok"
        for connected in self.connected:
            unfinished = {i for i in connected.following if self.state[i] == "queued"}
            connected.hear_out()
            assert not connected.following
            assert all(connected.ends[i]["error"]["code"] == "server_unavailable" for i in unfinished)
            connected.raw.close()
        self.connected.clear()
        self.host.restart()
        self.state = {i: state for i, state in self.state.items() if state == "queued"}
        self.counted = (0, 0)

    # Asking. A client may be one whose engine has been shut down: it connects again first.

    @rule(target=tasks, client=clients, subscribe=st.booleans())
    def submit(self, client: Client, subscribe: bool) -> Any:
        client = self._present(client)
        path = self._path()
        reply = client.ask("submit", params={**LONG, "output": path}, subscribe=subscribe)
        if len(self._unfinished()) == MAX_QUEUE:
            assert reply["type"] == "refused" and reply["error"]["code"] == "busy" and reply["retry_after"] > 0, reply
            return multiple()
        assert reply["type"] == "accepted" and reply["id"] not in self.state, reply
        assert reply["position"] == len(self._unfinished())
        assert reply["params"]["output"] == path
        self.state[reply["id"]], self.output[reply["id"]] = "queued", path
        if subscribe:
            client.following.add(reply["id"])
        return reply["id"]

    @precondition(lambda self: len(self._unfinished()) < MAX_QUEUE)
    @rule(target=tasks, client=clients)
    def submit_and_wait(self, client: Client) -> Any:
        """A short one is done, before the long ones, and its file is there."""
        if self.host.videos == MOST_VIDEOS:
            return multiple()
        self.host.videos += 1
        client = self._present(client)
        path = self._path()
        reply = client.ask("submit", params={**SHORT, "output": path, "priority": 10})
        identity: str = reply["id"]
        client.following.add(identity)
        end = client.end_of(identity)
        assert (end["type"], end["path"]) == ("done", path), end
        assert Path(path).stat().st_size > 0
        self.state[identity], self.output[identity] = "done", path
        return identity

    @rule(client=clients, bad=st.sampled_from(BAD))
    def submit_badly(self, client: Client, bad: tuple[Any, str]) -> None:
        params, says = bad
        reply = self._present(client).ask("submit", params=params)
        if len(self._unfinished()) == MAX_QUEUE and reply["error"]["code"] == "busy":
            return
        assert reply["error"]["code"] == "bad_request" and says in reply["error"]["message"], reply

    @rule(client=clients, identity=tasks)
    def submit_to_the_same_file(self, client: Client, identity: str) -> None:
        """While a task is unfinished its file is taken."""
        if self.state.get(identity) != "queued" or len(self._unfinished()) == MAX_QUEUE:
            return
        reply = self._present(client).ask("submit", params={**LONG, "output": self.output[identity]})
        assert reply["type"] == "refused", reply
        assert reply["error"]["code"] == "bad_request" and "another unfinished request" in reply["error"]["message"]

    @rule(client=clients, identity=st.one_of(tasks, st.just("0" * 32)))
    def subscribe(self, client: Client, identity: str) -> None:
        """Known tasks only; one that has ended says so at once."""
        client = self._present(client)
        reply = client.ask("subscribe", id=identity)
        if identity not in self.state:
            assert reply["error"]["code"] == "not_found"
            return
        assert reply["type"] == "ok"
        client.ends.pop(identity, None)
        client.following.add(identity)
        self._check_end(client, identity)

    @rule(client=clients, identity=st.one_of(tasks, st.just("0" * 32)))
    def cancel(self, client: Client, identity: str) -> None:
        """Everyone who follows the task hears of it. Once ended, it stays as it ended."""
        reply = self._present(client).ask("cancel", id=identity)
        if identity not in self.state:
            assert reply["error"]["code"] == "not_found"
            return
        assert reply["type"] == "ok"
        if self.state[identity] == "queued":
            self.state[identity] = self.after_cancel
        for connected in self.connected:
            if identity in connected.following:
                self._check_end(connected, identity)

    @rule(client=clients)
    def list_tasks(self, client: Client) -> None:
        """All tasks of the model, in its order and in its states."""
        reply = self._present(client).ask("list")
        listed = {t["id"]: t for t in reply["tasks"] if t["id"] in self.state}
        assert list(listed) == list(self.state)
        states = {i: "queued" if t["state"] == "running" else t["state"] for i, t in listed.items()}
        assert states == self.state
        assert {i: t["path"] for i, t in listed.items()} == {i: self.output[i] for i in self.state}
        assert [t["id"] for t in reply["tasks"] if t["state"] in ("queued", "running")] == self._unfinished()

    @rule(client=clients)
    def status(self, client: Client) -> None:
        """The numbers of the model."""
        status = self._present(client).ask("status")["status"]
        assert status["waiting"] + status["running"] == len(self._unfinished())
        ended = list(self.state.values())
        assert status["finished"] - self.counted[0] == ended.count("done")
        assert status["failed"] - self.counted[1] == ended.count("cancelled")
        assert status["accepting"]
        assert all(queue["peak"] <= queue["slots"] for queue in status["queues"])

    @invariant()
    def the_engine_lives(self) -> None:
        assert self.host.engine.process.poll() is None

    def _cancel_all(self) -> None:
        with RawClient(self.host.engine.socket) as client:
            for task in client.ask(frame(type="list", ref=1))["tasks"]:
                if task["state"] in ("queued", "running"):
                    client.ask(frame(type="cancel", ref=2, id=task["id"]))

    def _check_end(self, client: Client, identity: str) -> None:
        match self.state[identity]:
            case "done":
                assert client.end_of(identity)["type"] == "done"
            case "cancelled":
                assert client.end_of(identity)["error"]["code"] == "cancelled"

    def _connect(self) -> Client:
        client = Client(self.host.engine.socket)
        self.connected.append(client)
        return client

    def _present(self, client: Client) -> Client:
        return client if client in self.connected else self._reconnected(client)

    def _reconnected(self, client: Client) -> Client:
        """It lost its connection with the engine: the same client, on a new one."""
        client.__init__(self.host.engine.socket)  # type: ignore[misc]
        self.connected.append(client)
        return client

    def _unfinished(self) -> list[str]:
        return [identity for identity, state in self.state.items() if state == "queued"]

    def _path(self) -> str:
        self.names += 1
        return str(self.host.root / f"{self.names}.mp4")


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as directory:
        host = Host(Path(directory))
        try:
            yield host
        finally:
            host.close()


def explore(machine: type[Protocol], sequences: int = SEQUENCES) -> None:
    """Sequences of up to 25 steps. They are not shrunk: what failed is printed, step by step, as it was."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=sequences, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,), print_blob=True,
        ),
    )  # fmt: skip


@pytest.mark.timeout(SECONDS)
def test_model_and_engine_agree(host: Host) -> None:
    """In every sequence, those with restarts and with videos too."""
    explore(type("Machine", (Protocol,), {"host": host}))
    assert host.shutdowns and host.videos


class Forgetful(Protocol):
    """A model that is wrong: it takes no note of what is cancelled."""

    after_cancel = "queued"


@pytest.mark.timeout(SECONDS)
def test_a_disagreement_is_noticed(host: Host) -> None:
    """The control: a wrong model is told from the engine. (Hypothesis runs a sequence that failed again, and says so if
    it does not fail the same way.)"""
    host.shutdowns, host.videos = MOST_RESTARTS, MOST_VIDEOS
    with pytest.raises((AssertionError, Flaky)):
        explore(type("Machine", (Forgetful,), {"host": host}), 10 * SEQUENCES)
