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
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from engine.pace import Turnstile
from engine.params import SystemParams
from engine.paths import SocketClaim, peer_ids
from engine.session import Limits, Session, SessionState, refusal
from engine.states import Descriptors, State
from engine.supervisor import Supervisor
from engine.waiting import readable
from ipc.errors import BadConfig, Busy, EngineError, PermissionDenied
from ipc.frames import encode_frame

HOLD_INTERVAL = 0.002
"""Seconds between two looks at whether all messages are answered."""

HOLD_TIMEOUT = 3.0
"""Seconds for which clients are held for the sake of one whose request takes long to be looked at: less than they have
for their hello."""

PATIENCE = 2.0
"""Seconds since a client left for which the next one waits in the backlog for a place, before it is refused one. All
who came while the program was replaced are taken up at once, and they may be more than there are places."""

ACCEPT_RETRY = 0.1
"""Seconds until the next try when the kernel cannot make a connection."""

log = logging.getLogger(__name__)


class ServerState(State, frozen=True, kw_only=True):
    """A `Server`; `listener` is the place of its descriptor."""

    listener: int
    sessions: list[SessionState]


class Restored(NamedTuple):
    """What a server goes on with."""

    listener: socket.socket
    sessions: list[Session]


class Server:
    """Serves one supervisor at one socket.

    Resource handling: owns the claim on the path; between `start` and `stop` the listening socket and every connection.
    Error handling: `BadConfig` at construction; nothing a client does is raised here; it is answered with `Refused`, or
    the connection ends.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        claim: SocketClaim,
        limits: Limits | None = None,
        reload: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`reload` replaces the program of this process; None: it is another program's, which embeds the engine."""
        self.supervisor = supervisor
        self.limits = limits or Limits()
        self.drain_asked = asyncio.Event()
        """A client asked to finish what was accepted and stop."""
        self.stop_asked = asyncio.Event()
        """A client asked to stop now."""
        self._users = served_users(supervisor.params)
        self._claim = claim
        self._reload = reload
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._left = asyncio.Event()
        """Set when the next client leaves."""
        self._left_at = 0.0
        """When one last did, or might have: the start."""
        self.gate = asyncio.Event()
        """While it is not set, no message of a client is taken up: `hold`."""
        self.gate.set()
        self.turnstile = Turnstile()
        self.sessions: dict[asyncio.Task[None], Session] = {}

    async def start(self, listener: socket.socket | None = None) -> None:
        """Listen, on a socket of our own or on one that was passed to us. Raises `BadConfig` if that cannot be."""
        self._listen_on(self._claim.bind() if listener is None else self._claim.take(listener))

    def _listen_on(self, listener: socket.socket) -> None:
        self._listener = listener
        self._left_at = asyncio.get_running_loop().time()
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
        with listener, Spare() as spare:
            while True:
                await self._wait_for_a_place()
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    await readable(listener)
                except OSError as error:
                    told = error.errno == errno.EMFILE and spare.refuse(listener)
                    await asyncio.sleep(0 if told else ACCEPT_RETRY)
                else:
                    self._connected(connection)
                    await asyncio.sleep(0)

    async def _wait_for_a_place(self) -> None:
        """Until there is one, or nobody has left for a while."""
        loop = asyncio.get_running_loop()
        while len(self.sessions) >= self.limits.clients and (until := self._left_at + PATIENCE) > loop.time():
            left = self._left
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await left.wait()

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
        self._serve(Session(self.supervisor, self.limits, connection, (pid, uid), self), pid)

    def _serve(self, session: Session, pid: int) -> None:
        task = asyncio.get_running_loop().create_task(session.run(), name=f"client-{pid}")
        self.sessions[task] = session
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        del self.sessions[task]
        self._left_at = asyncio.get_running_loop().time()
        self._left.set()
        self._left = asyncio.Event()

    def handle_shutdown(self, drain: bool) -> None:
        (self.drain_asked if drain else self.stop_asked).set()

    async def handle_reload(self) -> None:
        if self._reload is None:
            raise PermissionDenied("this engine is part of another program, which alone can replace itself")
        await self._reload()

    # From one program to the next.

    async def hold(self) -> None:
        """Take up no more messages, and wait until those that were are answered. They wait in the clients' sockets
        until `release`. `Busy` if that takes too long."""
        end = asyncio.get_running_loop().time() + HOLD_TIMEOUT
        self.gate.clear()
        while not all(session.is_between_messages for session in self.sessions.values()):
            if asyncio.get_running_loop().time() > end:
                raise Busy(f"a request is still being looked at after {HOLD_TIMEOUT:g} s; try again", HOLD_TIMEOUT)
            await asyncio.sleep(HOLD_INTERVAL)

    def release(self) -> None:
        self.gate.set()

    def state(self, fds: Descriptors) -> ServerState:
        """Everything about the clients, for the program that takes the place of this one."""
        assert self._listener is not None, "there are clients only once the server listens"
        return ServerState(
            listener=fds.put(self._listener.fileno()),
            sessions=[session.state(fds) for session in self.sessions.values() if not session.is_over],
        )  # fmt: skip

    def put_back(self, state: ServerState, fds: Descriptors, paused: float) -> Restored:
        """The listening socket and the sessions of the program before this one; they are not touched before
        `resume`. `paused`: seconds since that program stopped answering."""
        listener = socket.socket(fileno=fds.take(state.listener))
        sessions = []
        for each in state.sessions:
            connection = socket.socket(fileno=fds.take(each.socket))
            session = Session(self.supervisor, self.limits, connection, peer_ids(connection), self)
            session.put_back(each, paused)
            sessions.append(session)
        return Restored(listener, sessions)

    def resume(self, restored: Restored) -> None:
        for session in restored.sessions:
            self._serve(session, session.pid)
        self._listen_on(restored.listener)


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
