from __future__ import annotations

import array
import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from ipc.channel import MAX_FDS, MAX_MESSAGE_BYTES, Channel, ChannelClosed, ChannelError, close_fds
from ipc.counters import ProgressCounter
from ipc.errors import ProtocolError
from tests.ipc.conftest import PeerProcess, open_descriptors
from tests.ipc.peer import WAIT, AttachCounter


class Note(msgspec.Struct, frozen=True, tag="note"):
    text: str


class Count(msgspec.Struct, frozen=True, tag="count"):
    value: int


@contextmanager
def channels() -> Iterator[tuple[Channel[Note | Count], Channel[Note | Count]]]:
    one, other = Channel.pair()
    with Channel[Note | Count](one, Note | Count) as a, Channel[Note | Count](other, Note | Count) as b:
        yield a, b


@contextmanager
def raw_sender() -> Iterator[tuple[socket.socket, Channel[Note | Count]]]:
    one, other = Channel.pair()
    with one, Channel[Note | Count](other, Note | Count) as channel:
        yield one, channel


def pipe() -> tuple[int, int]:
    return os.pipe2(os.O_CLOEXEC)


def test_messages_arrive_typed_and_in_order() -> None:
    with channels() as (a, b):
        a.send(Note("one"))
        a.send(Count(2))
        assert b.receive(WAIT).message == Note("one")
        assert b.receive(WAIT) == (Count(2), [])
        assert b.try_receive() is None


def test_descriptors_travel_with_their_message() -> None:
    """Two descriptors go with one message: the receiver's refer to the same pipe, are new, and close on exec."""
    with channels() as (a, b):
        reader, writer = pipe()
        a.send(Note("pipe"), [reader, writer])
        message, fds = b.receive(WAIT)
        assert message == Note("pipe")
        os.write(fds[1], b"through")
        assert os.read(reader, 10) == b"through"
        assert not any(os.get_inheritable(fd) for fd in fds)
        close_fds([reader, writer, *fds])


def test_as_many_descriptors_as_linux_carries() -> None:
    """253 descriptors in one packet arrive; 254 are refused before anything is sent."""
    with channels() as (a, b):
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        a.send(Note("many"), [fd] * MAX_FDS)
        fds = b.receive(WAIT).fds
        assert len(fds) == MAX_FDS
        with pytest.raises(ValueError, match="got 254 descriptors, expected at most 253"):
            a.send(Note("more"), [fd] * (MAX_FDS + 1))
        close_fds([fd, *fds])


def test_the_largest_message_passes_and_a_larger_one_is_refused() -> None:
    with channels() as (a, b):
        overhead = len(msgspec.msgpack.encode(Note("x" * 70_000))) - 70_000
        largest = Note("x" * (MAX_MESSAGE_BYTES - overhead))
        a.send(largest, timeout=WAIT)
        assert b.receive(WAIT).message == largest
        with pytest.raises(ValueError, match=f"Note: got {MAX_MESSAGE_BYTES + 1} bytes"):
            a.send(Note(largest.text + "x"))
        assert b.try_receive() is None


def test_nothing_to_receive_is_a_timeout() -> None:
    with channels() as (a, _), pytest.raises(TimeoutError, match="no message before the deadline"):
        a.receive(0.02)


def test_a_peer_that_does_not_read_stops_the_sender() -> None:
    """Messages to a peer that does not read fill its buffer, which is bounded: then `try_send` says no and `send` times
    out. When the peer has read them all, sending works again and nothing was lost or doubled."""
    with channels() as (a, b):
        sent = 0
        while a.try_send(Note("x" * 50_000)):
            sent += 1
            assert sent < 1000
        with pytest.raises(TimeoutError, match="does not read"):
            a.send(Count(0), timeout=0.02)
        for _ in range(sent):
            assert isinstance(b.receive(WAIT).message, Note)
        assert b.try_receive() is None
        a.send(Count(1), timeout=WAIT)
        assert b.receive(WAIT).message == Count(1)


def test_a_closed_peer_is_the_end() -> None:
    with channels() as (a, b):
        b.close()
        with pytest.raises(ChannelClosed):
            a.receive(WAIT)
        with pytest.raises(ChannelClosed):
            a.send(Count(1))
        with pytest.raises(ChannelClosed):
            a.try_send(Count(1))


def test_last_words_are_read_before_the_end() -> None:
    """The peer sends two messages and leaves without having read ours: both arrive, then ChannelClosed."""
    with channels() as (a, b):
        a.send(Note("never read"))
        b.send(Count(1))
        b.send(Count(2))
        b.close()
        assert [a.receive(WAIT).message for _ in range(2)] == [Count(1), Count(2)]
        with pytest.raises(ChannelClosed):
            a.receive(WAIT)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage",
        msgspec.msgpack.encode({"type": "unknown"}),
        msgspec.msgpack.encode({"type": "count", "value": "x"}),
        b"\xa4\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"x" * (MAX_MESSAGE_BYTES + 1),
    ],
)
def test_a_packet_that_is_no_message_is_a_protocol_error(payload: bytes) -> None:
    """Undecodable, of an unknown type, with a wrong field, too deep or too long: ProtocolError, and the descriptor that
    came with it is closed."""
    with raw_sender() as (sock, channel):
        before = open_descriptors()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))
        sock.sendmsg([b"\0\1", payload], [rights])
        with pytest.raises(ProtocolError):
            channel.receive(WAIT)
        assert open_descriptors() == before


def test_a_packet_without_a_count_is_a_protocol_error() -> None:
    with raw_sender() as (sock, channel):
        sock.send(b"\0")
        with pytest.raises(ProtocolError, match="got a packet of 1 bytes, expected at least 3"):
            channel.receive(WAIT)


@pytest.mark.parametrize(("announced", "carried"), [(2, 1), (0, 1), (1, 0), (1, 2)])
def test_a_wrong_number_of_descriptors_is_an_error(announced: int, carried: int) -> None:
    """A packet that announces another number of descriptors than it carries is refused, and those are closed."""
    with raw_sender() as (sock, channel):
        before = open_descriptors()
        packet = announced.to_bytes(2, "big") + msgspec.msgpack.encode(Count(1))
        fds = array.array("i", [sock.fileno()] * carried)
        sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if carried else [])
        with pytest.raises(ChannelError, match=f"got {carried} descriptors, expected {announced}"):
            channel.receive(WAIT)
        assert open_descriptors() == before


def test_descriptors_that_the_kernel_dropped_are_noticed() -> None:
    """At the limit of open files the kernel delivers the data and drops descriptors: the receiver gets an error, keeps
    none of those that arrived, and works again when there is room."""
    with channels() as (a, b):
        reader, writer = pipe()
        before = open_descriptors()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(reader)
        os.close(free)
        a.send(Note("four"), [reader, writer, reader, writer])
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
        try:
            with pytest.raises(ChannelError, match="descriptors were lost"):
                b.receive(WAIT)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert open_descriptors() == before
        a.send(Note("again"), [reader, writer])
        _, fds = b.receive(WAIT)
        close_fds([reader, writer, *fds])


def test_an_event_loop_can_watch_it() -> None:
    """Its descriptor polls readable when a message waits, and is -1 after `close`."""
    with channels() as (a, b):
        poller = select.poll()
        poller.register(b, select.POLLIN)
        assert poller.poll(0) == []
        a.send(Count(1))
        assert poller.poll(WAIT * 1000)
        b.receive(WAIT)
        b.close()
        assert b.fileno() == -1


def test_the_end_is_not_inherited_unless_passed() -> None:
    """A child that was not given the channel does not keep it open: the peer's end is seen although the child lives."""
    with channels() as (a, b), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        b.close()
        with pytest.raises(ChannelClosed):
            a.receive(WAIT)
        child.communicate(b"\n", timeout=WAIT)


def test_a_killed_process_is_the_end(peers: Callable[[], PeerProcess]) -> None:
    """A second process answers over the channel with memory that came by descriptor; killed, its channel is closed."""
    peer = peers()
    with ProgressCounter.create() as counter:
        assert peer.ask(AttachCounter(times=5), [counter.fd]) == "counted"
        assert counter.value == 5
    peer.kill()
    with pytest.raises(ChannelClosed):
        peer.hear()
