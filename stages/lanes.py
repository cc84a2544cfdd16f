"""Copies to a device beside what it computes: a side stream on a GPU, a thread on a CPU.

The host never waits inside a step: it asks for copies and computation in order, and marks say what must be done before
what. On a CPU, which computes at once, the same order is kept by a thread that copies; so what is proved there about
slots, marks and prefetching holds on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""On the device, and in host memory; of one shape."""


class Mark(Protocol):
    """A point in the work of a lane, or of the computation."""


class Lane(Protocol):
    """Where copies to one device are made, one after another."""

    def copy(self, pairs: Sequence[Pair], after: Mark | None) -> Mark:
        """Copy into the first of each pair what the second, in host memory, holds, once `after` is reached; the mark is
        that this is done."""

    def computed(self) -> Mark:
        """All that was asked to be computed so far."""

    def wait(self, mark: Mark) -> None:
        """Compute nothing more before `mark` is reached."""

    def aside(self) -> AbstractContextManager[None]:
        """What is asked to be computed in this context is computed beside what was asked before it, where the device
        can; `computed`, called in it, marks its end, for who uses what it makes."""

    def finish(self) -> None:
        """Return when all copies are made."""


@functools.cache
def lane_of(device: torch.device) -> Lane:
    """The one of this process, to be made while there is memory: a level is raised when there may be none."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


class CudaLane:
    """A stream for copies, and one to compute aside; marks are events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._aside = torch.cuda.Stream(device)

    def copy(self, pairs: Sequence[Pair], after: Mark | None) -> Mark:
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def computed(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            yield

    def finish(self) -> None:
        self._aside.synchronize()
        self._stream.synchronize()


class HostLane:
    """A thread; marks are events of Python. It ends with the process, or when nobody has the lane any more."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[_Copies | None] = queue.SimpleQueue()
        threading.Thread(target=_copy_all, args=(self._work,), name="copies", daemon=True).start()

    def copy(self, pairs: Sequence[Pair], after: Mark | None) -> Mark:
        done = threading.Event()
        self._work.put(_Copies(pairs, after, done))
        return done

    def computed(self) -> Mark:
        # A CPU has computed what it was asked when the call returns.
        done = threading.Event()
        done.set()
        return done

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, threading.Event)
        mark.wait()

    def aside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def finish(self) -> None:
        self.wait(self.copy((), None))

    def __del__(self) -> None:
        self._work.put(None)


class _Copies(NamedTuple):
    """What the thread is to do: the pairs, once `after` is reached; `done` says that it is done."""

    pairs: Sequence[Pair]
    after: Mark | None
    done: threading.Event


def _copy_all(work: queue.SimpleQueue[_Copies | None]) -> None:
    while (copies := work.get()) is not None:
        if isinstance(copies.after, threading.Event):
            copies.after.wait()
        for target, source in copies.pairs:
            target.copy_(source)
        copies.done.set()
