"""The control channel between the supervisor and a stage process: typed messages with file descriptors beside them.

One message is one packet of a SOCK_SEQPACKET pair: two bytes, big-endian, that say how many descriptors travel with it,
then MessagePack. Packets arrive whole and in order or not at all, so there is no framing and no partial read.
"""

from __future__ import annotations

import array
import errno
import math
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

import msgspec

from ipc.errors import ProtocolError

MAX_MESSAGE_BYTES = 128 * 1024
MAX_FDS = 253
"""SCM_MAX_FD: what Linux carries in one packet."""

_COUNT = struct.Struct(">H")
_INT_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * _INT_BYTES)

T = TypeVar("T")


class ChannelError(OSError):
    """A packet did not arrive as it was sent: descriptors were lost (too many open files) or the packet was cut."""


class ChannelClosed(ChannelError):
    """The other end is gone: its process closed the channel or died."""


class Received(NamedTuple, Generic[T]):
    """A message and the descriptors that came with it, which the receiver now owns and must close."""

    message: T
    fds: list[int]


def close_fds(fds: Iterable[int]) -> None:
    """Close every descriptor."""
    for fd in fds:
        os.close(fd)


class Channel(Generic[T]):
    """One end. `T` is the union of the messages that arrive here; anything else that arrives is a ProtocolError.

    Resource handling: owns the socket. Descriptors given to `send` are duplicated into the packet and stay the
    sender's; descriptors received are new, close-on-exec, and the receiver's. They are closed here if the packet is
    refused.

    Error handling: ChannelClosed when the other end is gone, TimeoutError at a deadline, ChannelError when descriptors
    were lost on the way, ProtocolError for a packet that is no message. After the last two the peer cannot be trusted
    and the channel should be closed.
    """

    def __init__(self, sock: socket.socket, incoming_type: Any) -> None:
        """Take over `sock`, one end of `Channel.pair()`. `incoming_type` is a tagged struct or a union of them."""
        sock.setblocking(False)
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(incoming_type)

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """Two connected ends, close-on-exec: one stays, the other goes to the stage process."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def fileno(self) -> int:
        """For an event loop; -1 once closed."""
        return self._sock.fileno()

    def send(self, message: msgspec.Struct, fds: Sequence[int] = (), timeout: float | None = None) -> None:
        """Send, waiting while the peer's buffer is full; TimeoutError after `timeout` seconds (None: wait for ever)."""
        packet = self.encode(message, len(fds))
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._send(packet, fds):
            self._wait(select.POLLOUT, deadline, "send: the peer does not read")

    def try_send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> bool:
        """Send without waiting; False, and nothing sent, when the peer's buffer is full."""
        return self._send(self.encode(message, len(fds)), fds)

    def try_send_packet(self, packet: bytes, fds: Sequence[int] = ()) -> bool:
        """`try_send` of what `encode` made of a message that travels with as many descriptors."""
        return self._send(packet, fds)

    @staticmethod
    def encode(message: msgspec.Struct, fds: int = 0) -> bytes:
        """The packet of a message that travels with this many descriptors. ValueError if it cannot be sent: it is too
        large, or has text that is not UTF-8."""
        payload = msgspec.msgpack.encode(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            kind = type(message).__name__
            raise ValueError(f"{kind}: got {len(payload)} bytes, expected at most {MAX_MESSAGE_BYTES}")
        if fds > MAX_FDS:
            raise ValueError(f"{type(message).__name__}: got {fds} descriptors, expected at most {MAX_FDS}")
        return _COUNT.pack(fds) + payload

    def receive(self, timeout: float | None) -> Received[T]:
        """The next message; TimeoutError after `timeout` seconds (None: wait for ever), ChannelClosed at the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (received := self.try_receive()) is None:
            self._wait(select.POLLIN, deadline, "receive: no message")
        return received

    def try_receive(self) -> Received[T] | None:
        """The next message if there is one now; ChannelClosed once the peer is gone and all it sent has been read."""
        try:
            packet, ancillary, flags, _ = self._receive_packet()
        except BlockingIOError:
            return None
        fds = descriptors_in(ancillary)
        try:
            return Received(self._decode(packet, fds, flags), fds)
        except BaseException:
            close_fds(fds)
            raise

    def close(self) -> None:
        self._sock.close()

    def _send(self, packet: bytes, fds: Sequence[int]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosed(error.errno, "the peer is gone") from error
        return True

    def _receive_packet(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        size = _COUNT.size + MAX_MESSAGE_BYTES
        try:
            return self._sock.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            # A peer that leaves messages unread: Linux reports that once, before the packets that it had sent.
            return self._sock.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)

    def _decode(self, packet: bytes, fds: list[int], flags: int) -> T:
        if flags & socket.MSG_CTRUNC:
            raise ChannelError(errno.EMFILE, f"descriptors were lost on the way: got {len(fds)}; raise the fd limit")
        if flags & socket.MSG_TRUNC:
            raise ProtocolError(f"got a message over {MAX_MESSAGE_BYTES} bytes, expected at most that")
        if not packet:
            raise ChannelClosed(errno.EPIPE, "the peer closed the channel")
        if len(packet) < _COUNT.size:
            raise ProtocolError(f"got a packet of {len(packet)} bytes, expected at least {_COUNT.size + 1}")
        (expected,) = _COUNT.unpack_from(packet)
        if len(fds) != expected:
            raise ChannelError(errno.EBADMSG, f"got {len(fds)} descriptors, expected {expected}")
        try:
            return self._decoder.decode(memoryview(packet)[_COUNT.size :])
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"undecodable message of {len(packet) - _COUNT.size} bytes: {error}") from error

    def _wait(self, event: int, deadline: float | None, what: str) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError(f"{what} before the deadline")
        poller = select.poll()
        poller.register(self._sock, event)
        poller.poll(None if left is None else math.ceil(left * 1000))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Those that `recvmsg` has made, which are the caller's."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return fds.tolist()
