"""Under systemd, or what does as it does: telling it how the engine is (`sd_notify(3)`), and taking the listening
socket that it has opened (`sd_listen_fds(3)`)."""

from __future__ import annotations

import logging
import os
import socket
import stat
import time

from ipc.errors import BadConfig

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

log = logging.getLogger(__name__)


class Notify:
    """Says how the engine is; nothing, when nobody wants to know. Error handling: a service manager that does not
    listen is logged and otherwise left alone."""

    def __init__(self, address: str | None) -> None:
        """`address`: a path, or "@" and an abstract name; None: nobody is told."""
        self._address = address

    @classmethod
    def of_environment(cls) -> Notify:
        return cls(os.environ.get("NOTIFY_SOCKET") or None)

    def status(self, text: str) -> None:
        """One line for people."""
        self._send(f"STATUS={text}")

    def ready(self, text: str = "serving") -> None:
        """The start, or the change of programs, is over."""
        self._send(f"READY=1\nSTATUS={text}\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        """A change of programs begins; `ready` ends it. The time is CLOCK_MONOTONIC in microseconds."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=changing programs")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(text.encode(), address)
        except OSError as error:
            log.warning("the service manager was not told %r: %s", text.partition("\n")[0], error.strerror)


def activated_socket() -> socket.socket | None:
    """The listening Unix socket that this process was started with, if it was started by socket activation.

    `BadConfig` for anything but one such socket. The variables that tell of it are taken out of the environment: they
    are not for our children.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return None
    if count != "1":
        raise BadConfig(f"{count or 'no'} sockets were passed to this service; expected one: the engine has one socket")
    if not stat.S_ISSOCK(os.fstat(FIRST_FD).st_mode):
        raise BadConfig("what was passed to this service is no socket; expected a Unix stream socket that listens")
    listener = socket.socket(fileno=FIRST_FD)
    listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listens:
        raise BadConfig(
            "the socket that was passed to this service is not a Unix stream socket that listens: see "
            "configs/system/engine.socket"
        )
    listener.setblocking(False)
    listener.set_inheritable(False)
    return listener
