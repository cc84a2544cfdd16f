"""A process that others are forked from (`engine/forks.py`): it loads what every stage needs, and waits."""

from __future__ import annotations

import gc
import os
import signal
import socket
import struct
import warnings

from ipc.channel import Channel
from ipc.messages import AnyStageProcessMessage, Fork, Forked, ForksReady

PID = struct.Struct("i")


def serve_forks(channel: Channel[AnyStageProcessMessage], timeout: float) -> Channel[AnyStageProcessMessage]:
    """Fork a process for every `Fork`, until the channel ends: `ChannelClosed`. Returns only in these processes, each
    with its own channel, and with nothing else of this one. torch must be loaded, and no device touched: a context of
    CUDA does not survive a fork. `timeout`: seconds for each answer to be taken."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a host that ignores it has us inherit that
    gc.collect()
    gc.freeze()  # what is shared stays shared: the collector writes into what it looks at
    channel.send(ForksReady(), timeout=timeout)
    while True:
        message, fds = channel.receive(None)
        assert isinstance(message, Fork), f"got {type(message).__name__}, expected Fork"
        end = socket.socket(fileno=fds.pop())
        pid = fork()
        if pid == 0:
            channel.close()
            return Channel(end, AnyStageProcessMessage)
        end.close()
        channel.send(Forked(pid=pid), timeout=timeout)


def fork() -> int:
    """Fork a process that is an orphan when this returns: a child of whoever takes orphans. 0 in that process, its
    number here. OSError, in this process, when the system has none to spare."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # The other threads wait, in numpy's BLAS, which expects to be forked, and for the supervisor's end: they
        # hold nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        middle = os.fork()
        if middle == 0:
            try:
                pid = os.fork()
            except OSError:
                os._exit(1)
            if pid:
                os.write(write, PID.pack(pid))
                os._exit(0)
            os.close(read)
            os.close(write)
            return 0
    os.close(write)
    try:
        said = os.read(read, PID.size)
    finally:
        os.close(read)
        os.waitpid(middle, 0)
    if len(said) < PID.size:
        raise OSError("the process that was to fork ended before it had")
    return int(PID.unpack(said)[0])
