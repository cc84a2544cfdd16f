"""Clients that come at a steady rate, whatever the engine does: `python -m tests.engine.knocking SOCKET PER_SECOND`.

Each connects without waiting, greets, asks for the status, reads both answers and leaves. At the end of its stdin it
waits for those that are there and prints the counts as JSON: `answered`, `refused` (no connection, or the engine said
no), `lost` (the connection ended before the answers), and `slowest`, in seconds.
"""

from __future__ import annotations

import asyncio
import collections
import json
import socket
import sys
import time
from pathlib import Path

from ipc.frames import FrameReader
from ipc.messages.server import AnyServerMessage, Refused, Status, Welcome
from tests.engine.wire import frame, hello

PATIENCE = 60.0
ASKING = hello() + frame(type="status", ref=2)


class Knocking:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: collections.Counter[str] = collections.Counter()
        self.reasons: set[str] = set()
        self.slowest = 0.0

    async def knock(self) -> None:
        began = time.monotonic()
        outcome = "lost"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(str(self.path))
            except OSError as error:
                outcome = "refused"
                self.reasons.add(str(error))
            else:
                try:
                    async with asyncio.timeout(PATIENCE):
                        outcome = await self._talk(sock)
                except OSError as error:
                    self.reasons.add(repr(error))
        self.counts[outcome] += 1
        self.slowest = max(self.slowest, time.monotonic() - began)

    async def _talk(self, sock: socket.socket) -> str:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, ASKING)
        reader: FrameReader[AnyServerMessage] = FrameReader(AnyServerMessage)
        got: list[AnyServerMessage] = []
        while len(got) < 2:
            data = await loop.sock_recv(sock, 65536)
            if not data:
                self.reasons.add("end of the connection")
                return "lost"
            got += reader.feed(data)
            if isinstance(got[-1], Refused):
                self.reasons.add(got[-1].error.message)
                return "refused"
        assert isinstance(got[0], Welcome) and isinstance(got[1], Status), got
        return "answered"


async def run(path: Path, rate: float) -> None:
    knocking = Knocking(path)
    loop = asyncio.get_running_loop()
    stopped = loop.run_in_executor(None, sys.stdin.read)
    tasks: set[asyncio.Task[None]] = set()
    began, made = time.monotonic(), 0
    while not stopped.done():
        while made < (time.monotonic() - began) * rate:
            made += 1
            task = loop.create_task(knocking.knock())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(0.005)
    seconds = time.monotonic() - began
    if tasks:
        await asyncio.wait(tasks)
    counts = {"answered": 0, "refused": 0, "lost": 0} | knocking.counts
    print(json.dumps(counts | {"slowest": knocking.slowest, "rate": made / seconds, "why": sorted(knocking.reasons)}))


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), float(sys.argv[2])))
