"""Frames of the client protocol on a stream socket: a length of 4 bytes, big-endian, then that much MessagePack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from ipc.errors import BadRequest, ProtocolError

MAX_FRAME = 1024 * 1024
"""Bytes of MessagePack in one frame."""

_LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


def encode_frame(message: msgspec.Struct) -> bytes:
    """A message as it goes on the socket; BadRequest if it is over MAX_FRAME, or has a whole number that MessagePack
    has not."""
    try:
        payload = _encoder.encode(message)
    except OverflowError as error:
        raise BadRequest(f"{type(message).__name__} has a number that takes more than 64 bits") from error
    if len(payload) > MAX_FRAME:
        raise BadRequest(f"{type(message).__name__} takes {len(payload)} bytes; a message may take at most {MAX_FRAME}")
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + payload


class FrameReader(Generic[T]):
    """Turns the bytes of a stream, in pieces of any size, into messages of type `T`.

    Between two calls of `feed` it keeps at most one unfinished frame, so at most MAX_FRAME + 3 bytes.

    Error handling: the only error is ProtocolError. It ends the stream: where the next frame starts is unknown, so
    every later use raises it again. Messages before the bad frame are delivered first.
    """

    def __init__(self, message_type: Any) -> None:
        """`message_type` is a tagged struct or a union of them."""
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()
        self._error: str | None = None

    @property
    def rest(self) -> bytes:
        """What came and was not yielded as a message: whole frames and the beginning of one."""
        return bytes(self._buffer)

    @property
    def unfinished(self) -> bool:
        """Whether bytes of a frame are here whose rest is still to come."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[T]:
        """Take what came from the socket and yield the messages it completes. Exhaust it before feeding again."""
        if self._error is None:
            self._buffer += data
        return self._messages()

    def _messages(self) -> Iterator[T]:
        while (frame := self._next_frame()) is not None:
            try:
                message = self._decoder.decode(frame)
            except (ValueError, RecursionError) as error:
                raise self._failed(f"undecodable frame of {len(frame)} bytes: {error}") from error
            yield message

    def _next_frame(self) -> bytes | None:
        if self._error is not None:
            raise ProtocolError(self._error)
        if len(self._buffer) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
        if not 1 <= length <= MAX_FRAME:
            raise self._failed(f"got a frame length of {length} bytes, expected 1 to {MAX_FRAME}")
        end = _LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        frame = bytes(memoryview(self._buffer)[_LENGTH_BYTES:end])
        del self._buffer[:end]
        return frame

    def _failed(self, error: str) -> ProtocolError:
        self._error = error
        self._buffer.clear()
        return ProtocolError(error)
