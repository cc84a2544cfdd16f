"""What a well-behaved client notices of others that stop reading, flood, send garbage and hang up; what these cost.

    python -m tools.neighbours --rounds 8          # raw output: docs/results/neighbours-cpu.txt
    python -m tools.neighbours --singly            # beside one of them at a time
    python -m tools.neighbours --hostile SOCKET    # the hostile clients alone, until killed; started by the above

Latency: turns of a few seconds, one after the other, each `rounds` times: nobody else; the hostile clients at *another*
engine of the machine; the same clients at this one. They take processor time wherever they are, on a small machine from
the well-behaved clients too: the second kind of turn shows how much, and the third against the second is the engine's.

Memory: many clients that ask for the longest list there is and read nothing; the growth of the supervisor's resident
memory per client, and when each is dropped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from engine import AsyncClient, UserParams
from engine.connection import AsyncConnection, Deadlines
from engine.resident import resident_bytes
from engine.session import Limits
from engine.tasks import KEPT_FINISHED
from ipc.frames import encode_frame
from ipc.messages.client import PROTOCOL_VERSION, Cancel, ClientMessage, GetStatus, Hello, ListTasks, Submit
from ipc.messages.server import Accepted, Ok, ServerMessage, Status, TaskList
from tools.fuzz import chance_of, live_conversation
from tools.load import Broken, serving
from tools.machine import host_line

ROOT = Path(__file__).resolve().parent.parent
PACE = 0.04
"""Seconds between two questions of a well-behaved client: below the rate at which the engine begins to slow it down."""
CLIENTS = 3
"""Well-behaved ones, each on a connection of its own."""
CLIENT_MEMORY = 64 << 10
"""Bytes per client that does not read, on top of the one frame that is being sent to it."""
SLACK = 5.0
"""Seconds after its deadline at which a client that does not read is gone, on a busy machine."""
BURST_SECONDS = 1.0
"""At least, of a connection that asks all it may at once."""
ANSWER = 1.0
"""Seconds: hundreds of times what an idle engine takes, a tenth of what a client may leave its answers unread for."""
HELLO = encode_frame(Hello(ref=0, version=PROTOCOL_VERSION, client="neighbour"))
STATUS, LIST = encode_frame(GetStatus(ref=1)), encode_frame(ListTasks(ref=1))

R = TypeVar("R", bound=ServerMessage)
TURNS = ("alone", "elsewhere", "beside")


# The hostile clients, each a loop over one connection after another.


def deaf(path: Path, dice: random.Random) -> Iterator[None]:
    """Asks without end and reads nothing, until it is cut off."""
    with connected(path) as connection:
        while True:
            with contextlib.suppress(BlockingIOError):
                connection.send(LIST * 100)
            yield


def flood(path: Path, dice: random.Random) -> Iterator[None]:
    """Asks as fast as it is answered, and reads."""
    with connected(path) as connection:
        while True:
            with contextlib.suppress(BlockingIOError):
                connection.send(STATUS * 100)
            with contextlib.suppress(BlockingIOError):
                while connection.recv(1 << 16):
                    pass
            yield


def garbage(path: Path, dice: random.Random) -> Iterator[None]:
    """Damaged frames and wrong requests, then a new connection."""
    with connected(path) as connection, contextlib.suppress(BlockingIOError):
        connection.send(b"".join(live_conversation(chance_of(dice.getrandbits(32), 0))))
        yield


def hang_up(path: Path, dice: random.Random) -> Iterator[None]:
    """A few questions and half of one, then gone without reading the answers."""
    with connected(path) as connection, contextlib.suppress(BlockingIOError):
        connection.send(STATUS * dice.randrange(40) + LIST[: dice.randrange(len(LIST))])
        yield


def burst(path: Path, dice: random.Random) -> Iterator[None]:
    """As many questions as are answered at once, and when they are, a new connection."""
    with connected(path) as connection, contextlib.suppress(BlockingIOError):
        connection.send(STATUS * Limits().burst)
        until = time.monotonic() + BURST_SECONDS * (1 + dice.random())
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                while connection.recv(1 << 16):
                    pass
            yield


HOSTILE: dict[Callable[[Path, random.Random], Iterator[None]], int] = {
    deaf: 8, flood: 4, garbage: 2, hang_up: 2, burst: 16,
}  # fmt: skip


def connected(path: Path, wait: bool = False) -> socket.socket:
    """Greeted, and not blocking. When the backlog is full: waits, or raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(wait)
        connection.connect(os.fspath(path))
        connection.send(HELLO)
        connection.setblocking(False)
    except OSError:
        connection.close()
        raise
    return connection


Crowd = dict[str, int]
"""Hostile clients, by kind."""

CROWD: Crowd = {kind.__name__: count for kind, count in HOSTILE.items()}


def hostile(path: Path, crowd: Crowd) -> None:
    """These clients, in turn, 100 times a second each, for ever."""
    kinds = [kind for kind in HOSTILE for _ in range(crowd.get(kind.__name__, 0))]
    dice = random.Random(1)
    running = [kind(path, dice) for kind in kinds]
    while True:
        for number, kind in enumerate(kinds):
            try:
                next(running[number])
            except (StopIteration, OSError):
                running[number] = kind(path, dice)
        time.sleep(0.01)


@contextlib.contextmanager
def hostile_at(path: Path, crowd: Crowd = CROWD) -> Iterator[None]:
    """The hostile clients in a process of their own, at work."""
    command = [sys.executable, "-m", "tools.neighbours", "--hostile", str(path)]
    command += [f"--crowd={kind}:{count}" for kind, count in crowd.items()]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            time.sleep(1.0)  # it imports, and fills the sockets
            if process.poll() is not None:
                raise Broken("the hostile clients left")
            yield
        finally:
            process.kill()


# The well-behaved ones.


Samples = dict[str, list[float]]
"""Seconds per round trip, by question."""


async def well_behaved(client: AsyncClient, folder: Path, seconds: float) -> Samples:
    """Round trips of `CLIENTS` clients for so long."""
    samples: Samples = defaultdict(list)
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(_ask_on(client, folder / f"v{number}.mp4", seconds, samples))
    return samples


async def _ask_on(client: AsyncClient, output: Path, seconds: float, samples: Samples) -> None:
    """Status, list, submit and cancel in turn, and every one is answered."""
    params = msgspec.Raw(msgspec.msgpack.encode(UserParams(prompt="a circle", output=str(output))))
    async with AsyncConnection(client.socket, Deadlines()) as connection:

        async def timed(name: str, message: ClientMessage, expected: type[R]) -> R:
            began = time.perf_counter()
            reply = await connection.ask(message, expected)
            samples[name].append(time.perf_counter() - began)
            await asyncio.sleep(PACE)
            return reply

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(3):
                await timed("status", GetStatus(ref=0), Status)
                await timed("list", ListTasks(ref=0), TaskList)
            accepted = await timed("submit", Submit(ref=0, params=params, subscribe=False), Accepted)
            await timed("cancel", Cancel(ref=0, id=accepted.id), Ok)


async def fill(client: AsyncClient, folder: Path) -> None:
    """As many ended tasks as the engine remembers, so that its list is as long at the beginning as at the end."""
    for _ in range(KEPT_FINISHED):
        accepted = await client.submit(UserParams(prompt="p" * 200, output=str(folder / "fill.mp4")))
        await client.cancel(accepted.id)


async def take_turns(
    client: AsyncClient, other: AsyncClient, folder: Path, rounds: int, seconds: float, crowd: Crowd = CROWD
) -> dict[str, Samples]:
    """The samples of each kind of turn."""
    found: dict[str, Samples] = {turn: defaultdict(list) for turn in TURNS}
    for number in range(rounds):
        for turn in TURNS[number % 3 :] + TURNS[: number % 3]:
            with contextlib.ExitStack() as stack:
                if turn != "alone":
                    stack.enter_context(hostile_at((other if turn == "elsewhere" else client).socket, crowd))
                for name, samples in (await well_behaved(client, folder, seconds)).items():
                    found[turn][name] += samples
    return found


def p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[98]


def check_answers(samples: Samples) -> None:
    """Nobody waits for what a hostile client does, or does not do. This finds waits, not a tenth more: on a machine
    whose cores the hostile clients use as well, that is for the table to show."""
    for name in ("status", "list"):
        if (seconds := p99(samples[name])) > ANSWER:
            raise Broken(f"p99 of {name} beside hostile clients is {seconds:.2f} s, the bound is {ANSWER}")


def table(found: dict[str, Samples]) -> list[str]:
    """Milliseconds, and ratios."""
    lines = [f"{'':8}{'':6}{'alone':>9}{'elsewhere':>11}{'beside':>9}{'beside/alone':>14}{'beside/elsewhere':>18}"]
    for name in found["alone"]:
        for what, figure in (("median", statistics.median), ("p99", p99)):
            alone, elsewhere, beside = (figure(found[turn][name]) for turn in TURNS)
            lines.append(
                f"{name:8}{what:6}{alone * 1e3:9.2f}{elsewhere * 1e3:11.2f}{beside * 1e3:9.2f}"
                f"{beside / alone:14.2f}{beside / elsewhere:18.2f}"
            )
    return lines


# Memory.


@dataclass
class Cost:
    """What clients that do not read cost the engine at `path`, whose process is `pid`."""

    bytes_each: float
    frame: int
    """Bytes of the answer that each is being sent."""
    dropped: list[float]
    """Seconds after which each was cut off."""

    def check(self, deadline: float) -> None:
        if self.bytes_each > CLIENT_MEMORY + self.frame:
            raise Broken(
                f"a client that does not read costs {self.bytes_each:,.0f} bytes; "
                f"the bound is {CLIENT_MEMORY:,} and a frame of {self.frame:,}"
            )
        if not all(deadline * 0.9 <= seconds <= deadline + SLACK for seconds in self.dropped):
            raise Broken(f"dropped after {self.dropped[0]:.1f} to {self.dropped[-1]:.1f} s, the deadline is {deadline}")

    def __str__(self) -> str:
        return (
            f"{len(self.dropped)} clients that read nothing: {self.bytes_each:,.0f} bytes each (frame {self.frame:,}), "
            f"dropped after {self.dropped[0]:.1f} to {self.dropped[-1]:.1f} s"
        )


def cost_of_deaf_clients(path: Path, pid: int, count: int, patience: float) -> Cost:
    """Blocks: `count` clients fill what there is to fill, are weighed, and wait up to `patience` seconds for their
    end."""
    frame = _length_of_list(path)
    with contextlib.ExitStack() as stack:
        before = resident_bytes(pid)
        since = {stack.enter_context(connected(path, wait=True)): time.monotonic() for _ in range(count)}
        _ask_until_full(list(since))
        began, peak = time.monotonic(), 0
        poll = select.poll()
        by_fd = {connection.fileno(): connection for connection in since}
        for fd in by_fd:
            poll.register(fd, 0)  # POLLHUP comes unasked
        dropped: list[float] = []
        while by_fd and time.monotonic() < began + patience:
            if len(by_fd) == count:
                peak = max(peak, resident_bytes(pid))
            for fd, _ in poll.poll(100):
                poll.unregister(fd)
                dropped.append(time.monotonic() - since[by_fd.pop(fd)])
    if by_fd:
        raise Broken(f"{len(by_fd)} of {count} clients that read nothing are still there after {patience:.0f} s")
    return Cost((peak - before) / count, frame, sorted(dropped))


def _length_of_list(path: Path) -> int:
    """Bytes of the answer to `list`, header and all."""
    with connected(path, wait=True) as connection:
        connection.setblocking(True)
        stream = connection.makefile("rb")
        stream.read(int.from_bytes(stream.read(4), "big"))
        connection.send(LIST)
        return 4 + len(stream.read(int.from_bytes(stream.read(4), "big")))


def _ask_until_full(connections: list[socket.socket]) -> None:
    """Ask for lists until nothing more can be sent for a second."""
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        for connection in connections:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                connection.send(LIST * 100)
                until = time.monotonic() + 1.0
        time.sleep(0.01)


# Command line.


async def run(rounds: int, seconds: float, deaf_clients: int, crowds: Sequence[Crowd]) -> list[str]:
    lines: list[str] = []
    together: dict[str, Samples] = {turn: defaultdict(list) for turn in TURNS}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        fused = ("--placement", "fused", "--device", "cpu")
        folder = Path(first)
        async with serving(folder, *fused) as client, serving(Path(second), *fused) as other:
            await fill(client, folder)
            for crowd in crowds:
                found = await take_turns(client, other, folder, rounds, seconds, crowd)
                check_answers(found["beside"])
                counts = ", ".join(f"{len(samples)} {name}" for name, samples in found["alone"].items())
                lines += [
                    f"hostile: {', '.join(f'{count} {kind}' for kind, count in crowd.items())}; {rounds} turns of "
                    f"{seconds:g} s of each kind; alone: {counts}; ms per round trip:",
                    *table(found),
                ]
                for turn, samples in found.items():
                    for name, values in samples.items():
                        together[turn][name] += values
            pid, limits = (await client.server()).pid, Limits()
            cost = await asyncio.to_thread(cost_of_deaf_clients, client.socket, pid, deaf_clients, limits.drain + 30)
    cost.check(limits.drain)
    if len(crowds) > 1:
        lines += [f"all {len(crowds)} series together:", *table(together)]
    return [*lines, str(cost)]


def read_crowd(text: str) -> tuple[str, int]:
    """KIND:COUNT."""
    kind, _, count = text.partition(":")
    if kind not in CROWD or not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND:COUNT; the kinds are {', '.join(CROWD)}")
    return kind, int(count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--deaf", type=int, default=200, help="clients that read nothing, for the memory")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--crowd", type=read_crowd, action="append", help="KIND:COUNT of hostile clients; again for each")
    who.add_argument("--singly", action="store_true", help="one hostile client at a time, of each kind in its turn")
    parser.add_argument("--hostile", type=Path, default=None)
    arguments = parser.parse_args()
    crowds = [dict(arguments.crowd) if arguments.crowd else CROWD]
    if arguments.hostile is not None:
        hostile(arguments.hostile, crowds[0])
    if arguments.singly:
        crowds = [{kind: 1} for kind in CROWD]
    print(f"$ python -m tools.neighbours {' '.join(sys.argv[1:])}")
    print(host_line())
    print(f"load average before: {os.getloadavg()[0]:.1f}", flush=True)
    try:
        print(*asyncio.run(run(arguments.rounds, arguments.seconds, arguments.deaf, crowds)), sep="\n")
    except Broken as error:
        print(f"broken: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
