"""What the tests of the client protocol share: a server in a process of its own, and a client of raw bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ipc.messages.client import PROTOCOL_VERSION

WAIT = 60.0
"""Seconds after which a wait in a test means that something is broken, also on a busy machine."""


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: this checkout is what they import, one compute thread is what they use."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        **more,
    }


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "engine", *map(str, arguments)]


def run_engine(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=4 * WAIT, env=environment(**more), check=False
    )


class EngineProcess:
    """`engine serve` in a process of its own, all stages in one more. `with` waits until it listens."""

    def __init__(
        self,
        directory: Path,
        *options: str | Path,
        tree: Path | None = None,
        placement: str = "fused",
        through: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        **more: str,
    ) -> None:
        """`tree`: run what is there, not this checkout. `through`: a command that executes what follows it. `more`:
        variables of the environment."""
        self.exit_codes: tuple[int, ...] = (0,)
        """What the end of `with` accepts."""
        self.socket = directory / "engine.sock"
        self.log = directory / f"log-{time.monotonic_ns()}"
        self._output = directory / "output"
        where = ("--socket", self.socket, "--state-dir", directory / "state", "--device", "cpu")
        where = (*where, "--placement", placement)
        where_from = {} if tree is None else {"PYTHONPATH": str(tree)}
        with self.log.open("ab") as log, self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*through, *command("serve", *where, *options)], pass_fds=pass_fds, stdout=output, stderr=log,
                env=environment(**where_from, **more), start_new_session=True, cwd=tree,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._output.read_text()

    def open_files(self) -> int:
        """Descriptors that it has, once its stages are up, whose coming brings more."""
        self.wait_ready()
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self) -> None:
        """SIGKILL."""
        self.exit_codes = (-signal.SIGKILL,)
        self.process.kill()
        self.process.wait()

    def wait_listening(self) -> None:
        wait_for(self.listens, "the engine to listen")

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            if not (ready := "ready in" in self.output):
                assert self.process.poll() is None, f"the engine left: {self.log.read_text()[-4000:]}"
            return ready

        wait_for(is_ready, "the stages to come up")

    def listens(self) -> bool:
        assert self.process.poll() is None, f"the engine left: {self.log.read_text()[-2000:]}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def __enter__(self) -> EngineProcess:
        try:
            self.wait_listening()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        if kind is None:
            assert code in self.exit_codes, self.log.read_text()[-2000:]
            killed = self.process.returncode < 0  # the orphaned stages may say so
            assert killed or "Traceback" not in self.log.read_text(), self.log.read_text()[-4000:]


def session_processes(session: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state not in "ZX":
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def wait_for(condition: Any, what: str, timeout: float = WAIT) -> None:
    """Look every 10 ms; TimeoutError says what did not come."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.01)


class RawClient:
    """Bytes on a connection, and the frames that come back as plain maps."""

    def __init__(self, path: Path, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))  # blocking: waits for room in the backlog
        self.socket.settimeout(WAIT)
        self._buffer = b""
        if greet:
            assert self.ask(hello())["type"] == "welcome"

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> dict[str, Any] | None:
        """The next frame; None at the end of the connection."""
        while True:
            length = int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) >= 4 and len(self._buffer) >= 4 + length:
                frame, self._buffer = self._buffer[4 : 4 + length], self._buffer[4 + length :]
                return msgspec.msgpack.decode(frame, type=dict[str, Any])
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                assert not self._buffer, "the connection ended inside a frame"
                return None
            self._buffer += data

    def ask(self, data: bytes) -> dict[str, Any]:
        self.send(data)
        reply = self.receive()
        assert reply is not None, "the connection ended without a reply"
        return reply

    def refusal_then_end(self) -> dict[str, Any]:
        """The error that the server ends this connection with."""
        reply = self.receive()
        assert reply is not None, "the connection ended without a word"
        assert reply["type"] == "refused", reply
        assert self.receive() is None, "the connection goes on"
        return dict(reply["error"])

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def frame(**fields: Any) -> bytes:
    """A frame of any map."""
    payload = msgspec.msgpack.encode(fields)
    return len(payload).to_bytes(4, "big") + payload


def hello(version: int = PROTOCOL_VERSION) -> bytes:
    return frame(type="hello", ref=1, version=version)
