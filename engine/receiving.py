"""What comes on a client's connection: bytes, and with them at most one descriptor."""

from __future__ import annotations

import array
import os
import socket

from ipc.channel import close_fds, descriptors_in
from ipc.errors import ProtocolError

_ROOM = socket.CMSG_SPACE(array.array("i").itemsize)


class Incoming:
    """Reads a socket. A descriptor that comes is kept until it is taken, and no second one beside it.

    Resource handling: owns the descriptor until `take` or `close`. Error handling: `ProtocolError`, with every
    descriptor closed, for more than one, or when this process has none to spare.
    """

    def __init__(self, sock: socket.socket) -> None:
        """`sock`, non-blocking, stays the caller's."""
        self._socket = sock
        self._fd = -1

    @property
    def has_descriptor(self) -> bool:
        return self._fd >= 0

    def read(self, size: int) -> bytes:
        """What is there, `size` bytes at most, none at the end; BlockingIOError if nothing is."""
        data, ancillary, flags, _ = self._socket.recvmsg(size, _ROOM, socket.MSG_CMSG_CLOEXEC)
        if not ancillary and not flags & socket.MSG_CTRUNC:
            return data
        fds = descriptors_in(ancillary)
        if len(fds) != 1 or self.has_descriptor or flags & socket.MSG_CTRUNC:
            close_fds(fds)
            self.close()
            raise ProtocolError("more descriptors came than the one of a message, or more than this engine may have")
        self._fd = fds[0]
        return data

    def take(self) -> int:
        """The descriptor, the caller's now; -1: none came."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self.take())
