"""200,000 frames that no client would send, and requests of anything at all. `tools/fuzz.py` has the long version; what
is random is drawn from a seed that a failure names, with the command that replays it."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from engine.decode import decode_strictly
from engine.params import UserParams
from ipc.errors import BadRequest, ProtocolError
from ipc.frames import FrameReader
from ipc.messages.client import AnyClientMessage
from tests.engine.test_server import serving
from tests.engine.wire import EngineProcess, wait_for
from tools.fuzz import CLIENT_FRAMES, Growth, Violation, chance_of, conversation, fuzz_decoder, fuzz_engine

FRAMES = 200_000
LIVE_CONVERSATIONS = 800

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=20,
)
requests = st.one_of(
    anything, st.dictionaries(st.sampled_from(UserParams.__struct_fields__), anything, min_size=1, max_size=8)
)
pieces = st.one_of(st.sampled_from(CLIENT_FRAMES), st.binary(max_size=60), anything.map(msgspec.msgpack.encode))


def drawn() -> int:
    """A seed, which pytest shows with a failure of any kind."""
    seed = secrets.randbits(32)
    print(f"replay: python -m tools.fuzz --seed {seed}")
    return seed


def test_200_000_frames_for_the_decoder() -> None:
    """Each gives a message, more to come, or `ProtocolError`; memory does not grow."""
    outcomes = fuzz_decoder(drawn(), range(FRAMES // 16))
    grown = outcomes.pop("grown")
    assert sum(outcomes.values()) == FRAMES
    assert set(outcomes) == {"message", "partial", "refused"} and min(outcomes.values()) > 1000, outcomes
    assert grown < 16 << 20


@given(st.lists(pieces))
@settings(max_examples=250, deadline=None)
def test_any_stream_for_the_decoder(stream: list[bytes]) -> None:
    """Frames, garbage, and MessagePack with and without a length, in any order: messages and at most one kind of
    error, which ends the stream."""
    reader = FrameReader[Any](AnyClientMessage)
    ended = False
    for piece in stream:
        try:
            for message in reader.feed(piece if len(piece) % 3 else len(piece).to_bytes(4, "big") + piece):
                assert isinstance(message, AnyClientMessage) and not ended
        except ProtocolError:
            ended = True


@given(requests)
@settings(max_examples=250, deadline=None)
def test_any_request_is_decoded_or_refused(data: Any) -> None:
    """Whatever MessagePack can say: `UserParams`, or a `BadRequest` of bounded length."""
    given_back = msgspec.msgpack.decode(msgspec.msgpack.encode(data))
    try:
        assert isinstance(decode_strictly(UserParams, given_back, BadRequest, "the request"), UserParams)
    except BadRequest as error:
        assert 0 < len(str(error)) < 2000


@pytest.fixture
def engine(short_dir: Path, tmp_path: Path) -> Iterator[EngineProcess]:
    """With its stages up, whose coming would be growth, and a root that no odd request names."""
    with EngineProcess(short_dir, "--output-root", tmp_path) as process:
        process.wait_ready()
        yield process


def test_a_live_engine(engine: EngineProcess) -> None:
    """Damaged messages and wrong requests, many connections of them: readable replies, no `internal`, no growth, no
    descriptor left; a client beside them gets every answer."""
    before = engine.open_files()
    outcomes = fuzz_engine(drawn(), range(LIVE_CONVERSATIONS), engine.socket)
    assert outcomes["frames"] > 3 * LIVE_CONVERSATIONS, outcomes
    assert outcomes["refused"] > LIVE_CONVERSATIONS
    assert outcomes["accepted"] == 0
    wait_for(lambda: engine.open_files() <= before, "descriptors to be closed")


# Controls.


def test_the_same_seed_gives_the_same_frames() -> None:
    """What a failure names can be had again."""
    first, second = (conversation(chance_of(7, 12), CLIENT_FRAMES) for _ in range(2))
    assert first == second
    assert first != conversation(chance_of(7, 13), CLIENT_FRAMES)
    assert first != conversation(chance_of(8, 12), CLIENT_FRAMES)


class LeakyReader(FrameReader[Any]):
    kept: list[bytes] = []  # noqa: RUF012

    def feed(self, data: bytes) -> Iterator[Any]:
        self.kept.append(b"x" * 20_000)
        return super().feed(data)


class FragileReader(FrameReader[Any]):
    def feed(self, data: bytes) -> Iterator[Any]:
        data[:8].decode()
        return super().feed(data)


def test_a_leak_in_the_decoder_is_noticed() -> None:
    """Control: a reader that keeps 20 kB of every frame."""
    with pytest.raises(Violation, match="has grown by"):
        fuzz_decoder(1, range(1000), LeakyReader)
    LeakyReader.kept.clear()


def test_another_error_of_the_decoder_is_noticed_and_can_be_replayed() -> None:
    """Control: a reader that raises UnicodeDecodeError. The command in the message finds it again."""
    with pytest.raises(Violation, match="UnicodeDecodeError") as caught:
        fuzz_decoder(drawn(), range(1000), FragileReader)
    words = str(caught.value).split("tools.fuzz ")[1].split()
    with pytest.raises(Violation, match="UnicodeDecodeError"):
        fuzz_decoder(int(words[1]), range(int(words[3]), int(words[3]) + int(words[5])), FragileReader)


def test_the_growth_of_another_process_is_noticed() -> None:
    """Control: a process that takes 64 MiB more."""
    code = "input(); x = b'x' * (64 << 20); print('taken', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        growth = Growth(process.pid)
        growth.check(warm=True)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(Violation, match=r"has grown by \d+ MiB"):
            growth.check(warm=True)
        process.communicate(b"\n")


async def test_a_defect_of_the_engine_is_noticed(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: an engine that fails to list its tasks."""
    async with serving(short_dir) as server:
        monkeypatch.setattr(server.supervisor, "rows", lambda: 1 // 0)
        with pytest.raises(Violation, match="refused with internal"):
            await asyncio.to_thread(fuzz_engine, 1, range(200), short_dir / "engine.sock")
