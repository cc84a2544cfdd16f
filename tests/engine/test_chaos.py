"""Random faults on the whole engine with the model that ships: every accepted request ends once, with the frames that
it has when nobody disturbs it. Long versions: `make chaos`. A failure names its seed."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path

import pytest

from engine import Supervisor, SystemParams, watch
from tools import chaos, load
from tools.placements import Placements

SECONDS = 1800


@pytest.mark.timeout(SECONDS)
async def test_sixty_kills(tmp_path: Path) -> None:
    """SIGKILL of a random stage at a random moment, 60 times over 120 requests: all done, none twice, same frames."""
    async with chaos.timed(None) as tally:
        await chaos.kills(tally, tmp_path, 120, 60, SystemParams())
    assert tally.requests >= 120
    assert sum(tally.faults.values()) == 60
    assert len(tally.faults) == 4, "every stage was hit"


@pytest.mark.timeout(SECONDS)
async def test_thirty_kills_with_three_dits(tmp_path: Path) -> None:
    """The same with three dits, whose tasks go from one to another: all done, none twice, same frames."""
    async with chaos.timed(None) as tally:
        await chaos.kills(tally, tmp_path, 60, 30, SystemParams(dit_devices=("cpu",) * 3))
    assert tally.requests >= 60
    assert sum(tally.faults.values()) == 30


@pytest.mark.alone
@pytest.mark.timeout(SECONDS)
async def test_twenty_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP of a random stage, 20 times: each is found by its progress counter and replaced, frames are the same."""
    monkeypatch.setattr(watch, "WATCH_INTERVAL", 0.1)
    async with chaos.timed(None) as tally:
        await chaos.kills(tally, tmp_path, 40, 20, SystemParams(stage_deadline=1.0, start_deadline=20.0), stop=True)
    assert sum(tally.faults.values()) == 20


@pytest.mark.timeout(SECONDS)
async def test_twenty_kills_of_the_supervisor(tmp_path: Path) -> None:
    """SIGKILL of `engine serve` at a random moment, or when a video is put in its place, 20 times: stages leave within
    5 s, and after a restart what was accepted is done, with the same frames; each video was put in its place once."""
    async with chaos.timed(None) as tally:
        await chaos.restarts(tally, tmp_path, 20)
    assert tally.requests == 60


@pytest.mark.timeout(SECONDS)
async def test_a_thousand_requests_leave_nothing(tmp_path: Path) -> None:
    """1,000 requests and 50 restarts: descriptors, threads, children and memfds as before, resident memory within 1 KiB
    per request."""
    async with chaos.timed(None) as tally:
        await chaos.leaks(tally, tmp_path, 1000, 50, SystemParams())
    assert tally.requests >= 1000 + 300, "and a warm-up"
    assert sum(tally.faults.values()) == 50


# The detectors, on what they must find.


async def test_a_wrong_result_is_found(tmp_path: Path) -> None:
    """A golden hash that belongs to another kind of request: the comparison fails and says which request."""
    async with chaos.timed(7) as tally, Supervisor(SystemParams(placement="fused")) as supervisor:
        requests = chaos.Load(supervisor, tmp_path, tally)
        await requests.calm()
        requests.golden.reverse()
        with pytest.raises(chaos.Broken, match="of kind 0 gave"):
            await requests.one(0, tmp_path / "v.mp4")


async def test_an_engine_that_is_stuck_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done by a process that is stopped: as long as that is borne, and no longer."""
    monkeypatch.setattr(load, "PATIENCE", 0.5)
    async with chaos.timed(7) as tally, Supervisor(SystemParams(placement="fused")) as supervisor:
        await supervisor.ready()
        pid = chaos.pid_of(supervisor, "dit")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(chaos.Broken, match="0 requests are done, none for"):
            await chaos.Load(supervisor, tmp_path, tally).one(0, tmp_path / "v.mp4")


def test_leaks_are_found() -> None:
    """A descriptor, a memfd, a thread and 64 MiB that stay: the footprint has grown by each."""
    before = chaos.Footprint.of_this_process()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    read, write = os.pipe()
    memfd = os.memfd_create("leak")
    ballast = bytearray(os.urandom(1)) * (64 << 20)
    try:
        after = chaos.Footprint.of_this_process()
        assert before.grown(after) == {"fds": 3, "threads": 1, "memfds": 1}
        assert after.resident - before.resident > 60 << 20
    finally:
        del ballast
        stop.set()
        thread.join()
        for fd in (read, write, memfd):
            os.close(fd)


def test_growth_is_found() -> None:
    """A descriptor more, or 1.5 KiB per request; half a KiB is borne."""
    before = chaos.Footprint(fds=40, threads=5, children=5, memfds=20, resident=50 << 20)
    chaos.check_growth("it", before, dataclasses.replace(before, resident=before.resident + 512 * 1000), 1000)
    with pytest.raises(chaos.Broken, match=r"holds more: \{'fds': 1\}"):
        chaos.check_growth("it", before, dataclasses.replace(before, fds=41), 1000)
    with pytest.raises(chaos.Broken, match="grew by 1536 bytes per request"):
        chaos.check_growth("it", before, dataclasses.replace(before, resident=before.resident + 1536 * 1000), 1000)


def test_a_request_that_runs_twice_is_found() -> None:
    """One that had ended is taken up at the next start, or one that is taken up ends twice, or not at all."""
    chaos.check_taken_up({"b", "c"}, {"a", "b", "c"}, 2)
    with pytest.raises(chaos.Broken, match="1 requests that had ended were taken up again"):
        chaos.check_taken_up({"b", "z"}, {"a", "b", "c"}, 2)
    for finished in (1, 3):
        with pytest.raises(chaos.Broken, match=f"2 requests were taken up, {finished} finished"):
            chaos.check_taken_up({"b", "c"}, {"a", "b", "c"}, finished)


def test_a_video_that_is_written_twice_is_found(tmp_path: Path) -> None:
    """Or not at all, or under another name only."""
    with Placements(tmp_path) as placements:
        for name in ("once", "twice", "twice"):
            (tmp_path / ".part").touch()
            (tmp_path / ".part").rename(tmp_path / name)
        placements.check_once({"once"})
        with pytest.raises(chaos.Broken, match=r"expected once: \{'twice': 2\}"):
            placements.check_once({"once", "twice"})
        with pytest.raises(chaos.Broken, match=r"expected once: \{'never': 0\}"):
            placements.check_once({"once", "never"})


async def test_a_stage_that_outlives_its_supervisor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, which stays."""
    monkeypatch.setattr(chaos, "LEAVE", 0.2)
    with pytest.raises(chaos.Broken, match=r"outlive their supervisor"):
        await chaos._gone([os.getpid()], "cpu", 0)


async def test_a_request_too_many_or_too_few_is_found(tmp_path: Path) -> None:
    """One was done: neither none nor two."""
    async with Supervisor(SystemParams(placement="fused")) as supervisor:
        await supervisor.generate(load.ask(0, tmp_path / "v.mp4", tmp_path))
        chaos.check_ends(supervisor.status(), 1)
        for expected in (0, 2):
            with pytest.raises(chaos.Broken, match=f"1 finished, 0 failed, 0 unfinished; expected {expected}"):
                chaos.check_ends(supervisor.status(), expected)


def test_what_is_left_in_the_directory_is_found(tmp_path: Path) -> None:
    """A partial file that nobody removed."""
    (tmp_path / ".v.mp4.1234.part").touch()
    with pytest.raises(chaos.Broken, match="left in the output directory"):
        chaos.nothing_left(tmp_path, chaos.Footprint.of_this_process())
