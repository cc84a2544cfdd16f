"""Where the socket is, and who may have it.

The socket has mode 0600 in a directory of mode 0700 that belongs to us. One that is shared with other users has mode
0666 in a directory that they may pass but not read or change (0711), and the server looks at who connects. Which server
owns a path is decided by a lock on `<socket>.lock`, never by the path itself: binding would silently take a live
server's name away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path
from types import TracebackType

from engine.states import Descriptors, State
from ipc.errors import BadConfig

MAX_SOCKET_PATH = 107
"""Bytes of `sockaddr_un.sun_path`, less its final NUL."""

BACKLOG = 4096
"""Connections that wait to be accepted; the system's `net.core.somaxconn` may allow fewer. While the program is
replaced nobody accepts: 200 connections a second for some seconds find room."""

_UCRED = struct.Struct("3i")


def default_socket() -> Path:
    """`$XDG_RUNTIME_DIR/engine/engine.sock`, else `/tmp/engine-<uid>/engine.sock`."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(runtime) / "engine" if runtime else Path(f"/tmp/engine-{os.geteuid()}")
    return directory / "engine.sock"


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/engine`, else `~/.local/state/engine`: where `engine serve` keeps its journal."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "engine"


def socket_path(chosen: str | os.PathLike[str] | None) -> Path:
    """The absolute path of the socket; `BadConfig` if the kernel cannot take one that long."""
    path = Path(os.path.abspath(Path(chosen).expanduser() if chosen is not None else default_socket()))
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise BadConfig(
            f"the socket path has {size} bytes and a Unix socket path has at most {MAX_SOCKET_PATH}: "
            "choose a shorter one with --socket"
        )
    return path


def peer_ids(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as the kernel recorded them when it connected or listened."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def check_directory(directory: Path, shared: bool = False) -> None:
    """Make the socket's directory if it is missing; `BadConfig` unless it is ours alone or, `shared`, ours and others
    can pass through it and do no more."""
    wanted, closed = (0o711, 0o066) if shared else (0o700, 0o077)
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700, parents=True)
            directory.chmod(wanted)
        found = directory.lstat()
    except OSError as error:
        raise BadConfig(f"the socket directory {directory} cannot be made: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    shut = shared and not mode & 0o011
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or mode & closed or shut:
        raise BadConfig(
            f"the socket directory {directory} has mode {mode:04o} and owner {found.st_uid}; it must be a real "
            f"directory of mode {wanted:04o} that belongs to user {os.geteuid()}: choose a directory of its own with "
            "--socket"
        )


class ClaimState(State, frozen=True, kw_only=True):
    """A `SocketClaim`; `lock` is the place of its descriptor."""

    path: str
    lock: int
    shared: bool
    bound: bool


class SocketClaim:
    """The right to serve at one path, from construction to `close`.

    Resource handling: holds a locked file descriptor; the kernel lets go of the lock when the process dies, so a stale
    socket is recognised and removed by the next claim. `close` removes the socket that was bound here.
    Error handling: `BadConfig` when another server holds the path; that server is not touched.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        """`shared`: other users may reach the socket; what they may do is up to who accepts their connections."""
        self.path = path
        self._shared = shared
        self._bound = False
        check_directory(path.parent, shared)
        self._lock = _take_lock(path)

    def state(self, fds: Descriptors) -> ClaimState:
        return ClaimState(path=str(self.path), lock=fds.put(self._lock), shared=self._shared, bound=self._bound)

    @classmethod
    def restored(cls, state: ClaimState, fds: Descriptors) -> SocketClaim:
        """The claim of the program before this one, which never let go of it."""
        made = cls.__new__(cls)
        made.path, made._shared, made._bound = Path(state.path), state.shared, state.bound
        made._lock = fds.take(state.lock)
        return made

    def bind(self) -> socket.socket:
        """A listening socket at the path; a stale one is removed first."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._remove_stale()
            # On a socket that is not bound yet, fchmod sets the mode that bind gives the file: there is no moment
            # at which the path has another one, and the process's umask is left alone.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(os.fspath(self.path))
            if self._shared:
                self.path.chmod(0o666)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise BadConfig(f"cannot listen on {self.path}: {error.strerror}") from error
        self._bound = True
        return listener

    def take(self, listener: socket.socket) -> socket.socket:
        """In place of `bind`: a socket that listens at the path already, made by who has started this program and keeps
        it. `BadConfig` if it is of another path, or open to more users than it should be."""
        if listener.getsockname() != os.fspath(self.path):
            raise BadConfig(f"the socket that was passed is at {listener.getsockname()!r}; expected {self.path}")
        mode, wanted = stat.S_IMODE(self.path.lstat().st_mode), 0o666 if self._shared else 0o600
        if mode & ~wanted:
            raise BadConfig(f"the socket {self.path} has mode {mode:04o}; expected {wanted:04o}: set SocketMode")
        return listener

    def close(self) -> None:
        """Remove the socket and let the next server have the path."""
        if self._lock < 0:
            return
        if self._bound:
            self.path.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1

    def _remove_stale(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise BadConfig(f"{self.path} exists and is not a socket: choose another --socket, or move the file away")
        self.path.unlink()

    def __enter__(self) -> SocketClaim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _take_lock(path: Path) -> int:
    """A descriptor that holds `<socket>.lock` exclusively, with our pid in it."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BadConfig(f"the lock file {path}.lock cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise BadConfig(
            f"a server is already running on {path} (pid {holder or 'unknown'}): use it, stop it with "
            "`engine shutdown`, or choose another --socket"
        ) from error
    return lock
