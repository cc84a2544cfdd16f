"""Under systemd, or what does as it does: telling it how the engine is (`sd_notify(3)`), having it keep descriptors for
the next start (`FDSTORE=1`), and taking what it passes: those, and the listening socket that it has opened
(`sd_listen_fds(3)`)."""

from __future__ import annotations

import array
import logging
import os
import socket
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple

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

    def keep(self, name: str, fd: int) -> bool:
        """Have a copy of a descriptor kept until `let_go`, or until the service is stopped; it is passed to the next
        start. False if nobody hears of it. A manager that keeps none (`FileDescriptorStoreMax=0`) does not say so."""
        # FDPOLL=0: not to be thrown away when polling it gives an error, as of memory on some devices.
        return self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])

    def let_go(self, name: str) -> None:
        """Of all descriptors of this name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, text: str, fds: Sequence[int] = ()) -> bool:
        if self._address is None:
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sender.sendmsg([text.encode()], rights, 0, address)
        except OSError as error:
            log.warning("the service manager was not told %r: %s", text.partition("\n")[0], error.strerror)
            return False
        return True


class Passed(NamedTuple):
    """What this process was started with. `kept`: by name, what an earlier start had the manager keep."""

    listener: socket.socket | None
    kept: dict[str, int]


def passed(kind: str) -> Passed:
    """The listening Unix socket, if there is one, and the descriptors whose names begin with `kind` and a slash; all
    close-on-exec.

    `BadConfig` for anything else. The variables that tell of it are taken out of the environment: they are not for our
    children.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()):
        return Passed(None, {})
    fds = range(FIRST_FD, FIRST_FD + (int(count) if count.isdigit() else 0))
    kept = {name: fd for fd, name in zip(fds, names, strict=False) if name.startswith(f"{kind}/")}
    sockets = [fd for fd in fds if fd not in kept.values()]
    if len(sockets) > 1 or not fds:
        raise BadConfig(
            f"{len(sockets) or 'no'} sockets were passed to this service; expected one: the engine has one socket"
        )
    for fd in fds:
        os.set_inheritable(fd, False)
    return Passed(_listener(sockets[0]) if sockets else None, kept)


def _listener(fd: int) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise BadConfig("what was passed to this service is no socket; expected a Unix stream socket that listens")
    listener = socket.socket(fileno=fd)
    listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listens:
        raise BadConfig(
            "the socket that was passed to this service is not a Unix stream socket that listens: see "
            "configs/system/engine.socket"
        )
    listener.setblocking(False)
    return listener
