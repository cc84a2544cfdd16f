"""Large memory is given back by a thread, so that nobody stands still meanwhile."""

from __future__ import annotations

import os
import threading
import time

import pytest

from ipc.freeing import LARGE, apart, close_memory


def memory(size: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_large_memory_is_closed_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small one at once, the large ones in a thread; all of them are closed."""
    closed: dict[int, int] = {}
    close = os.close

    def noted(fd: int) -> None:
        closed[fd] = threading.get_ident()
        close(fd)

    small, one, two = memory(LARGE - 1), memory(LARGE), memory(5 * LARGE)
    monkeypatch.setattr(os, "close", noted)
    close_memory(iter([one, small, two]))
    assert closed[small] == threading.get_ident() and not is_open(small)
    deadline = time.monotonic() + 10
    while is_open(one) or is_open(two):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert closed[one] == closed[two] != threading.get_ident()


def test_without_another_thread_it_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    done: list[int] = []
    apart(lambda: done.append(threading.get_ident()), "here")
    assert done == [threading.get_ident()]
    fd = memory(LARGE)
    close_memory([fd])
    assert not is_open(fd)
