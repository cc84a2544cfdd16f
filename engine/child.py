"""Short-lived processes for what the supervisor must not do itself: decode a stranger's file, load a large library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

T = TypeVar("T")


class NoAnswer(Exception):
    """A process ended, or was ended, before it had answered."""


def run_module(module: str, *arguments: str, given: bytes = b"", timeout: float) -> subprocess.CompletedProcess[bytes]:
    """`python -m module arguments` with `given` on stdin, to its end. Raises TimeoutExpired after killing it.

    `-P`: nothing is imported from the working directory.
    """
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments], input=given, capture_output=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": python_path()}, check=False,
    )  # fmt: skip


def answer_of(module: str, asked: msgspec.Struct, answer: type[T], timeout: float) -> T:
    """What `python -m module` answers to `asked`, both JSON. Raises `NoAnswer`, which says how it ended without one."""
    try:
        ran = run_module(module, given=msgspec.json.encode(asked), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"it took more than {timeout:g} seconds") from None
    if ran.returncode != 0:
        said = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise NoAnswer(f"the process that looks at it ended with status {ran.returncode}: {said}")
    return msgspec.json.decode(ran.stdout, type=answer)


def how_it_ended(status: int) -> str:
    """SIGKILL, signal 35 or exit code 1, of a status as `subprocess` gives it: signals are negative."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def python_path() -> str:
    """PYTHONPATH for child processes: they must import this very installation, wherever it was found."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    if not inherited or inherited.split(os.pathsep)[0] == root:
        return inherited or root
    return f"{root}{os.pathsep}{inherited}"


class Child(Protocol):
    """A process of ours: a `subprocess.Popen`, or an `AdoptedChild`."""

    pid: int
    returncode: int | Any
    """None until it was reaped."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


class AdoptedChild:
    """A child that this program has not spawned itself: the one before it in this same process has, or another process
    has forked it. Resource handling: it is a zombie until `poll` or `wait` reaps it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How it ended, if it has."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        status = self._reap(0)
        assert status is not None, "a child that was waited for has ended"
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:
                pid, status = self.pid, -1  # reaped by someone else: how it ended is not known
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status) if status >= 0 else status
        return self.returncode
