"""Ten times the load that the engine can take, for a few seconds. Long: `python -m tools.chaos overload`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from engine import AsyncClient, SystemParams, UserParams
from engine.supervisor import Supervisor
from ipc.errors import Busy, EngineError, OutputError
from tests.engine.test_server import serving
from tools.load import Broken, timed
from tools.overload import check_ends, check_refusal, overload, watch_of, watched


@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_ten_times_what_the_engine_can_take(short_dir: Path) -> None:
    """Six seconds of it on a queue of six: every look at the status finds all queues within their bounds and the
    supervisor's memory where it was, every refusal is `busy` with a time, and what was accepted is done once, with the
    frames that it has on an idle engine. Then the controls, on what was seen."""
    async with timed(None) as tally:
        watch = await overload(tally, short_dir, 6.0, 6, "--placement", "fused", "--device", "cpu")
    assert watch.looks > 20
    status = watch.last
    assert status is not None

    watch.check(status)
    for queue in status.queues:
        narrow = watch_of(6)
        narrow.slots[queue.name] = queue.peak - 1
        with pytest.raises(Broken, match=f"{queue.name} had {queue.peak} slots in use, the bound is {queue.peak - 1}"):
            narrow.check(status)
    with pytest.raises(Broken, match="the supervisor grew by 64 MiB"):
        watch.check(msgspec.structs.replace(status, resident_bytes=watch.first_resident + (64 << 20)))

    check_ends(status, status.finished)
    for expected in (status.finished - 1, status.finished + 1):  # one done twice, one lost
        with pytest.raises(Broken, match=f"expected {expected}, 0 and 0"):
            check_ends(status, expected)


async def test_a_queue_that_holds_more_than_its_bound_is_found(short_dir: Path) -> None:
    """Control: an engine that takes three requests, watched for a bound of two, ends what is done meanwhile."""
    async with serving(short_dir, max_queue=3) as server:
        for number in range(3):
            await server.supervisor.submit(UserParams(prompt="x", output=str(short_dir / f"{number}.mp4")))
        with pytest.raises(ExceptionGroup, match="TaskGroup") as found:
            async with watched(AsyncClient(short_dir / "engine.sock"), watch_of(2)):
                await asyncio.Event().wait()
    [error] = found.value.exceptions
    assert str(error) == "3 requests wait or run, the bound is 2"


async def test_the_refusal_of_a_full_queue_is_what_is_expected_and_others_are_not(tmp_path: Path) -> None:
    """What a full engine raises passes. The controls: busy without a time, and another error."""
    async with Supervisor(SystemParams(placement="fused", device="cpu", max_queue=1)) as supervisor:
        await supervisor.submit(UserParams(prompt="x", output=str(tmp_path / "1.mp4")))
        with pytest.raises(EngineError) as refused:
            await supervisor.submit(UserParams(prompt="x", output=str(tmp_path / "2.mp4")))
    assert check_refusal(refused.value) == "busy"
    for wrong in (Busy("full"), Busy("full", 0.0), OutputError("the disk is full")):
        with pytest.raises(Broken):
            check_refusal(wrong)
