"""The engine on a Unix socket: who may connect, what is said, and what a bad client costs (nothing, to anybody else).

`docs/protocol.md` is the contract, `docs/security.md` says who is trusted with what. A client's messages are answered
one after the other (`engine/session.py`), so it can hold back at most itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket

from engine.params import SystemParams
from engine.paths import SocketClaim, peer_ids
from engine.session import Limits, Session, refusal
from engine.supervisor import Supervisor
from ipc.errors import BadConfig, Busy, EngineError, PermissionDenied
from ipc.frames import encode_frame

ACCEPT_RETRY = 0.1
"""Seconds until the next try when the kernel cannot make a connection."""

log = logging.getLogger(__name__)


class Server:
    """Serves one supervisor at one socket.

    Resource handling: owns the claim on the path; between `start` and `stop` the listening socket and every connection.
    Error handling: `BadConfig` at construction; nothing a client does is raised here; it is answered with `Refused`, or
    the connection ends.
    """

    def __init__(self, supervisor: Supervisor, claim: SocketClaim, limits: Limits | None = None) -> None:
        self.supervisor = supervisor
        self.limits = limits or Limits()
        self.drain_asked = asyncio.Event()
        """A client asked to finish what was accepted and stop."""
        self.stop_asked = asyncio.Event()
        """A client asked to stop now."""
        self._users = served_users(supervisor.params)
        self._claim = claim
        self._accepting: asyncio.Task[None] | None = None
        self.sessions: dict[asyncio.Task[None], Session] = {}

    async def start(self) -> None:
        """Listen. Raises `BadConfig` if the path cannot be bound."""
        listener = self._claim.bind()
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listener), name="accept")

    async def stop(self) -> None:
        """Give the path back, let the events of ended tasks reach their clients, and close every connection.

        In this order: a client that sees its connection end can start another engine at once.
        """
        if self._accepting is None:
            return
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        self._claim.close()
        following = [task for session in self.sessions.values() for task in session.following.values()]
        if following:
            await asyncio.wait(following, timeout=self.limits.close)
        sessions = list(self.sessions)
        for task in sessions:
            task.cancel()
        if sessions:
            await asyncio.wait(sessions, timeout=2 * self.limits.close)
        self._accepting = None

    @property
    def clients(self) -> int:
        return len(self.sessions)

    async def _accept(self, listener: socket.socket) -> None:
        """Take connections, one per turn of the loop, so that a thousand at once delay nobody by more than one."""
        loop = asyncio.get_running_loop()
        with listener, Spare() as spare:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:
                    told = error.errno == errno.EMFILE and spare.refuse(listener)
                    await asyncio.sleep(0 if told else ACCEPT_RETRY)
                else:
                    self._connected(connection)
                    await asyncio.sleep(0)

    def _connected(self, connection: socket.socket) -> None:
        pid, uid = peer_ids(connection)
        error: EngineError | None = None
        if uid not in self._users:
            error = PermissionDenied("this engine does not serve this user; its operator can, with --allow-uid")
        elif len(self.sessions) >= self.limits.clients:
            error = Busy(f"{self.limits.clients} clients are connected, which is the limit; try again", 1.0)
        if error is not None:
            log.warning("refused a connection of process %d, user %d: %s", pid, uid, error)
            _dismiss(connection, error)
            return
        session = Session(self.supervisor, self.limits, connection, (pid, uid), self._shutdown_asked)
        task = asyncio.get_running_loop().create_task(session.run(), name=f"client-{pid}")
        self.sessions[task] = session
        task.add_done_callback(self.sessions.pop)

    def _shutdown_asked(self, drain: bool) -> None:
        (self.drain_asked if drain else self.stop_asked).set()


def served_users(params: SystemParams) -> frozenset[int]:
    """The uids that may connect: who started the engine, root, and the operator's list.

    The others' requests are carried out with this engine's rights, so they need a directory of their own: `BadConfig`
    without one.
    """
    owner = os.geteuid()
    if set(params.allow_uids) - {owner, 0} and os.path.realpath(params.output_root) == "/":
        raise BadConfig(
            "other users are allowed (allow_uids), and every file that this one may write is open to them: "
            "set --output-root to the directory they may use"
        )
    return frozenset({owner, 0, *params.allow_uids})


class Spare:
    """A descriptor kept for the moment when there is none left: a client can then be told so, and not left waiting."""

    def __init__(self) -> None:
        self._fd = -1

    def __enter__(self) -> Spare:
        self._take()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # there is none: the next client waits in the backlog
            self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def refuse(self, listener: socket.socket) -> bool:
        """Answer the client that waits longest with `busy`; False if none waits."""
        self.__exit__()
        try:
            connection, _ = listener.accept()
        except OSError:
            return False
        else:
            log.warning("refused a connection: the engine is out of file descriptors")
            _dismiss(connection, Busy("the engine is out of file descriptors; try again", 1.0))
            return True
        finally:
            self._take()


def _dismiss(connection: socket.socket, error: EngineError) -> None:
    """Refuse and hang up, without waiting: a fresh socket has room for this one frame."""
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.send(encode_frame(refusal(None, error)))
