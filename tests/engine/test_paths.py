"""Where the socket is and who owns it."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.paths import MAX_SOCKET_PATH, SocketClaim, default_socket, default_state_dir, socket_path
from ipc.errors import BadConfig
from tests.engine.wire import environment

HOLD = """
import sys
from pathlib import Path
from engine.paths import SocketClaim
claim = SocketClaim(Path(sys.argv[1]))
listener = claim.bind()
print("bound", flush=True)
sys.stdin.read()
"""


def test_the_default_socket_follows_the_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With XDG_RUNTIME_DIR the socket is below it; without, in a directory of /tmp that carries our uid."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_socket() == Path("/run/user/7/engine/engine.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_socket() == Path(f"/tmp/engine-{os.geteuid()}/engine.sock")


def test_the_default_state_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_STATE_HOME if it is set, else ~/.local/state."""
    monkeypatch.setenv("XDG_STATE_HOME", "/var/here")
    assert default_state_dir() == Path("/var/here/engine")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_state_dir() == Path("/home/u/.local/state/engine")


def test_a_path_of_108_bytes_is_refused_and_one_of_107_is_not() -> None:
    """The kernel's limit is found before anything is bound, in bytes and not in characters."""
    assert len(str(socket_path("/" + "x" * (MAX_SOCKET_PATH - 1)))) == 107
    for path in ("/" + "x" * MAX_SOCKET_PATH, "/" + "ü" * 54):
        with pytest.raises(BadConfig, match=r"at most 107.*--socket"):
            socket_path(path)


def test_modes_are_0700_and_0600(short_dir: Path) -> None:
    """A fresh directory and socket get modes that shut everybody else out, whatever the umask."""
    path = short_dir / "made" / "engine.sock"
    before = os.umask(0)
    try:
        with SocketClaim(path) as claim, claim.bind():
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(Path(f"{path}.lock").stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777, 0o770])
def test_a_directory_that_others_may_enter_is_refused(short_dir: Path, mode: int) -> None:
    """The message says which mode it has and which it must have."""
    shared = short_dir / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(BadConfig, match=re.escape(f"{mode:04o}") + ".*0700"):
        SocketClaim(shared / "engine.sock")


def test_a_linked_directory_is_refused(short_dir: Path) -> None:
    """A symbolic link in the directory's place could be somebody's trap."""
    (short_dir / "real").mkdir(mode=0o700)
    (short_dir / "link").symlink_to("real")
    with pytest.raises(BadConfig, match="real directory"):
        SocketClaim(short_dir / "link" / "engine.sock")


def test_a_directory_that_cannot_be_made_is_refused(short_dir: Path) -> None:
    """A file in the way is named."""
    (short_dir / "file").touch()
    with pytest.raises(BadConfig, match="cannot be made"):
        SocketClaim(short_dir / "file" / "deeper" / "engine.sock")


def test_a_live_socket_is_left_alone(short_dir: Path) -> None:
    """While one process serves a path, another's claim fails with its pid, and connections still reach the first."""
    path = short_dir / "engine.sock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"bound\n"
        with pytest.raises(BadConfig, match=rf"already running on .*\(pid {holder.pid}\)"):
            SocketClaim(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        holder.kill()
    assert path.is_socket(), "a killed process leaves its socket behind"
    with SocketClaim(path) as claim, claim.bind(), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_file_in_the_sockets_place_is_not_removed(short_dir: Path) -> None:
    """Only a stale socket may be unlinked; a file of the user's is named and kept."""
    path = short_dir / "engine.sock"
    path.write_text("precious")
    with SocketClaim(path) as claim, pytest.raises(BadConfig, match="not a socket"):
        claim.bind()
    assert path.read_text() == "precious"


def test_closing_a_claim_removes_the_socket_once(short_dir: Path) -> None:
    """After `close` the path is free, and a second `close` does not touch the next server's socket."""
    path = short_dir / "engine.sock"
    first = SocketClaim(path)
    first.bind().close()
    first.close()
    assert not path.exists()
    with SocketClaim(path) as second, second.bind():
        first.close()
        assert path.is_socket()


def test_a_claim_that_never_bound_removes_nothing(short_dir: Path) -> None:
    """A server that fails between claim and bind leaves even a stale socket as it was."""
    path = short_dir / "engine.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    SocketClaim(path).close()
    assert path.is_socket()
