"""Well-behaved clients beside hostile ones, and what one that does not read costs: `python -m tools.neighbours`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import AsyncClient
from engine.session import Limits
from tests.engine.test_server import serving
from tests.engine.wire import EngineProcess, environment
from tools.load import Broken
from tools.neighbours import check_answers, cost_of_deaf_clients, fill, hostile_at, well_behaved

SECONDS = 6.0


@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_hostile_clients_hold_up_nobody_and_cost_little(short_dir: Path) -> None:
    """Beside clients that stop reading, flood, send garbage and hang up, status, list, submit and cancel of others are
    all answered, the first two within a second at p99. 100 clients that ask for long lists and read nothing cost
    at most 64 KiB and one frame each, and are gone at their deadline."""
    with EngineProcess(short_dir) as engine:
        await asyncio.to_thread(engine.wait_ready)
        client = AsyncClient(engine.socket)
        await fill(client, short_dir)
        with hostile_at(engine.socket):
            samples = await well_behaved(client, short_dir, SECONDS)
        check_answers(samples)
        assert min(len(found) for found in samples.values()) >= 3
        limits = Limits()
        cost = await asyncio.to_thread(cost_of_deaf_clients, engine.socket, engine.process.pid, 100, limits.drain + 30)
        assert cost.frame > 64 << 10, "the answer does not fit into what the kernel keeps"
        cost.check(limits.drain)


# Controls.


async def test_a_server_that_lets_others_wait_is_found(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that blocks for 0.6 s on every `list`: its clients wait for each other."""
    async with serving(short_dir) as server:
        rows = server.supervisor.rows
        monkeypatch.setattr(server.supervisor, "rows", lambda: (time.sleep(0.6), rows())[1])
        with pytest.raises(Broken, match=r"p99 of \w+ beside hostile clients is"):
            check_answers(await well_behaved(AsyncClient(short_dir / "engine.sock"), short_dir, 6.0))


HOARDER = """
import asyncio, sys
from ipc.frames import encode_frame
from ipc.messages.server import Ok

ANSWER = encode_frame(Ok(ref=1)) + bytes(100_000)
ANSWER = (len(ANSWER) - 4).to_bytes(4, "big") + ANSWER[4:]

async def serve(reader, writer):
    while True:
        await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
        writer.write(ANSWER)

async def main():
    server = await asyncio.start_unix_server(serve, sys.argv[1])
    print("listening", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@contextmanager
def hoarder(path: Path) -> Iterator[int]:
    """A server that keeps every answer until it is read; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", HOARDER, str(path)], stdout=subprocess.PIPE, env=environment()
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"listening\n"
            yield process.pid
        finally:
            process.kill()


def test_a_server_that_keeps_what_is_not_read_is_found(short_dir: Path) -> None:
    """Its clients are never dropped; with their hanging up taken for that, they are too dear."""
    with hoarder(short_dir / "s") as pid, pytest.raises(Broken, match="10 of 10 clients that read nothing are still"):
        cost_of_deaf_clients(short_dir / "s", pid, 10, 1.0)


def test_clients_that_are_dear_are_found(short_dir: Path) -> None:
    """The same server, killed as its clients wait: they cost more than the bound, and were dropped too early."""
    with hoarder(short_dir / "s") as pid:
        killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(4); os.kill({pid}, 9)"])
        cost = cost_of_deaf_clients(short_dir / "s", pid, 10, 60.0)
        killer.wait()
    with pytest.raises(Broken, match="a client that does not read costs"):
        cost.check(2.0)
    cost.bytes_each = 1.0
    with pytest.raises(Broken, match="the deadline is 60"):
        cost.check(60.0)
