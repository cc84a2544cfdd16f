"""A process that others are forked from (`engine/forks.py`): it loads what every stage needs, and waits."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import struct
import warnings

from ipc.channel import Channel, close_fds
from ipc.messages.reports import Forked, ForkRefused, ForksReady
from ipc.messages.stage import AnyStageProcessMessage, Fork

ANSWER = struct.Struct("i")
"""The number of a process, or an error number below zero."""


def serve_forks(channel: Channel[AnyStageProcessMessage], timeout: float) -> Channel[AnyStageProcessMessage]:
    """Fork a process for every `Fork`, until the channel ends: `ChannelClosed`. Returns only in these processes, each
    with its own channel, and with nothing else of this one. torch must be loaded, and no device touched: a context of
    CUDA does not survive a fork. `timeout`: seconds for each answer to be taken. What the system refuses is answered
    with `ForkRefused`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a host that ignores it has us inherit that
    gc.collect()
    gc.freeze()  # what is shared stays shared: the collector writes into what it looks at
    channel.send(ForksReady(), timeout=timeout)
    while True:
        message, fds = channel.receive(None)
        assert isinstance(message, Fork), f"got {type(message).__name__}, expected Fork"
        end = socket.socket(fileno=fds.pop())
        answer: Forked | ForkRefused
        try:
            pid = fork()
        except OSError as error:
            answer = ForkRefused(number=error.errno or errno.EAGAIN, reason=error.strerror or str(error))
        else:
            if pid == 0:
                channel.close()
                return Channel(end, AnyStageProcessMessage)
            answer = Forked(pid=pid)
        end.close()
        channel.send(answer, timeout=timeout)


def fork() -> int:
    """Fork a process that is an orphan when this returns: a child of whoever takes orphans. 0 in that process, its
    number here. OSError, in this process, when the system has none to spare, or no descriptor."""
    read, write = os.pipe()
    try:
        middle = _fork()
    except OSError:
        close_fds((read, write))
        raise
    if middle == 0:
        _fork_and_leave(write)
        close_fds((read, write))
        return 0
    os.close(write)
    try:
        said = os.read(read, ANSWER.size)
    finally:
        os.close(read)
        os.waitpid(middle, 0)
    if len(said) < ANSWER.size:
        raise OSError(errno.EAGAIN, "the process that was to fork ended before it had")
    (number,) = ANSWER.unpack(said)
    if number < 0:
        raise OSError(-number, os.strerror(-number))
    return int(number)


def _fork() -> int:
    with warnings.catch_warnings():
        # The other threads wait, in numpy's BLAS, which expects to be forked, and for the supervisor's end: they
        # hold nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _fork_and_leave(write: int) -> None:
    """In a process that is there for this alone: fork once more, write what came of it, and end. Returns in the new
    process only."""
    try:
        answer = os.fork()
    except OSError as error:
        answer = -(error.errno or errno.EAGAIN)
    if answer:
        try:
            os.write(write, ANSWER.pack(answer))
        finally:
            os._exit(0)
