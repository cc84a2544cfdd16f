"""Time of handing a tensor to another process and getting one back: TensorQueue against torch's queues.

    python tools/bench_handoff.py --out docs/results/handoff-cpu.txt
    python tools/bench_handoff.py --device cuda --sizes "8 MB" --rounds 500 --out docs/results/handoff-gpu.txt

A round trip: this process hands over a tensor that it has just computed, the other process takes it, looks at it and
hands over one that it has just computed, this process takes that and looks at it. Both tensors are new in every round,
as a stage's results are, because a torch queue copies a tensor only the first time. Making them is not timed, and
both processes are ready before the clock starts. Transports take turns round by round.

"TensorQueue" copies the tensor into a slot; "in place" computes it in the slot, so that only a header is handed over.

"looks at it": `touch` reads three elements that name the round; `read` adds up all elements, which is what a consumer
will do next anyway, and where fresh mappings pay their page faults. On a GPU, where either would be a kernel and a wait
for it, `take` has the tensor and does not look. After the clock has stopped, both sides compare every element with what
was sent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import msgspec
import torch
import torch.multiprocessing as mp

from ipc.channel import Channel, close_fds
from ipc.device_memory import DeviceMemory
from ipc.messages.memory import QueueSpec
from ipc.payload import DeviceFd, payload_bytes
from ipc.tensor_queue import Slot, TensorQueue
from ipc.tensors import put_tensor, room_tensor, slot_tensor
from tools.machine import cpu_name

SIZES = {"64 KB": 64 * 1024, "1 MB": 1024**2, "8 MB": 8 * 1024**2, "16 MB": 16 * 1024**2}
WARMUP_ROUNDS = 10
WAIT = 60.0
TASK = "0" * 32

Name = Literal["TensorQueue", "TensorQueue in place", "torch Queue", "torch SimpleQueue"]
Look = Literal["touch", "read", "take"]
TRANSPORTS: tuple[Name, ...] = get_args(Name)
LOOKS: dict[str, tuple[Look, ...]] = {"cpu": ("touch", "read"), "cuda": ("take",)}


class Round(NamedTuple):
    """One round trip. `number` is different for every round and goes into the tensors."""

    transport: Name
    look: Look
    nbytes: int
    number: int
    device: str


class Transport(Protocol):
    """One process's end of a pair of queues, one per direction."""

    def make(self, round_: Round, sender: int) -> torch.Tensor:
        """Compute the tensor that `give` will hand over."""

    def give(self, tensor: torch.Tensor, number: int) -> None: ...

    def get(self, number: int) -> torch.Tensor: ...

    def done(self) -> None:
        """What `get` returned is not needed any more."""


class Simple(Protocol):
    """What torch's two kinds of queue have in common."""

    def put(self, item: torch.Tensor, /) -> None: ...

    def get(self) -> torch.Tensor: ...


class TorchQueues:
    def __init__(self, out: Simple, back: Simple) -> None:
        self._out = out
        self._back = back

    def make(self, round_: Round, sender: int) -> torch.Tensor:
        return fresh(round_, sender)

    def give(self, tensor: torch.Tensor, number: int) -> None:
        self._out.put(tensor)

    def get(self, number: int) -> torch.Tensor:
        return self._back.get()

    def done(self) -> None:
        pass


class TensorQueues:
    def __init__(self, out: TensorQueue, back: TensorQueue) -> None:
        self._out = out
        self._back = back
        self._slot: Slot | None = None

    def make(self, round_: Round, sender: int) -> torch.Tensor:
        return fresh(round_, sender)

    def give(self, tensor: torch.Tensor, number: int) -> None:
        put_tensor(self._out, TASK, number, tensor, WAIT)

    def get(self, number: int) -> torch.Tensor:
        self._slot = self._back.take(TASK, number, WAIT)
        return slot_tensor(self._slot)

    def done(self) -> None:
        assert self._slot is not None
        self._slot.release()


class InPlace(TensorQueues):
    """The tensor is computed where the other process will read it."""

    def make(self, round_: Round, sender: int) -> torch.Tensor:
        self._room = contextlib.ExitStack()
        shape = (round_.nbytes // 4,)
        target = self._room.enter_context(room_tensor(self._out, TASK, round_.number, torch.float32, shape, WAIT))
        return target.copy_(fresh(round_, sender))

    def give(self, tensor: torch.Tensor, number: int) -> None:
        self._room.close()


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    out: QueueSpec
    back: QueueSpec


def fresh(round_: Round, sender: int) -> torch.Tensor:
    """A new float32 tensor whose elements name the round and the sender."""
    tensor = torch.arange(round_.nbytes // 4, dtype=torch.float32, device=round_.device)
    tensor.add_(2 * round_.number + sender)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return tensor


def look(tensor: torch.Tensor, round_: Round, sender: int) -> None:
    """What the receiver does within the timed part."""
    if round_.look == "take":
        return
    first = 2 * round_.number + sender
    last = len(tensor) - 1
    assert (tensor[0].item(), tensor[last // 2].item(), tensor[last].item()) == (first, first + last // 2, first + last)
    if round_.look == "read":
        assert tensor.sum().item() > 0


def play(transport: Transport, round_: Round, control: Connection, leader: bool) -> float:
    """One round trip on this side; seconds that it took the leader."""
    mine, theirs = (0, 1) if leader else (1, 0)
    tensor, expected = transport.make(round_, mine), fresh(round_, theirs)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    control.send("ready")
    control.recv()
    start = time.perf_counter()
    if leader:
        transport.give(tensor, round_.number)
    got = transport.get(round_.number)
    look(got, round_, theirs)
    if not leader:
        transport.give(tensor, round_.number)
    seconds = time.perf_counter() - start
    assert torch.equal(got, expected)
    del got
    transport.done()
    return seconds


def follow(
    control: Connection, channel_end: socket.socket, queues: dict[Name, tuple[Simple, Simple]], threads: int
) -> None:
    """The other process: plays the rounds that it is told of, until it is told None."""
    torch.set_num_threads(threads)
    with Channel[Attach](channel_end, Attach) as channel:
        specs, fds = channel.receive(WAIT)
    half = len(fds) // 2
    with (
        TensorQueue.attach(specs.out, fds[:half], "consumer", 1) as incoming,
        TensorQueue.attach(specs.back, fds[half:], "producer", 1) as outgoing,
    ):
        close_fds(fds)
        transports: dict[Name, Transport] = {name: TorchQueues(back, out) for name, (out, back) in queues.items()}
        transports["TensorQueue"] = TensorQueues(outgoing, incoming)
        transports["TensorQueue in place"] = InPlace(outgoing, incoming)
        while (round_ := control.recv()) is not None:
            play(transports[round_.transport], round_, control, leader=False)


def on_device(device: str, largest: int) -> DeviceFd | None:
    """GPU memory for a queue of two slots, made here; None for host memory."""
    if device == "cpu":
        return None
    with DeviceMemory.create(0, payload_bytes(2, largest)) as memory:
        return DeviceFd(0, os.dup(memory.fd))


def measure(rounds: int, sizes: dict[str, int], threads: int, device: str) -> dict[tuple[str, Look, Name], list[float]]:
    """Seconds of every timed round trip, by size, look and transport."""
    torch.set_num_threads(threads)
    context = mp.get_context("spawn")
    queues: dict[Name, tuple[Simple, Simple]] = {
        "torch Queue": (context.Queue(), context.Queue()),
        "torch SimpleQueue": (context.SimpleQueue(), context.SimpleQueue()),
    }
    control, theirs = context.Pipe()
    ours, channel_end = Channel.pair()
    largest = max(sizes.values())
    with (
        TensorQueue.create("out", 2, largest, on=on_device(device, largest)) as out,
        TensorQueue.create("back", 2, largest, on=on_device(device, largest)) as back,
        TensorQueue.attach(out.spec, out.fds, "producer", 1) as outgoing,
        TensorQueue.attach(back.spec, back.fds, "consumer", 1) as incoming,
        Channel[Attach](ours, Attach) as channel,
    ):
        process = context.Process(target=follow, args=(theirs, channel_end, queues, threads), daemon=True)
        process.start()
        channel.send(Attach(out.spec, back.spec), [*out.fds, *back.fds], timeout=WAIT)
        transports: dict[Name, Transport] = {name: TorchQueues(*pair) for name, pair in queues.items()}
        transports["TensorQueue"] = TensorQueues(outgoing, incoming)
        transports["TensorQueue in place"] = InPlace(outgoing, incoming)
        times = run_rounds(rounds, sizes, device, lambda round_: lead(transports[round_.transport], round_, control))
        control.send(None)
        process.join(WAIT)
    return times


def lead(transport: Transport, round_: Round, control: Connection) -> float:
    control.send(round_)
    return play(transport, round_, control, leader=True)


def run_rounds(
    rounds: int, sizes: dict[str, int], device: str, trip: Callable[[Round], float]
) -> dict[tuple[str, Look, Name], list[float]]:
    times: dict[tuple[str, Look, Name], list[float]] = {
        (size, mode, name): [] for size in sizes for mode in LOOKS[device] for name in TRANSPORTS
    }
    number = 0
    for size, nbytes in sizes.items():
        for mode in LOOKS[device]:
            for turn in range(WARMUP_ROUNDS + rounds):
                for name in TRANSPORTS:
                    number += 1
                    seconds = trip(Round(name, mode, nbytes, number, device))
                    if turn >= WARMUP_ROUNDS:
                        times[size, mode, name].append(seconds)
    return times


def report(
    times: dict[tuple[str, Look, Name], list[float]], sizes: dict[str, int], args: argparse.Namespace, load: float
) -> str:
    """The table. GB/s (1e9 bytes) counts the bytes of both directions; "x" is TensorQueue's advantage at the median."""
    lines = [
        f"{device_name(args.device)}, {os.cpu_count()} cores, Linux {platform.release()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s) a process",
        f"{args.rounds} round trips each, after {WARMUP_ROUNDS} to warm up, transports taking turns; "
        f"load average before: {load:.1f}",
        "",
        f"{'tensor':<7} {'look':<6} {'transport':<20} {'median ms':>10} {'p95 ms':>9} {'GB/s':>7} {'x':>6}",
    ]
    for (size, mode, name), seconds in times.items():
        median = statistics.median(seconds)
        p95 = statistics.quantiles(seconds, n=20)[-1]
        speed = 2 * sizes[size] / median / 1e9
        ratio = median / statistics.median(times[size, mode, "TensorQueue"])
        times_as_fast = "" if name == "TensorQueue" else f"{ratio:.2f}"
        lines.append(
            f"{size:<7} {mode:<6} {name:<20} {median * 1e3:>10.3f} {p95 * 1e3:>9.3f} {speed:>7.2f} {times_as_fast:>6}"
        )
    return "\n".join(lines) + "\n"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return cpu_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="timed round trips per size and transport (at least 2)")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="tensor sizes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads in each process")
    parser.add_argument("--device", choices=list(LOOKS), default="cpu", help="where the tensors are")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    sizes = {name: SIZES[name] for name in args.sizes}
    load = os.getloadavg()[0]
    table = report(measure(args.rounds, sizes, args.threads, args.device), sizes, args, load)
    print(table, end="")
    if args.out is not None:
        command = (
            f"python tools/bench_handoff.py --device {args.device} --rounds {args.rounds} --threads {args.threads}"
        )
        args.out.write_text(f"$ {command}\n{table}")


if __name__ == "__main__":
    main()
