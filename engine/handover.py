"""The document by which one program hands the engine to the next: everything as plain data, in MessagePack.

Memory, sockets and stage processes are not in it; their descriptors are passed beside it. A program takes only
documents of its own `FORMAT`: raise that number with every change of what a state holds or means.

Resource handling: a document in memory is a memfd. Error handling: `ValueError` says why a document cannot be taken.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from engine.paths import ClaimState
from engine.server import ServerState
from engine.states import Descriptors, State
from engine.supervisor import SupervisorState

FORMAT = 7

MAX_DOCUMENT = 1 << 30
"""Bytes. The largest queue with the longest prompts takes less."""


class Handover(State, frozen=True, kw_only=True):
    """An engine that is serving, between two turns of the loop."""

    format: int
    engine: str
    """Version of the program that wrote it."""
    fds: list[int]
    """Numbers of the descriptors, in the process that wrote it."""
    held_at: float
    """When the clients were held, on the monotonic clock, which a hand-over does not reset."""
    supervisor: SupervisorState
    server: ServerState
    claim: ClaimState


class _Head(msgspec.Struct):
    format: int = 0
    engine: str = "?"


def encode(document: Handover) -> bytes:
    return msgspec.msgpack.encode(document, enc_hook=_encode_path)


def decode(raw: bytes) -> Handover:
    """ValueError for a document of another format, or that is none."""
    try:
        head = msgspec.msgpack.decode(raw, type=_Head)
        if head.format != FORMAT:
            raise ValueError(
                f"engine {head.engine} hands over in format {head.format} and this program takes format {FORMAT}: stop "
                "the engine and start it again; its requests stay in the journal"
            )
        return msgspec.msgpack.decode(raw, type=Handover, dec_hook=_decode_path)
    except msgspec.MsgspecError as error:
        raise ValueError(f"what the running engine hands over cannot be read: {error}") from error


def in_memory(document: bytes) -> int:
    """A descriptor of a memfd, close-on-exec, that holds the document from its beginning."""
    fd = os.memfd_create("handover", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(document)
    return fd


def from_memory(fd: int) -> bytes:
    """What `in_memory` wrote, by the same descriptor or a duplicate of it. ValueError if it is too long to be that."""
    size = os.fstat(fd).st_size
    if size > MAX_DOCUMENT:
        raise ValueError(f"what the running engine hands over has {size:,} bytes; expected at most {MAX_DOCUMENT:,}")
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        return file.read(size)


def descriptors_of(document: Handover) -> Descriptors:
    """By the numbers that they have in the process that wrote it."""
    return Descriptors(document.fds)


def _encode_path(value: Any) -> str:
    if isinstance(value, Path):
        return os.fspath(value)
    raise NotImplementedError(f"{type(value).__name__} cannot be handed over")


def _decode_path(wanted: type, value: Any) -> Any:
    if wanted is Path:
        return Path(value)
    raise NotImplementedError(f"{wanted.__name__} cannot be handed over")
