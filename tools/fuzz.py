"""Frames that no client would send, for the decoder alone and for a live engine.

    python -m tools.fuzz --frames 10000000 --live 1000000       # `make chaos`: ten million, a million of them live
    python -m tools.fuzz --seed 4711 --first 12 --count 1       # one conversation again, as a failure says it

A conversation is 16 frames drawn from the seed and its number: real messages with flipped, lost, added and repeated
bytes, wrong lengths, MessagePack that means nothing; to an engine also whole ones with requests that are wrong. The
decoder may answer each with a message, with more to come, or with `ProtocolError`; the engine with a reply that can be
read, or with the end of the connection. Memory may grow by 16 MiB. Anything else is a `Violation`, which says how to
replay it.
"""

from __future__ import annotations

import argparse
import collections
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from engine.params import UserParams
from engine.resident import resident_bytes
from ipc.errors import Failure, ProtocolError
from ipc.frames import MAX_FRAME, FrameReader, encode_frame
from ipc.messages.client import AnyClientMessage, Cancel, GetStatus, Hello, ListTasks, Submit, Subscribe
from ipc.messages.server import Accepted, AnyServerMessage, Done, Failed, Progress, Refused

CONVERSATION = 16
"""Frames."""
MOST_GROWTH = 16 << 20
"""Bytes of resident memory."""
WARM_UP = 20
"""One part in so many of the conversations runs before memory is measured."""
DEADLINE = 30.0
"""Seconds after which a silent engine is taken for hung."""
EXPECTED = frozenset(
    {"protocol_error", "bad_request", "not_found", "busy", "version_mismatch", "permission_denied", "output_error"}
)
"""What an engine may refuse a damaged message with. `internal` is a defect."""

PARAMS: dict[str, Any] = {
    "prompt": "", "negative_prompt": "blurry", "steps": 20, "seed": 2**40, "guidance_scale": 5.0, "height": 96,
    "output": "/nowhere/v.mp4", "metadata_json": True, "image": None,
}  # fmt: skip
"""Refused for its prompt, whatever else becomes of it."""

CLIENT = [
    Hello(ref=1, version=1, client="engine 1"), GetStatus(ref=2), ListTasks(ref=3), Cancel(ref=4, id="0" * 32),
    Subscribe(ref=2**63 - 1, id="f" * 32), Submit(ref=-1, params=msgspec.Raw(msgspec.msgpack.encode(PARAMS))),
    Submit(ref=7, params=msgspec.Raw(msgspec.msgpack.encode([1, {"a": None}])), subscribe=False),
]  # fmt: skip
SERVER = [
    Accepted(ref=1, id="a" * 32, position=3, params=PARAMS), Done(id="b" * 32, path="/v.mp4", metadata=PARAMS),
    Progress(id="c" * 32, phase="denoise", step=3, steps=20, seconds_left=1.5),
    Refused(ref=2, error=Failure("busy", "later"), retry_after=1.0), Failed(id="d" * 32, error=Failure("x", "y")),
]  # fmt: skip
CLIENT_FRAMES, SERVER_FRAMES = ([encode_frame(message) for message in side] for side in (CLIENT, SERVER))
INTERESTING = bytes.fromhex("00 01 7f 80 8f 90 a0 c0 c1 c4 c7 d9 db dc dd de df ff")
ODD: list[Any] = [
    None, True, -1, 0, 1, 17, 2**31, 2**63, -(2**63), 0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "x",
    "\0", "..", "/", "~", "a.mp4", "../a.mp4", "/dev/null", "/proc/self/mem", "%s%n{0}", "\u202e", "y" * 20_000,
    b"", b"\xff", [], [[]], {}, {"": {}}, {1: 2}, "unipc", "euler", "cuda", "distilled",
]  # fmt: skip
"""Values for the fields of a request."""


class Violation(AssertionError):
    """Something came out that may not; the message says how to get it again."""


def chance_of(seed: int, number: int) -> Random:
    """The chance of one conversation."""
    return Random(seed << 40 | number)


def conversation(chance: Random, frames: list[bytes]) -> list[bytes]:
    return [damaged(chance, frames) for _ in range(CONVERSATION)]


def damaged(chance: Random, frames: list[bytes]) -> bytes:
    """A frame with something wrong with it, mostly behind its length, so that it is looked at."""
    kind = chance.random()
    if kind < 0.08:
        payload = nonsense(chance, 0)
        return len(payload).to_bytes(4, "big") + payload
    data = bytearray(chance.choice(frames))
    if kind < 0.14:
        length = chance.choice((0, 1, MAX_FRAME, MAX_FRAME + 1, 2**31, 2**32 - 1, chance.getrandbits(32)))
        return length.to_bytes(4, "big") + bytes(data[4:])
    body = bytearray(data[4:])
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        _damage(chance, body)
    length = len(body) if kind < 0.95 else len(data) - 4
    return length.to_bytes(4, "big") + bytes(body)


def _damage(chance: Random, body: bytearray) -> None:
    at = chance.randrange(len(body)) if body else 0
    match chance.randrange(6):
        case 0 | 1 if body:
            body[at] ^= 1 << chance.randrange(8)
        case 2 if body:
            body[at] = chance.choice(INTERESTING)
        case 3:
            del body[at : at + chance.randint(1, 8)]
        case 4:
            body[at:at] = chance.randbytes(chance.randint(1, 8))
        case _:
            body[at:at] = body[at : at + chance.randint(1, 40)]


def nonsense(chance: Random, depth: int) -> bytes:
    """MessagePack, or almost."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.randint(1, 60))
    if kind == 1:  # says that more follows than does
        return bytes((chance.choice((0xC6, 0xDB, 0xDD, 0xDF, 0xC9)),)) + chance.randbytes(4)
    if kind == 2 and not depth:  # deep
        return bytes((chance.choice((0x91, 0x81)),)) * chance.choice((10, 1000, 20_000))
    if kind in (3, 4) and depth < 4:
        keys = (b"\xa4type", b"\xa3ref", b"\xa6params", b"\xa2id", b"\xa7version", b"\xc0")
        count = chance.randint(0, 5)
        pairs = (chance.choice(keys) + nonsense(chance, depth + 1) for _ in range(count))
        return bytes((0x80 | count,)) + b"".join(pairs)
    if kind == 5 and depth < 4:
        count = chance.randint(0, 5)
        return bytes((0x90 | count,)) + b"".join(nonsense(chance, depth + 1) for _ in range(count))
    return chance.choice(
        (b"\xa6status", b"\xa6submit", b"\xa5hello", b"\x01", b"\xc0", b"\xc3", b"\xcb\x7f\xf8" + b"\0" * 6)
    )


def odd_request(chance: Random) -> bytes:
    """A whole message, with a request that is wrong in what it says."""
    fields = [*UserParams.__struct_fields__, "hieght", ""]
    params = {name: chance.choice(ODD) for name in chance.sample(fields, chance.randint(0, 8))}
    raw = msgspec.msgpack.encode(params if chance.random() < 0.9 else chance.choice(ODD))
    return encode_frame(Submit(ref=chance.getrandbits(40), params=msgspec.Raw(raw), subscribe=chance.random() < 0.5))


def live_conversation(chance: Random) -> list[bytes]:
    """As `conversation`, with more that an engine goes on after."""
    frames = []
    for _ in range(CONVERSATION):
        kind = chance.random()
        if kind < 0.6:
            frames.append(odd_request(chance))
        else:
            frames.append(chance.choice(CLIENT_FRAMES[1:]) if kind < 0.85 else damaged(chance, CLIENT_FRAMES))
    return frames


class Growth:
    """How much a process has grown since it was warm. `check` raises a `Violation` when it is too much."""

    def __init__(self, pid: int, most: int = MOST_GROWTH) -> None:
        self._pid, self._most = pid, most
        self._before: int | None = None
        self.bytes = 0

    def check(self, warm: bool) -> None:
        if not warm:
            return
        now = resident_bytes(self._pid)
        if self._before is None:
            self._before = now
        self.bytes = now - self._before
        if self.bytes > self._most:
            raise Violation(f"process {self._pid} has grown by {self.bytes >> 20} MiB; the most is {self._most >> 20}")


Reader = Callable[[Any], Any]


def fuzz_decoder(seed: int, numbers: range, reader: Reader = FrameReader) -> collections.Counter[str]:
    """Each frame on a reader of its own, as each side reads it; what came of them, counted."""
    outcomes: collections.Counter[str] = collections.Counter()
    growth = Growth(os.getpid())
    for number in numbers:
        chance = chance_of(seed, number)
        for message_type, frames in ((AnyClientMessage, CLIENT_FRAMES), (AnyServerMessage, SERVER_FRAMES)):
            for data in conversation(chance, frames)[: CONVERSATION // 2]:
                outcomes[_decode(reader(message_type), data, f"{replay(seed, number)} --decoder")] += 1
        if number % 256 == 0 or number == numbers[-1]:
            growth.check((number - numbers.start) * WARM_UP >= len(numbers))
    outcomes["grown"] = growth.bytes
    return outcomes


def _decode(reader: Any, data: bytes, again: str) -> str:
    try:
        messages = list(reader.feed(data))
    except ProtocolError:
        return "refused"
    except BaseException as error:
        raise Violation(f"{type(error).__name__}: {error} of {data[:80]!r}\nreplay: {again}") from error
    return "message" if messages else "partial"


def fuzz_engine(seed: int, numbers: range, path: Path) -> collections.Counter[str]:
    """Conversations with the engine at a path, one after the other; another client beside them gets all its answers.

    "frames" counts what the engine has looked at: every reply, and what ended the connection.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    beside = Talk(path)
    status = beside.ask(GetStatus(ref=0))
    growth = Growth(status.status.pid)
    for number in numbers:
        chance = chance_of(seed, number)
        try:
            outcomes.update(_converse(path, chance))
        except (Violation, TimeoutError) as error:
            raise Violation(f"{error or 'no answer'}\nreplay: {replay(seed, number)} --live-only") from error
        if number % 64 == 0 or number == numbers[-1]:
            beside.close()  # before it is slowed down
            beside = Talk(path)
            beside.ask(GetStatus(ref=0))
            growth.check((number - numbers.start) * WARM_UP >= len(numbers))
    beside.close()
    outcomes["grown"] = growth.bytes
    return outcomes


def _converse(path: Path, chance: Random) -> Iterator[str]:
    """One connection: all is sent, then all is read; often with a cut somewhere, or hung up without reading."""
    frames = live_conversation(chance)
    if chance.random() < 0.9:
        frames.insert(0, CLIENT_FRAMES[0])
    data, half_closed = b"".join(frames), chance.random() < 0.8
    if chance.random() < 0.1:
        data = data[: chance.randrange(len(data))]
    with Talk(path, greet=False) as talk:
        try:
            talk.socket.sendall(data)
            talk.socket.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError, OSError):
            yield "cut off"  # it has heard enough; why is still to be read
        if not half_closed:
            yield "left"
            return
        for message in talk.replies():
            yield "frames"
            yield type(message).__name__.lower()
            if isinstance(message, Refused) and message.error.code not in EXPECTED:
                raise Violation(f"refused with {message.error.code}: {message.error.message}")
    yield "conversations"


class Talk:
    """A connection to an engine. Resource handling: owns its socket until `close`."""

    def __init__(self, path: Path, greet: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.settimeout(DEADLINE)
        self._reader: FrameReader[AnyServerMessage] = FrameReader(AnyServerMessage)
        self._replies = self.replies()
        if greet:
            self.ask(CLIENT[0])

    def replies(self) -> Iterator[AnyServerMessage]:
        """What comes until the end of the connection; it must be readable."""
        try:
            while data := self.socket.recv(1 << 16):
                yield from self._reader.feed(data)
        except ConnectionResetError:
            return
        except ProtocolError as error:
            raise Violation(f"the engine sent what cannot be read: {error}") from error

    def ask(self, message: msgspec.Struct) -> Any:
        self.socket.sendall(encode_frame(message))
        reply = next(self._replies, None)
        if reply is None or isinstance(reply, Refused):
            raise Violation(f"a client that does nothing wrong got {reply}")
        return reply

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def replay(seed: int, number: int) -> str:
    return f"python -m tools.fuzz --seed {seed} --first {number} --count 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200_000, help="for the decoder")
    parser.add_argument("--live", type=int, default=20_000, help="for a live engine, about")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", type=int, default=0, help="number of the first conversation")
    parser.add_argument("--count", type=int, default=None, help="conversations, instead of --frames and --live")
    parser.add_argument("--decoder", action="store_true", help="the decoder only")
    parser.add_argument("--live-only", action="store_true", help="the engine only")
    given = parser.parse_args()
    seed = secrets.randbits(32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    if not given.live_only:
        report("decoder", fuzz_decoder, seed, _range(given.first, given.count, given.frames))
    if not given.decoder:
        # An engine like any other, in a process of its own, that may write nothing.
        from tests.engine.wire import EngineProcess

        with (
            tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as directory,
            tempfile.TemporaryDirectory() as root,
            EngineProcess(Path(directory), "--output-root", root) as engine,
        ):
            engine.wait_ready()
            report("engine", fuzz_engine, seed, _range(given.first, given.count, given.live), engine.socket)


def _range(first: int, count: int | None, frames: int) -> range:
    return range(first, first + (count if count is not None else -(-frames // CONVERSATION)))


def report(name: str, fuzz: Callable[..., collections.Counter[str]], seed: int, numbers: range, *more: Any) -> None:
    began = time.monotonic()
    outcomes = fuzz(seed, numbers, *more)
    grown = outcomes.pop("grown")
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
    seconds = time.monotonic() - began
    print(f"{name}: {len(numbers):,} conversations in {seconds:.1f} s: {counts}; grown by {grown / 2**20:.1f} MiB")


if __name__ == "__main__":
    try:
        main()
    except Violation as violation:
        sys.exit(f"violation: {violation}")
