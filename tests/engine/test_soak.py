"""Clients that are killed, for 20 seconds. Long: `python -m tools.chaos soak --minutes 60`."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from engine import AsyncClient, SystemParams, UserParams
from engine.supervisor import Supervisor
from tests.engine.test_server import serving
from tools.load import Broken, Footprint, Load, Tally, timed
from tools.soak import ENOUGH, Soak, check_ends, check_flat, soak

FLAT = Footprint(fds=40, threads=5, children=1, memfds=20, resident=50 << 20)


@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_twenty_seconds_of_dying_clients(short_dir: Path) -> None:
    """Clients are killed before, while and after they submit, follow, cancel and come back: every task that was
    accepted ends once, as its client wanted it, with the frames of an idle engine; the supervisor is as it was."""
    async with timed(None) as tally:
        await soak(tally, short_dir, 20.0, "--placement", "fused", "--device", "cpu")
    assert tally.faults["SIGKILL of a client"] >= 5
    assert tally.requests >= 3


# Controls.


async def test_a_request_that_ends_otherwise_than_its_client_wanted_is_found(short_dir: Path) -> None:
    """Somebody else cancels the task of a dead client."""
    path = short_dir / "1-0.mp4"
    async with serving(short_dir) as server:
        accepted = await server.supervisor.submit(UserParams(prompt="x", output=str(path)))
        await server.supervisor.cancel(accepted.id)
        client, tally = AsyncClient(short_dir / "engine.sock"), Tally(1)
        run = Soak(client, Load(client, short_dir, tally), tally, random.Random(1))
        with pytest.raises(Broken, match="was cancelled, and nobody asked for it"):
            await run.settle(0, path, ["accepted", accepted.id])
        await run.settle(0, path, ["accepted", accepted.id, "cancelling", accepted.id])
        assert run.ends == {"cancelled": 1}


async def test_an_end_too_many_or_too_few_is_found(tmp_path: Path) -> None:
    """An engine that has cancelled one request: one cancellation was seen, or it is `Broken`."""
    async with Supervisor(SystemParams(placement="fused", device="cpu")) as supervisor:
        accepted = await supervisor.submit(UserParams(prompt="x", output=str(tmp_path / "v.mp4")))
        await supervisor.cancel(accepted.id)
        status = supervisor.status()
    check_ends(status, Counter(cancelled=1), 0)
    for seen in (Counter(), Counter(cancelled=2), Counter(done=1)):
        with pytest.raises(Broken, match="its clients saw"):
            check_ends(status, seen, 0)


def test_what_dead_clients_leave_is_found() -> None:
    """Descriptors that stay open in a real process; then growth beyond the bound, for few requests and for many."""
    before = Footprint.of(os.getpid())
    reader, writer = os.pipe()
    try:
        with pytest.raises(Broken, match=r"left in the supervisor by dead clients: \{'fds': 2\}"):
            check_flat(before, Footprint.of(os.getpid()), 1)
    finally:
        os.close(reader)
        os.close(writer)
    check_flat(FLAT, dataclasses.replace(FLAT, threads=9, resident=FLAT.resident + (1 << 19)), ENOUGH)
    for requests, growth in ((10, 17 << 20), (ENOUGH, 2 << 20), (10**6, 17 << 20)):
        with pytest.raises(Broken, match="the supervisor grew by"):
            check_flat(FLAT, dataclasses.replace(FLAT, resident=FLAT.resident + growth), requests)
