"""One connection of a client to the engine, blocking or asyncio: connect, greet, ask, receive events.

Both kinds share `_Inbox`, which sorts what arrives; they differ only in how bytes are read and written.
"""

from __future__ import annotations

import array
import asyncio
import collections
import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from engine.paths import peer_ids, socket_path
from engine.version import VERSION
from ipc.errors import Busy, EngineError, PermissionDenied, ProtocolError, ServerUnavailable, from_failure
from ipc.frames import FrameReader, encode_frame
from ipc.messages.client import PROTOCOL_VERSION, ClientMessage, GetStatus, Hello
from ipc.messages.server import (
    AnyServerMessage,
    Done,
    Failed,
    Progress,
    Refused,
    ServerMessage,
    Status,
    TaskEvent,
    Welcome,
)

READ_BYTES = 64 * 1024
CLIENT_NAME = f"engine {VERSION}"

R = TypeVar("R", bound=ServerMessage)


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """How long a client waits, in seconds, before it takes the engine for hung (`ServerUnavailable`)."""

    connect: float = 5.0
    reply: float = 30.0
    submit: float = 90.0
    """A long prompt is tokenised before the engine answers."""
    cancel: float = 5.0
    reload: float = 3600.0
    """Weights are read from a disk, and a canary may be run."""
    probe: float = 30.0
    """Without an event for this long, the engine is asked for a sign of life; it has `reply` to give one."""


class NotListening(ServerUnavailable):
    """There is no server at the path."""


class ConnectionEnded(ServerUnavailable):
    """The server closed the connection."""


class _Inbox:
    """What came from the server on one connection: one reply at a time, and events in order."""

    def __init__(self, path: Path) -> None:
        self.events: collections.deque[TaskEvent] = collections.deque()
        self._path = path
        self._frames: FrameReader[AnyServerMessage] = FrameReader(AnyServerMessage)
        self._reply: AnyServerMessage | None = None

    def feed(self, data: bytes) -> None:
        """Sort what was read; no bytes mean the end of the connection."""
        if not data:
            raise ConnectionEnded(
                f"the engine at {self._path} ended the connection; what it accepted stays in its journal"
            )
        for message in self._frames.feed(data):
            match message:
                case Progress() | Done() | Failed():
                    self.events.append(message)
                case Refused(ref=None):
                    raise _error_of(message)
                case _:
                    self._reply = message

    def reply(self, request: ClientMessage, expected: type[R]) -> R | None:
        """The reply to `request`, if it is here; raises what the server refused it with."""
        reply, self._reply = self._reply, None
        if reply is None:
            return None
        if isinstance(reply, Refused):
            raise _error_of(reply)
        if not isinstance(reply, expected) or reply.ref != request.ref:
            raise ProtocolError(f"got {type(reply).__name__} as the answer to {type(request).__name__} {request.ref}")
        return reply


class Connection:
    """One blocking connection, greeted. Resource handling: owns its socket until `close`."""

    def __init__(self, path: Path, deadlines: Deadlines) -> None:
        self._path = path
        self._deadlines = deadlines
        self._inbox = _Inbox(path)
        self._sent = 0
        self._socket = _connect(path, deadlines.connect)
        try:
            self.welcome = self.ask(Hello(ref=0, version=PROTOCOL_VERSION, client=CLIENT_NAME), Welcome)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, message: ClientMessage, expected: type[R], deadline: float | None = None, fd: int | None = None) -> R:
        """Send a message, with a copy of a descriptor, and wait for its reply."""
        deadline = deadline or self._deadlines.reply
        end = time.monotonic() + deadline
        self._sent += 1
        message = msgspec.structs.replace(message, ref=self._sent)
        self._socket.settimeout(deadline)
        try:
            # If the server has already hung up, what it said before is still to be read.
            with contextlib.suppress(ConnectionError):
                frame = encode_frame(message)
                self._socket.sendall(frame if fd is None else frame[_send_with(self._socket, frame, fd) :])
            while (reply := self._inbox.reply(message, expected)) is None:
                self._inbox.feed(self._read(end - time.monotonic()))
        except TimeoutError:
            raise _silent(self._path, deadline) from None
        return reply

    def event(self) -> TaskEvent:
        """The next event."""
        while not self._inbox.events:
            self._wait()
        return self._inbox.events.popleft()

    def wait_closed(self) -> None:
        """Wait until the server ends the connection."""
        with contextlib.suppress(ConnectionEnded):
            while True:
                self._wait()

    def _wait(self) -> None:
        """Take what comes; if nothing does for a while, ask whether the server is alive."""
        try:
            data = self._read(self._deadlines.probe)
        except TimeoutError:
            self.ask(GetStatus(ref=0), Status)
        else:
            self._inbox.feed(data)

    def _read(self, timeout: float) -> bytes:
        if timeout <= 0:
            raise TimeoutError
        self._socket.settimeout(timeout)
        try:
            return self._socket.recv(READ_BYTES)
        except ConnectionError:
            return b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()


class AsyncConnection:
    """One connection on the event loop, greeted by `async with`. Resource handling: owns its socket until the exit.

    Not asyncio's streams: after a failed write they discard what the peer said before it hung up, which is the reason.
    """

    welcome: Welcome

    def __init__(self, path: Path, deadlines: Deadlines) -> None:
        self._path = path
        self._deadlines = deadlines
        self._inbox = _Inbox(path)
        self._sent = 0
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> AsyncConnection:
        self._socket = await _connect_in_thread(self._path, self._deadlines.connect)
        self._socket.setblocking(False)
        try:
            self.welcome = await self.ask(Hello(ref=0, version=PROTOCOL_VERSION, client=CLIENT_NAME), Welcome)
        except BaseException:
            self._socket.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._socket.close()

    async def ask(
        self, message: ClientMessage, expected: type[R], deadline: float | None = None, fd: int | None = None
    ) -> R:
        """Send a message, with a copy of a descriptor, and wait for its reply."""
        deadline = deadline or self._deadlines.reply
        self._sent += 1
        message = msgspec.structs.replace(message, ref=self._sent)
        try:
            async with asyncio.timeout(deadline):
                with contextlib.suppress(ConnectionError):
                    frame = encode_frame(message)
                    rest = frame if fd is None else frame[_send_with(self._socket, frame, fd) :]
                    await self._loop.sock_sendall(self._socket, rest)
                while (reply := self._inbox.reply(message, expected)) is None:
                    self._inbox.feed(await self._read())
        except TimeoutError:
            raise _silent(self._path, deadline) from None
        return reply

    async def event(self) -> TaskEvent:
        """The next event."""
        while not self._inbox.events:
            await self._wait()
        return self._inbox.events.popleft()

    async def wait_closed(self) -> None:
        """Wait until the server ends the connection."""
        with contextlib.suppress(ConnectionEnded):
            while True:
                await self._wait()

    async def _wait(self) -> None:
        """Take what comes; if nothing does for a while, ask whether the server is alive."""
        try:
            async with asyncio.timeout(self._deadlines.probe):
                data = await self._read()
        except TimeoutError:
            await self.ask(GetStatus(ref=0), Status)
        else:
            self._inbox.feed(data)

    async def _read(self) -> bytes:
        try:
            return await self._loop.sock_recv(self._socket, READ_BYTES)
        except ConnectionError:
            return b""


def _send_with(sock: socket.socket, frame: bytes, fd: int) -> int:
    """Send the beginning of a frame, and a descriptor with it; how many bytes that was. The engine answers one message
    at a time, and everything before was answered: there is room."""
    return sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def _connect(path: Path, deadline: float) -> socket.socket:
    """A connected socket whose other end belongs to this user, to root, or to whom the caller chose."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A blocking connect waits for room in the listener's backlog; a non-blocking one would fail with EAGAIN.
        timeval = struct.pack("ll", int(deadline), int(deadline % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        connection.connect(os.fspath(path))
        _, uid = peer_ids(connection)
        trusted = uid in (os.geteuid(), 0) or os.geteuid() == 0 or _is_chosen(path, uid)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
        connection.close()
        raise NotListening(
            f"no engine listens on {path}: start one with `engine serve`, or name its socket with --socket"
        ) from error
    except BlockingIOError as error:
        connection.close()
        raise _silent(path, deadline) from error
    except OSError as error:
        connection.close()
        raise PermissionDenied(f"cannot connect to {path}: {error.strerror}") from error
    if not trusted:
        connection.close()
        raise PermissionDenied(f"the engine at {path} belongs to user {uid}: choose another --socket")
    return connection


def _is_chosen(path: Path, uid: int) -> bool:
    """Somebody named this socket, and in its directory only user `uid` could have put it. At the default path, which
    nobody named, another user's engine is a trap."""
    directory = os.lstat(path.parent)
    return path != socket_path(None) and directory.st_uid == uid and not directory.st_mode & 0o022


async def _connect_in_thread(path: Path, deadline: float) -> socket.socket:
    """`_connect` without blocking the loop; the socket is not lost if the caller is cancelled meanwhile."""

    def close_unwanted(finished: asyncio.Future[socket.socket]) -> None:
        if not finished.cancelled() and finished.exception() is None:
            finished.result().close()

    connecting = asyncio.ensure_future(asyncio.to_thread(_connect, path, deadline))
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(close_unwanted)
        raise


def _silent(path: Path, seconds: float) -> ServerUnavailable:
    return ServerUnavailable(
        f"the engine at {path} did not answer within {seconds:g} seconds: look at its log, or restart it"
    )


def _error_of(refused: Refused) -> EngineError:
    error = from_failure(refused.error)
    if isinstance(error, Busy):
        error.retry_after = refused.retry_after
    return error
