"""How often each file of a directory was put in its place: a video is written under another name, and renamed."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import time
from collections import Counter
from pathlib import Path
from types import TracebackType

from tools.load import PATIENCE, Broken

IN_MOVED_FROM, IN_MOVED_TO, IN_Q_OVERFLOW = 0x40, 0x80, 0x4000
"""Of <linux/inotify.h>. Two equal events are made one if nothing was between them: so what a file was called before is
watched, too."""
EVENT = struct.Struct("iIII")
LOOK_INTERVAL = 0.001
"""Seconds between two looks at whether there is another one."""


class Placements:
    """Of one directory, from construction on. Resource handling: one descriptor until `close`."""

    def __init__(self, directory: Path) -> None:
        self._times: Counter[str] = Counter()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(directory), IN_MOVED_FROM | IN_MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), f"inotify: {os.strerror(ctypes.get_errno())}")

    def times(self) -> Counter[str]:
        """Name -> how often, until now. `Broken` if the kernel has kept count no longer."""
        try:
            while data := os.read(self._fd, 1 << 16):
                self._take(data)
        except BlockingIOError:
            pass
        return self._times.copy()

    async def until(self, names: set[str], count: int) -> None:
        """Wait until so many of these are in their places. `Broken` if they do not come."""
        deadline = time.monotonic() + PATIENCE
        while len(names & self.times().keys()) < count:
            if time.monotonic() > deadline:
                raise Broken(f"{count} videos are not in their places after {PATIENCE:.0f} s")
            await asyncio.sleep(LOOK_INTERVAL)

    def check_once(self, names: set[str]) -> None:
        """Each of these was put in its place once."""
        times = self.times()
        if wrong := {name: times[name] for name in names if times[name] != 1}:
            raise Broken(f"put in place, and how often, expected once: {wrong}")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Placements:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _take(self, data: bytes) -> None:
        while data:
            _, mask, _, length = EVENT.unpack_from(data)
            if mask & IN_Q_OVERFLOW:
                raise Broken("more files were renamed than the kernel keeps count of")
            if mask & IN_MOVED_TO:
                self._times[os.fsdecode(data[EVENT.size : EVENT.size + length].rstrip(b"\0"))] += 1
            data = data[EVENT.size + length :]
