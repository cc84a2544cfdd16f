"""As systemd would: a socket for notifications, and a listening socket that is passed; and the unit files that ship."""

from __future__ import annotations

import configparser
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.client import Client
from engine.paths import BACKLOG, SocketClaim
from engine.systemd import Notify, passed as passed_to_us
from ipc.errors import BadConfig, Busy
from tests.engine.wire import WAIT, EngineProcess, RawClient, frame, hello

UNITS = Path(__file__).parents[2] / "configs" / "system"

ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2], LISTEN_FDNAMES="engine.socket")
os.execv(sys.argv[3], sys.argv[3:])
"""
"""What systemd does between fork and exec."""


class Manager:
    """The service manager's end of `$NOTIFY_SOCKET`. What others than `pid` say is not heard (NotifyAccess=main), nor
    what is said of the descriptor store, which is for `test_vault.py`."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(str(path))
        self.socket.settimeout(WAIT)
        self.pid = 0

    def hear(self) -> dict[str, str]:
        while True:
            # No room for a descriptor: it is closed.
            data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
            said = dict(line.split("=", 1) for line in data.decode().split("\n"))
            if struct.unpack("3i", ancillary[0][2])[0] == self.pid and not said.keys() & {"FDSTORE", "FDSTOREREMOVE"}:
                return said


@pytest.fixture
def manager(short_dir: Path) -> Iterator[Manager]:
    manager = Manager(short_dir / "notify")
    yield manager
    manager.socket.close()


@pytest.fixture
def listener(short_dir: Path) -> Iterator[socket.socket]:
    """As engine.socket has systemd make it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(short_dir / "engine.sock"))
        (short_dir / "engine.sock").chmod(0o600)
        listener.listen()
        yield listener


def test_a_service_with_a_socket_of_systemd(short_dir: Path, manager: Manager, listener: socket.socket) -> None:
    """A client connects before the engine is started and is answered; the manager hears of loading, of being ready, of
    a change of programs and its end, and of stopping, each from the main process. The socket stays, as it was not the
    engine's, and no variable of the activation is left to the children."""
    early = RawClient(short_dir / "engine.sock", greet=False)
    early.send(hello())
    through = (sys.executable, "-c", ACTIVATE, str(listener.fileno()), "1")
    with EngineProcess(
        short_dir, through=through, pass_fds=(listener.fileno(),), NOTIFY_SOCKET=str(short_dir / "notify")
    ) as engine:
        manager.pid = engine.process.pid
        assert manager.hear() == {"STATUS": "loading wan-demo"}
        assert (early.receive() or {})["type"] == "welcome"
        with pytest.raises(Busy, match="still loading"):
            Client(engine.socket).reload_supervisor()
        ready = manager.hear()
        assert (ready["READY"], ready["MAINPID"], ready["STATUS"]) == ("1", str(manager.pid), "serving wan-demo")
        before = time.monotonic_ns() // 1000
        Client(engine.socket).reload_supervisor()
        reloading = manager.hear()
        assert reloading["RELOADING"] == "1"
        assert before < int(reloading["MONOTONIC_USEC"]) < time.monotonic_ns() // 1000
        assert manager.hear()["READY"] == "1"
        assert early.ask(frame(type="status", ref=2))["type"] == "status"
        for stage in Client(engine.socket).status().stages:
            assert b"LISTEN_" not in Path(f"/proc/{stage.pid}/environ").read_bytes()
        engine.process.send_signal(signal.SIGTERM)
        assert manager.hear()["STOPPING"] == "1"
        assert engine.process.wait(WAIT) == 0
    early.close()
    assert (short_dir / "engine.sock").exists()


def test_what_is_no_socket_for_us(short_dir: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets, a datagram socket, one that does not listen, one at another path, one that is open to others: each
    is refused with what was expected. Variables that are for another process mean nothing."""

    def passed(sock: socket.socket | None, count: str = "1", pid: int | None = None) -> socket.socket | None:
        monkeypatch.setenv("LISTEN_FDS", count)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
        if sock is not None:
            monkeypatch.setattr("engine.systemd.FIRST_FD", os.dup(sock.fileno()))
        return passed_to_us("weights").listener

    assert passed(None, pid=1) is None
    assert "LISTEN_FDS" not in os.environ
    with pytest.raises(BadConfig, match="2 sockets were passed"):
        passed(None, "2")
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as wrong, pytest.raises(BadConfig, match="stream socket that listens"):
            passed(wrong)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as wrong:
        wrong.listen()
        with pytest.raises(BadConfig, match="Unix stream socket"):
            passed(wrong)
    found = passed(listener)
    assert found is not None
    with found:
        with SocketClaim(short_dir / "other.sock") as claim, pytest.raises(BadConfig, match=r"expected .*other\.sock"):
            claim.take(found)
        (short_dir / "engine.sock").chmod(0o666)
        with SocketClaim(short_dir / "engine.sock") as claim, pytest.raises(BadConfig, match="SocketMode"):
            claim.take(found)


def test_without_a_manager_nothing_is_said(short_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No address: nothing happens. An address where nobody listens is logged, and the engine goes on."""
    Notify(None).ready()
    Notify(str(short_dir / "nobody")).ready()
    assert [record.getMessage() for record in caplog.records] == [
        "the service manager was not told 'READY=1': No such file or directory"
    ]


def test_the_units_that_ship() -> None:
    """They say what the code relies on: notifications of the main process, one private socket, the reload command."""
    units = {}
    for name in ("engine.service", "engine.socket"):
        units[name] = configparser.ConfigParser(interpolation=None)
        units[name].optionxform = str  # type: ignore[assignment,method-assign]
        units[name].read(UNITS / name)
    service, sockets = units["engine.service"]["Service"], units["engine.socket"]["Socket"]
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert int(service["FileDescriptorStoreMax"]) >= 6 * 8  # components, GPUs
    assert service["ExecReload"].endswith("engine reload --supervisor")
    assert (sockets["SocketMode"], sockets["DirectoryMode"], sockets["Backlog"]) == ("0600", "0700", str(BACKLOG))
    assert "ListenStream" in sockets and "FileDescriptorName" not in sockets
