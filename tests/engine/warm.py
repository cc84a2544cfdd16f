"""Interpreters that have torch loaded already. A fresh one takes two seconds of a core to import it, and tests start
hundreds of engines: here that is done once, and each process that an engine starts is forked from the one that has done
it. From there on it is what it always is: it runs the same module, with the same environment, for the same channel.

Those tests that are about fresh interpreters ask for them, with the fixture `fresh_interpreters`; `engine serve` in a
process of its own always has them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import msgspec

from engine.child import AdoptedChild, Child, python_path
from engine.forks import taking_orphans
from tests.engine.warm_interpreter import Asked

ROOT = Path(__file__).parents[2]
TIMEOUT = 60.0
"""Seconds for the libraries to be loaded, or for a fork, on a busy machine."""


class WarmInterpreters:
    """In the place of `engine.process.spawn`, between `with` and its end. Resource handling: owns one process and a
    socket; what is forked belongs to who asks for it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(TIMEOUT)
        self._loaded = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.warm_interpreter", str(theirs.fileno())],
                cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": python_path()},
            )  # fmt: skip

    def spawn(self, module: str, channel_end: socket.socket) -> Child:
        """A process that does what `python -m module FD` does."""
        if not self._loaded:
            assert self._socket.recv(16) == b"loaded", "it ended before it had loaded everything"
            self._loaded = True
        asked = Asked(module, {**os.environ, "PYTHONPATH": python_path()})
        with taking_orphans():
            socket.send_fds(self._socket, [msgspec.json.encode(asked)], [channel_end.fileno()])
            return AdoptedChild(int(self._socket.recv(16)))

    def __enter__(self) -> WarmInterpreters:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
