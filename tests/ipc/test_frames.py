from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from ipc.errors import BadRequest, ProtocolError
from ipc.frames import MAX_FRAME, FrameReader, encode_frame
from ipc.messages.client import AnyClientMessage, Cancel, GetStatus, Hello, Submit
from ipc.messages.server import Accepted, AnyServerMessage
from tests.ipc.conftest import resident_bytes

texts = st.text(max_size=50)
refs = st.integers(-(2**63), 2**63 - 1)
messages = st.one_of(
    st.builds(Hello, ref=refs, version=refs, client=texts),
    st.builds(Cancel, ref=refs, id=texts),
    st.builds(GetStatus, ref=refs),
)


def split(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """`data` in pieces that end at the cuts."""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        yield data[start:end]


@given(st.lists(messages, max_size=8), st.lists(st.integers(0, 10_000), max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_split_gives_the_same_messages(sent: list[Any], cuts: list[int]) -> None:
    """Frames cut into pieces anywhere, even inside a length, come out as the messages that went in, in order."""
    reader = FrameReader[Any](AnyClientMessage)
    stream = b"".join(encode_frame(message) for message in sent)
    assert [message for piece in split(stream, cuts) for message in reader.feed(piece)] == sent


@given(
    st.lists(st.one_of(st.binary(max_size=200), messages.map(encode_frame)), max_size=8), st.lists(st.integers(0, 999))
)
@settings(max_examples=300, deadline=None)
def test_garbage_is_only_ever_a_protocol_error(parts: list[bytes], cuts: list[int]) -> None:
    """Garbage between valid frames gives messages up to the first bad frame, then ProtocolError, and for ever after."""
    reader = FrameReader[Any](AnyClientMessage)
    failed = False
    for piece in split(b"".join(parts), cuts):
        try:
            for message in reader.feed(piece):
                assert not failed
                assert isinstance(message, AnyClientMessage)
        except ProtocolError:
            failed = True
    if failed:
        with pytest.raises(ProtocolError):
            list(reader.feed(b""))


def test_200_000_mutated_frames() -> None:
    """200,000 frames with random bytes changed, read as each side reads them: a message or ProtocolError, nothing else,
    and memory does not grow. Seed 0."""
    rng = random.Random(0)
    params = {"prompt": "a red circle", "steps": 20, "nested": [1, {"a": None}], "scale": 5.0}
    frames = [
        encode_frame(Accepted(id="a" * 32, position=1, params=params)),
        encode_frame(Submit(ref=1, params=msgspec.Raw(msgspec.msgpack.encode(params)))),
        encode_frame(Hello(ref=0, version=1)),
    ]
    before = resident_bytes()
    outcomes = {"message": 0, "partial": 0, "refused": 0}
    for number in range(200_000):
        mutant = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(2 if number % 10 == 0 else 4, len(mutant))] = rng.randrange(256)
        reader = FrameReader[Any](AnyServerMessage if number % 2 else AnyClientMessage)
        try:
            outcomes["message" if list(reader.feed(bytes(mutant))) else "partial"] += 1
        except ProtocolError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes
    assert resident_bytes() - before < 16 << 20


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, 2**32 - 1])
def test_a_bad_length_is_refused_before_its_payload_comes(length: int) -> None:
    """Four bytes that announce nothing, or more than the cap, end the stream: nothing is kept or awaited."""
    reader = FrameReader[Any](AnyClientMessage)
    with pytest.raises(ProtocolError, match=f"got a frame length of {length} bytes, expected 1 to {MAX_FRAME}"):
        list(reader.feed(length.to_bytes(4, "big")))
    with pytest.raises(ProtocolError, match="frame length"):
        list(reader.feed(encode_frame(GetStatus(ref=1))))


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xa4\xff\xff\xff\xff",
        msgspec.msgpack.encode({"type": "status", "ref": 1}) + b"\0",
        msgspec.msgpack.encode({"type": "accepted", "id": "x", "position": 1, "params": {}, "ref": "x"}),
        msgspec.msgpack.encode(
            {"type": "accepted", "id": "x", "position": 1, "params": {"t": msgspec.msgpack.Ext(-1, b"")}}
        ),
    ],
)
def test_hostile_payloads_are_protocol_errors(payload: bytes) -> None:
    """Reserved bytes, great depth, huge announced sizes, bad UTF-8, bytes after the end, wrong types: ProtocolError."""
    reader = FrameReader[Any](AnyServerMessage)
    with pytest.raises(ProtocolError, match=f"undecodable frame of {len(payload)} bytes"):
        list(reader.feed(len(payload).to_bytes(4, "big") + payload))


def test_messages_before_a_bad_frame_are_delivered() -> None:
    """A good frame and a bad one in one piece: the message first, then the error."""
    received = FrameReader[Any](AnyClientMessage).feed(encode_frame(GetStatus(ref=7)) + b"\0\0\0\0")
    assert next(received) == GetStatus(ref=7)
    with pytest.raises(ProtocolError):
        next(received)


def test_the_largest_frame_passes_one_byte_at_a_time_at_its_ends() -> None:
    overhead = len(encode_frame(Cancel(ref=1, id="x" * 70_000))) - 4 - 70_000
    largest = Cancel(ref=1, id="x" * (MAX_FRAME - overhead))
    frame = encode_frame(largest)
    assert len(frame) == 4 + MAX_FRAME
    reader = FrameReader[Any](AnyClientMessage)
    pieces = [*(frame[i : i + 1] for i in range(8)), frame[8:-2], frame[-2:-1], frame[-1:]]
    assert [message for piece in pieces for message in reader.feed(piece)] == [largest]


def test_a_message_over_the_cap_is_the_users_to_change() -> None:
    with pytest.raises(BadRequest, match=f"Cancel takes 20000.. bytes; a message may take at most {MAX_FRAME}"):
        encode_frame(Cancel(ref=1, id="x" * 2_000_000))


def test_nothing_is_kept_after_an_error() -> None:
    """A connection that goes on sending after a bad frame, 64 MiB in all, does not make the reader grow."""
    reader = FrameReader[Any](AnyClientMessage)
    before = resident_bytes()
    for _ in range(64):
        with pytest.raises(ProtocolError):
            list(reader.feed(bytes(1 << 20)))
    assert resident_bytes() - before < 16 << 20


def test_raw_params_survive_the_next_frames() -> None:
    """The undecoded part of a message stays what it was when the reader's buffer is used again."""
    params = msgspec.msgpack.encode({"prompt": "p" * 100})
    reader = FrameReader[Any](AnyClientMessage)
    first = list(reader.feed(encode_frame(Submit(ref=1, params=msgspec.Raw(params)))))
    list(reader.feed(encode_frame(Submit(ref=2, params=msgspec.Raw(b"\xa3new")))))
    assert bytes(first[0].params) == params


def test_a_number_that_is_too_large_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="Cancel has a number that takes more than 64 bits"):
        encode_frame(Cancel(ref=2**64, id="x"))
