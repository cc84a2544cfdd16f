"""Faults on a running engine with the model that ships, and the proof that they do not show in any result.

    python -m tools.chaos kills --kills 1000 --requests 2000       # SIGKILL of random stages at random moments
    python -m tools.chaos kills --dits 3                           # the same with three dits
    python -m tools.chaos kills --gpus 2                           # with a dit on each of two GPUs
    python -m tools.chaos stops --stops 100                        # SIGSTOP: stages that hang
    python -m tools.chaos restarts --kills 200                     # SIGKILL of the supervisor
    python -m tools.chaos leaks --requests 10000 --kills 500       # what is left after many requests and restarts
    python -m tools.chaos overload --minutes 10                    # ten times the load that the engine can take
    python -m tools.chaos soak --minutes 60                        # clients that die
    python -m tools.chaos reloads --reloads 60 --requests 300      # weights change under load

Each prints its seed and what it did; with `--seed` the same faults are drawn again (when they hit is the machine's).
Any difference from the undisturbed result, any request lost or done twice, anything left behind is a `Broken`, and exit
status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from engine import AsyncClient, Supervisor, SystemParams, UserParams
from engine.devices import resolve_device
from ipc.messages.names import Seat
from tools.full_size_setup import gpu_memory_used
from tools.load import (
    CLIENTS,
    KINDS,
    PATIENCE,
    Broken,
    Footprint,
    Load,
    Server,
    Tally,
    ask,
    digest,
    listening,
    nothing_left,
    timed,
)
from tools.overload import check_ends, overload
from tools.placements import Placements
from tools.reloads import reloads
from tools.soak import soak

MOST_LEFT = 2 << 20
"""Bytes of GPU memory that may be in use more than before the engine was started."""
LEAVE = 5.0
"""Seconds that the stages may outlive their supervisor."""
SLOPE = 1024
"""Bytes per request that resident memory may grow by."""


async def kills(
    tally: Tally, folder: Path, requests: int, count: int, params: SystemParams, stop: bool = False
) -> None:
    """`count` SIGKILLs (or SIGSTOPs) of random stages at random moments, spread over `requests` requests."""
    dice = random.Random(tally.seed)
    resolve_device("auto")  # the driver's management library keeps what it opens the first time
    before = Footprint.of_this_process()
    async with Supervisor(params) as supervisor:
        load = Load(supervisor, folder, tally)
        await load.calm()
        striking = asyncio.create_task(_strike(supervisor, load, tally, dice, requests, count, stop))
        await load.requests(requests, striking)
        await striking
        await _settled(supervisor)
        status = supervisor.status()
        check_ends(status, load.done + len(KINDS))
        tally.notes.append("restarts: " + ", ".join(f"{s.name} {s.restarts}" for s in status.stages))
    nothing_left(folder, before)


async def _strike(
    supervisor: Supervisor, load: Load, tally: Tally, dice: random.Random, requests: int, count: int, stop: bool
) -> None:
    """One fault after another, each when its share of the requests is done, and a random moment later."""
    seats = seats_of(supervisor)
    for number in range(count):
        stage, moment = dice.choice(seats), dice.uniform(0, 0.4)
        await load.have_done(number * requests // count)
        await asyncio.sleep(moment)
        pid = await _hit(supervisor, stage, signal.SIGSTOP if stop else signal.SIGKILL, tally)
        if stop:
            await _replaced(supervisor, stage, pid)


async def _hit(supervisor: Supervisor, stage: Seat, sent: signal.Signals, tally: Tally) -> int:
    """Send a signal to the process of a stage, as soon as it has one; its pid."""
    deadline = time.monotonic() + PATIENCE
    while True:
        if (pid := pid_of(supervisor, stage)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
                tally.faults[f"{sent.name} of {stage}"] += 1
                return pid
        if time.monotonic() > deadline:
            raise Broken(f"the {stage} has had no process for {PATIENCE:.0f} s")
        await asyncio.sleep(0.01)


async def _replaced(supervisor: Supervisor, stage: Seat, pid: int) -> None:
    """A stopped stage is found as soon as it has something to do; requests go on all the time."""
    deadline = time.monotonic() + PATIENCE
    while pid_of(supervisor, stage) == pid:
        if time.monotonic() > deadline:
            raise Broken(f"the stopped {stage} was not replaced within {PATIENCE:.0f} s")
        await asyncio.sleep(0.05)


def seats_of(supervisor: Supervisor) -> list[Seat]:
    return [stage.name for stage in supervisor.status().stages]


def pid_of(supervisor: Supervisor, stage: Seat) -> int | None:
    return next(s.pid for s in supervisor.status().stages if s.name == stage)


async def _settled(supervisor: Supervisor) -> None:
    """Every slot is given back and all accounts are in order."""
    deadline = time.monotonic() + PATIENCE
    while problems := supervisor.check_integrity() or [q.name for q in supervisor.status().queues if q.depth]:
        if time.monotonic() > deadline:
            raise Broken(f"after all requests: {problems}")
        await asyncio.sleep(0.05)


# What is left behind.


async def leaks(tally: Tally, folder: Path, requests: int, count: int, params: SystemParams) -> None:
    """Many requests and restarts on one supervisor: descriptors, threads, children and memfds end as they were after a
    warm-up, and resident memory grows by less than 1 KiB per request."""
    dice = random.Random(tally.seed)
    small = {"prompt": "a circle", "height": 32, "width": 32, "num_frames": 1, "steps": 1}
    async with Supervisor(params) as supervisor:

        async def batch(name: str, size: int) -> None:
            async def client(numbers: Iterator[int]) -> None:
                for number in numbers:
                    path = folder / f"{name}-{number}.mp4"
                    await asyncio.wait_for(
                        supervisor.generate(UserParams(seed=number, output=str(path), **small)), PATIENCE
                    )
                    path.unlink()
                    tally.requests += 1

            numbers = iter(range(size))
            await asyncio.gather(*(client(numbers) for _ in range(CLIENTS)))

        await batch("warm", max(300, requests // 10))
        await _fill_the_thread_pool()
        await _settled(supervisor)
        start, forks = Footprint.of_this_process(), forks_of(supervisor)
        for number in range(count):
            await _hit(supervisor, dice.choice(seats_of(supervisor)), signal.SIGKILL, tally)
            await batch(str(number), requests // count)
        await supervisor.ready()
        await _settled(supervisor)
        end, forks_end = Footprint.of_this_process(), forks_of(supervisor)
        restarted = sum(stage.restarts for stage in supervisor.status().stages)
    if restarted < count:
        raise Broken(f"{restarted} restarts, expected {count}")
    check_growth("the supervisor", start, end, requests)
    if forks is not None and forks_end is not None:
        check_growth("what stages are forked from", forks, forks_end, requests)
    slope = (end.resident - start.resident) / requests
    tally.notes.append(f"{restarted} restarts; resident memory of the supervisor: {slope:+.0f} bytes per request")


def forks_of(supervisor: Supervisor) -> Footprint | None:
    """Of the process that stages are forked from, where there is one."""
    pid = supervisor.status().forks_pid
    return None if pid is None else Footprint.of(pid)


def check_growth(who: str, start: Footprint, end: Footprint, requests: int) -> None:
    """After so many requests a process holds what it held, and at most `SLOPE` bytes more for each."""
    if grown := start.grown(end):
        raise Broken(f"after {requests} requests {who} holds more: {grown}")
    slope = (end.resident - start.resident) / requests
    if slope > SLOPE:
        raise Broken(f"resident memory of {who} grew by {slope:.0f} bytes per request, expected at most {SLOPE}")


async def _fill_the_thread_pool() -> None:
    """The host's pool starts its threads as they are needed: have all of them started."""
    size = min(32, (os.cpu_count() or 1) + 4)
    barrier = threading.Barrier(size)
    await asyncio.gather(*(asyncio.to_thread(barrier.wait) for _ in range(size)))


# The supervisor.


async def restarts(tally: Tally, folder: Path, count: int) -> None:
    """SIGKILL of the supervisor at a random moment, or just when a video is put in its place, `count` times: its stages
    leave, and with them the GPU memory, and the next one does what was accepted and is not done; each video is put in
    its place once."""
    dice = random.Random(tally.seed)
    device = resolve_device("auto")
    unused = gpu_memory_used(device)
    videos = folder / "videos"
    videos.mkdir()
    server = Server(folder)
    server.start()
    client = AsyncClient(str(server.socket))
    await listening(client)
    load = Load(client, videos, tally)
    await load.calm()
    slowest, between = 0.0, 0
    with Placements(videos) as placements:
        for number in range(count):
            accepted: dict[str, tuple[int, Path]] = {}
            for kind in dice.sample(range(len(KINDS)), 3):
                path = videos / f"{number}-{kind}.mp4"
                accepted[(await client.submit(ask(kind, path, load.source))).id] = kind, path
            names = {path.name for _, path in accepted.values()}
            await _moment(dice, placements, names)
            orphans = server.kill()
            tally.faults["SIGKILL of the supervisor"] += 1
            slowest = max(slowest, await _gone(orphans, device, unused))
            placed = names & placements.times().keys()
            unheard = journalled(folder / "state") & accepted.keys()
            between += sum(accepted[identity][1].name in placed for identity in unheard)
            server.start()
            await listening(client)
            await _finished(client)
            ran = {span.task for span in (await client.trace()).spans}
            check_taken_up(ran, unheard, (await client.status()).finished)
            for identity, (kind, path) in accepted.items():
                if (await client.result(identity)).metadata["task"] != identity:
                    raise Broken(f"{identity} was done, it is said, with the metadata of another request")
                if (got := digest(path)) != load.golden[kind]:
                    raise Broken(f"{path.name} gave {got[:12]}, undisturbed it gives {load.golden[kind][:12]}")
                path.unlink()
                tally.requests += 1
            placements.check_once(names)
            if rest := [p.name for p in videos.iterdir() if not p.name.startswith("calm-")]:
                raise Broken(f"left in the output directory: {rest}")
    await server.stop()
    tally.notes += [
        f"stages left {slowest:.2f} s after their supervisor at the latest",
        f"each video was put in its place once; {between} were there before the journal had that",
    ]


async def _moment(dice: random.Random, placements: Placements, names: set[str]) -> None:
    """Wait for any moment, or for the few milliseconds in which a video is in its place and the journal does not have
    that yet."""
    if dice.random() < 0.5:
        await asyncio.sleep(dice.uniform(0, 3.0))
    else:
        await placements.until(names, dice.randint(1, len(names)))
        await asyncio.sleep(dice.uniform(0, 0.003))


def journalled(directory: Path) -> set[str]:
    """Ids of the requests that have not ended, by the journal of a dead engine, which is left as it is."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        with contextlib.closing(sqlite3.connect(Path(copy, "journal.sqlite3"))) as journal:
            return {identity for (identity,) in journal.execute("SELECT id FROM tasks")}


def check_taken_up(ran: set[str], unfinished: set[str], finished: int) -> None:
    """A supervisor has computed what the journal had as not ended, no more than that, and each once."""
    if strangers := ran - unfinished:
        raise Broken(f"{len(strangers)} requests that had ended were taken up again")
    if finished != len(ran):
        raise Broken(f"{len(ran)} requests were taken up, {finished} finished")


async def _finished(client: AsyncClient) -> None:
    """All tasks of the journal have ended well."""
    deadline = time.monotonic() + PATIENCE
    while tasks := await client.tasks():
        if failed := [task for task in tasks if task.state in ("failed", "cancelled")]:
            raise Broken(f"{failed[0].id} {failed[0].state}: {failed[0].error}")
        if all(task.state == "done" for task in tasks):
            return
        if time.monotonic() > deadline:
            raise Broken(f"not finished: {[(task.state, task.phase) for task in tasks]}")
        await asyncio.sleep(0.05)


async def _gone(pids: list[int], device: str, unused: int) -> float:
    """Seconds until none of these processes is left, and no more GPU memory in use than `unused` bytes and a little."""
    began = time.monotonic()
    while any(_alive(pid) for pid in pids) or gpu_memory_used(device) > unused + MOST_LEFT:
        if time.monotonic() - began > LEAVE:
            raise Broken(f"stages, or their GPU memory, outlive their supervisor by {LEAVE:.0f} s")
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def _alive(pid: int) -> bool:
    """The process runs; one that has ended and waits to be reaped does not count."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Command line.


async def run(arguments: argparse.Namespace) -> Tally:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with timed(arguments.seed) as tally:
            match arguments.what:
                case "kills":
                    params = SystemParams(dit_devices=dit_devices(arguments.dits, arguments.gpus))
                    await kills(tally, folder, arguments.requests, arguments.kills, params)
                case "stops":
                    params = SystemParams(stage_deadline=2.0, start_deadline=20.0)
                    await kills(tally, folder, 2 * arguments.stops, arguments.stops, params, stop=True)
                case "restarts":
                    await restarts(tally, folder, arguments.kills)
                case "leaks":
                    await leaks(tally, folder, arguments.requests, arguments.kills, SystemParams())
                case "overload":
                    await overload(tally, folder, 60 * arguments.minutes, 16)
                case "soak":
                    await soak(tally, folder, 60 * arguments.minutes)
                case "reloads":
                    await reloads(tally, folder, arguments.requests, arguments.reloads, arguments.worst)
    return tally


def dit_devices(dits: int, gpus: int) -> tuple[str, ...]:
    """Empty: one, wherever the engine puts it."""
    if gpus:
        return tuple(f"cuda:{number}" for number in range(gpus))
    return ("cpu",) * dits if dits > 1 else ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "stops", "restarts", "leaks", "overload", "soak", "reloads"))
    parser.add_argument("--seed", type=int, help="draw the same faults again")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--reloads", type=int, default=60)
    parser.add_argument("--worst", type=float, default=1.15, help="of p99 with reloads, times that without")
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--dits", type=int, default=1, help="for kills: so many, on a CPU")
    parser.add_argument("--gpus", type=int, default=0, help="for kills: a dit on each of so many GPUs")
    parser.add_argument("--minutes", type=float, default=1.0, help="of overload and soak")
    arguments = parser.parse_args()
    try:
        tally = asyncio.run(run(arguments))
    except Broken:
        return 1
    print(f"{arguments.what}: {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
