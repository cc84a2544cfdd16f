"""Copies to a device beside what it computes: a side stream on a GPU, a thread on a CPU.

The host never waits inside a step: it asks for copies and computation in order, and marks say what must be done before
what. On a CPU, which computes at once, the same order is kept by a thread that copies; so what is proved there about
slots, marks and prefetching holds on a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ipc.messages.status import Copied

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

    def copied(self) -> Copied | None:
        """The copies that are done and were not told of yet."""

    def finish(self) -> None:
        """Return when all copies are made."""


@functools.cache
def lane_of(device: torch.device) -> Lane:
    """The one of this process, to be made while there is memory: a level is raised when there may be none."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


class CudaLane:
    """Streams for copies, and one to compute aside; marks are events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies, self._aside, self._copies_aside = (torch.cuda.Stream(device) for _ in range(3))
        self._stream = self._copies
        """Of copies now. Those for what is computed aside have one of their own: they wait for that, and the others,
        which the computation waits for, must not."""
        self._untold: collections.deque[_Timed] = collections.deque()
        self._zero = self._now()

    def copy(self, pairs: Sequence[Pair], after: Mark | None) -> Mark:
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            self._stream.wait_event(after)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begin.record()
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            end.record()
        self._untold.append(_Timed(begin, end, sum(target.nbytes for target, _ in pairs)))
        return end

    def copied(self) -> Copied | None:
        zero, clock = self._zero
        done = []
        while self._untold and self._untold[0].end.query():
            begin, end, size = self._untold.popleft()
            done.append((clock + zero.elapsed_time(begin) / 1e3, clock + zero.elapsed_time(end) / 1e3, size))
        if done and not self._untold:
            self._zero = self._now()  # an event's time is a float32 from another's, which should not be hours ago
        return together(done)

    def _now(self) -> tuple[torch.cuda.Event, float]:
        """An event on a stream that has nothing to do, and when it was."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._copies)
        event.synchronize()
        return event, time.monotonic()

    def computed(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        self._stream = self._copies_aside
        try:
            with torch.cuda.stream(self._aside):
                yield
        finally:
            self._stream = self._copies

    def finish(self) -> None:
        for stream in (self._aside, self._copies_aside, self._copies):
            stream.synchronize()


class HostLane:
    """A thread; marks are events of Python. It ends with the process, or when nobody has the lane any more."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[_Copies | None] = queue.SimpleQueue()
        self._untold: collections.deque[tuple[float, float, int]] = collections.deque()
        threading.Thread(target=_copy_all, args=(self._work, self._untold), name="copies", daemon=True).start()

    def copy(self, pairs: Sequence[Pair], after: Mark | None) -> Mark:
        done = threading.Event()
        self._work.put(_Copies(pairs, after, done))
        return done

    def copied(self) -> Copied | None:
        return together([self._untold.popleft() for _ in range(len(self._untold))])

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


def _copy_all(work: queue.SimpleQueue[_Copies | None], untold: collections.deque[tuple[float, float, int]]) -> None:
    while (copies := work.get()) is not None:
        if isinstance(copies.after, threading.Event):
            copies.after.wait()
        begin = time.monotonic()
        for target, source in copies.pairs:
            target.copy_(source)
        untold.append((begin, time.monotonic(), sum(target.nbytes for target, _ in copies.pairs)))
        copies.done.set()


class _Timed(NamedTuple):
    """A copy on a GPU, of so many bytes."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    size: int


def together(copies: Sequence[tuple[float, float, int]]) -> Copied | None:
    """Begin, end and bytes of copies that were made one after another, as one account of them; those of nothing are
    left out."""
    made = [(begin, end, size) for begin, end, size in copies if size]
    if not made:
        return None
    seconds, size = sum(end - begin for begin, end, _ in made), sum(size for *_, size in made)
    return Copied(begin=made[0][0], end=made[-1][1], seconds=seconds, bytes=size)
