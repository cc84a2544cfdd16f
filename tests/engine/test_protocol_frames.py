"""Bytes that no client of ours would send, against a real `engine serve`: it says why, hangs up, and goes on."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from ipc.frames import MAX_FRAME, encode_frame
from ipc.messages.client import Cancel, GetStatus, Hello, ListTasks, Submit, Subscribe
from tests.engine.wire import EngineProcess, RawClient, frame, hello, wait_for

NOBODY = "0" * 32
STATUS = frame(type="status", ref=9)


@pytest.fixture(autouse=True)
def server_is_unharmed(engine_process: EngineProcess) -> Iterator[None]:
    """Around every test: a client from before and a new one after get their answers, and no descriptor is leaked."""
    with RawClient(engine_process.socket) as other:
        before = engine_process.open_files()
        yield
        assert other.ask(STATUS)["type"] == "status"
        with RawClient(engine_process.socket) as new:
            assert new.ask(STATUS)["type"] == "status"
        wait_for(lambda: engine_process.open_files() <= before, "descriptors to be closed")


@pytest.mark.parametrize("greet", [False, True])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "frame length of 1195725856 bytes"),
        (b"\x00\x00\x00\x00", "frame length of 0 bytes"),
        (struct.pack(">I", MAX_FRAME + 1), "frame length of 1048577 bytes"),
        (b"\xff\xff\xff\xff", "frame length of 4294967295 bytes"),
        (b"\x00\x00\x00\x01\xc1", "undecodable"),
        (b"\x00\x00\x00\x02\x81\xa1", "undecodable"),
        (b"\x00\x00\x00\x01\x80", "undecodable"),
        (frame(type="launch", ref=1), "launch"),
        (frame(type="status"), "ref"),
        (frame(type="status", ref="one"), "Expected `int`"),
        (frame(ref=1), "type"),
        (frame(type="cancel", ref=1), "id"),
        (frame(type=["hello"], ref=1), "undecodable"),
    ],
)
def test_what_is_not_a_message_gets_a_reason_and_the_end(
    engine_process: EngineProcess, data: bytes, says: str, greet: bool
) -> None:
    """Before or after the handshake: `refused` with `protocol_error` and what was got, then the connection ends."""
    with RawClient(engine_process.socket, greet) as client:
        client.send(data)
        error = client.refusal_then_end()
        assert error["code"] == "protocol_error"
        assert says in error["message"]
        assert len(error["message"]) <= 2000


def test_the_cap_is_checked_before_the_bytes_come(engine_process: EngineProcess) -> None:
    """The four bytes of a length over the cap are enough to be refused: nothing waits for the rest."""
    with RawClient(engine_process.socket) as client:
        client.send(struct.pack(">I", MAX_FRAME + 1))
        assert client.refusal_then_end()["code"] == "protocol_error"


def test_a_frame_of_exactly_the_cap_is_read(engine_process: EngineProcess) -> None:
    """1 MiB of request is a request like any other, here one with too long a prompt; the connection goes on."""
    empty = len(msgspec.msgpack.encode(Submit(ref=2, params=msgspec.Raw(_params(70_000)))))
    full = encode_frame(Submit(ref=2, params=msgspec.Raw(_params(70_000 + MAX_FRAME - empty))))
    assert len(full) == MAX_FRAME + 4
    with RawClient(engine_process.socket) as client:
        reply = client.ask(full)
        assert (reply["type"], reply["error"]["code"], reply["ref"]) == ("refused", "bad_request", 2)
        assert client.ask(STATUS)["type"] == "status"


def _params(prompt: int) -> bytes:
    return msgspec.msgpack.encode({"prompt": "x" * prompt})


def test_a_refusal_never_repeats_a_megabyte(engine_process: EngineProcess) -> None:
    """A value as long as a frame, whose printed form is longer still, is refused in a text that fits into a frame."""
    params = msgspec.msgpack.encode({"prompt": "x", "output": "\U000e0001" * 250_000})
    with RawClient(engine_process.socket) as client:
        reply = client.ask(encode_frame(Submit(ref=2, params=msgspec.Raw(params))))
        assert reply["error"]["code"] == "bad_request"
        assert len(reply["error"]["message"]) <= 2000


def test_the_first_message_must_be_hello(engine_process: EngineProcess) -> None:
    """A request before the handshake is a protocol error that names what came."""
    with RawClient(engine_process.socket, greet=False) as client:
        client.send(STATUS)
        error = client.refusal_then_end()
        assert error["code"] == "protocol_error"
        assert "'status'" in error["message"]
        assert "'hello'" in error["message"]


def test_a_second_hello_is_a_protocol_error(engine_process: EngineProcess) -> None:
    """The handshake happens once."""
    with RawClient(engine_process.socket) as client:
        client.send(hello())
        assert client.refusal_then_end()["code"] == "protocol_error"


@pytest.mark.parametrize("version", [0, 2, 2**31])
def test_another_version_is_told_both_versions(engine_process: EngineProcess, version: int) -> None:
    """`version_mismatch` names the client's version and the engine's, then the connection ends."""
    with RawClient(engine_process.socket, greet=False) as client:
        client.send(hello(version))
        error = client.refusal_then_end()
        assert error["code"] == "version_mismatch"
        assert f"version {version} " in error["message"]
        assert "version 1:" in error["message"]


def test_frames_may_come_byte_by_byte(engine_process: EngineProcess) -> None:
    """The boundaries of reads are not the boundaries of messages."""
    with RawClient(engine_process.socket, greet=False) as client:
        for byte in hello() + STATUS:
            client.send(bytes([byte]))
        assert [client.receive()["type"] for _ in range(2)] == ["welcome", "status"]  # type: ignore[index]


def test_many_messages_in_one_write_are_answered_in_order(engine_process: EngineProcess) -> None:
    """A client that does not wait gets all replies, with its refs, in its order."""
    with RawClient(engine_process.socket) as client:
        client.send(b"".join(frame(type="list", ref=ref) for ref in range(100, 300)))
        assert [client.receive()["ref"] for _ in range(200)] == list(range(100, 300))  # type: ignore[index]


def test_a_half_closed_connection_is_answered_first(engine_process: EngineProcess) -> None:
    """A client that has said all it will say gets its answers, then the end."""
    with RawClient(engine_process.socket) as client:
        client.send(STATUS + frame(type="list", ref=10))
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.receive()["ref"] for _ in range(2)] == [9, 10]  # type: ignore[index]
        assert client.receive() is None


def test_unknown_keys_are_ignored_but_not_in_a_request(engine_process: EngineProcess) -> None:
    """A newer client may send more keys in a message; in `params` an unknown key is the user's mistake."""
    with RawClient(engine_process.socket) as client:
        assert client.ask(frame(type="status", ref=5, colour="red"))["type"] == "status"
        reply = client.ask(frame(type="submit", ref=6, params={"prompt": "x", "hieght": 96}))
        assert reply["error"]["code"] == "bad_request"
        assert "did you mean 'height'?" in reply["error"]["message"]


@pytest.mark.parametrize("params", [None, 5, [], "x", b"x", {"prompt": 1}, {1: 2}, {}, {"prompt": "x", "seed": -1}])
def test_wrong_params_are_the_users_mistake(engine_process: EngineProcess, params: object) -> None:
    """Whatever MessagePack stands in `params`, the connection survives it."""
    with RawClient(engine_process.socket) as client:
        reply = client.ask(frame(type="submit", ref=6, params=params))
        assert (reply["ref"], reply["error"]["code"]) == (6, "bad_request")
        assert client.ask(STATUS)["type"] == "status"


@pytest.mark.parametrize("params", [b"\x81\xa1\xff\x01", b"\x81\x80\x01", b"\xd4\x05a", b"\x91" * 5000 + b"\x01"])
def test_params_that_are_not_plain_data_are_refused(engine_process: EngineProcess, params: bytes) -> None:
    """Invalid UTF-8, unhashable keys, extension types, nesting without end: refused one way or the other."""
    with RawClient(engine_process.socket) as client:
        reply = client.ask(encode_frame(Submit(ref=6, params=msgspec.Raw(params))))
        assert reply["error"]["code"] in ("bad_request", "protocol_error")


def test_a_client_may_leave_at_any_byte(engine_process: EngineProcess) -> None:
    """Cut a whole conversation off after each of its bytes: the server never minds."""
    conversation = hello() + STATUS + frame(type="subscribe", ref=3, id=NOBODY) + frame(type="list", ref=4)
    for length in range(len(conversation) + 1):
        with RawClient(engine_process.socket, greet=False) as client:
            client.send(conversation[:length])


def test_running_out_of_descriptors_is_survived(engine_process: EngineProcess) -> None:
    """60 clients come where there is room for 20: some are hung up on; when they have left, the next one is served."""
    pid = engine_process.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (engine_process.open_files() + 20, limits[1]))
    try:
        clients = [RawClient(engine_process.socket, greet=False) for _ in range(60)]
        answered = 0
        for client in clients:
            with contextlib.suppress(BrokenPipeError):
                client.send(hello())
                answered += client.receive() is not None
        assert 10 <= answered < 60
        for client in clients:
            client.close()
        wait_for(lambda: _answers(engine_process), "the engine to accept again")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def _answers(engine: EngineProcess) -> bool:
    with RawClient(engine.socket, greet=False) as client, contextlib.suppress(BrokenPipeError):
        client.send(hello())
        return client.receive() is not None
    return False


def test_damaged_conversations_hurt_nobody(engine_process: EngineProcess) -> None:
    """300 conversations with flipped bits, cuts, and inserted bytes: each is answered or ended, and a client beside
    them gets every one of its answers."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    words = [
        Hello(ref=1, version=1), GetStatus(ref=2), ListTasks(ref=3), Cancel(ref=4, id=NOBODY),
        Subscribe(ref=5, id=NOBODY), Submit(ref=6, params=msgspec.Raw(msgspec.msgpack.encode({"prompt": ""}))),
    ]  # fmt: skip
    stop = threading.Event()
    answers: list[str] = []

    def behave_well() -> None:
        with RawClient(engine_process.socket) as client:
            while not stop.is_set():
                answers.append(client.ask(STATUS)["type"])

    beside = threading.Thread(target=behave_well)
    beside.start()
    try:
        for _ in range(300):
            data = bytearray(b"".join(encode_frame(word) for word in words))
            for _ in range(chance.randint(1, 4)):
                _damage(data, chance)
            with RawClient(engine_process.socket, greet=False) as client:
                client.socket.settimeout(5)
                client.send(bytes(data))
                client.socket.shutdown(socket.SHUT_WR)
                while client.receive() is not None:
                    pass
    finally:
        stop.set()
        beside.join()
    assert set(answers) == {"status"}


def _damage(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    match chance.randrange(4):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            del data[at : at + chance.randint(1, 8)]
        case 2:
            data[at:at] = chance.randbytes(chance.randint(1, 8))
        case 3:
            data[at] = chance.choice((0, 0x7F, 0xC1, 0xFF))
