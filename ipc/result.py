"""The files of a request that is done: a video that says whose it is, and by which whoever finds it can tell that it is
whole; and the JSON beside it.

The video is an mp4. Its comment is the metadata, as JSON, in which `task` is the request's id. It ends with a box that
players skip: a number that says what the box is, and the SHA-256 of every byte before it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, Final

import msgspec

from ipc.files import Directory
from ipc.messages.job import Job

SEAL: Final = bytes.fromhex("6f2d9c1e4a5b4f0c8d1be37a90c6524b")
"""Says what the last box is: an mp4 may have boxes of type `uuid` for anything, each kind under a number of its own."""
SEAL_BYTES: Final = 8 + len(SEAL) + hashlib.sha256().digest_size
COMMENT: Final = ((b"moov", 0), (b"udta", 0), (b"meta", 4), (b"ilst", 0), (b"\xa9cmt", 0), (b"data", 8))
"""The way to the comment, box in box, and how many bytes each has before what is in it."""
MOST_BOXES: Final = 64
"""In one box. Ours have fewer than ten; a stranger's file is given up then."""
MOST_METADATA: Final = 1 << 19
"""Bytes of JSON: what is told to clients has room in a frame."""
CHUNK: Final = 1 << 20

Boxes = dict[bytes, tuple[int, int]]
"""Type -> where what is in the box begins and ends in the file."""


def seal(file: IO[bytes]) -> None:
    """Put the last box at the end of a complete mp4."""
    digest = _digest(file, file.seek(0, os.SEEK_END))
    file.seek(0, os.SEEK_END)
    file.write(struct.pack(">I4s", SEAL_BYTES, b"uuid") + SEAL + digest)


def comment_of(file: BinaryIO, task: str) -> bytes | None:
    """The comment of a request's video; None if the file is anything else, or not as it was sealed, to the bit.

    Reads no more than the heads of some boxes and the comment of a file that is not this task's.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        top = _boxes(file, 0, size)
        begin, end = top.get(b"uuid", (0, 0))
        if (begin, end) != (size - SEAL_BYTES + 8, size) or _read(file, begin, len(SEAL)) != SEAL:
            return None
        comment = _comment(file, top)
        if metadata_of(comment).get("task") != task:
            return None
    except (ValueError, RecursionError):
        return None
    whole = _read(file, begin + len(SEAL), end - begin - len(SEAL)) == _digest(file, size - SEAL_BYTES)
    return comment if whole else None


def metadata_of(comment: bytes) -> dict[str, Any]:
    """ValueError or RecursionError if it is not the JSON of a map that can be told to clients."""
    metadata = msgspec.json.decode(comment, type=dict[str, Any])
    try:
        msgspec.msgpack.encode(metadata)
    except OverflowError as error:
        raise ValueError(str(error)) from error
    return metadata


def json_name(job: Job) -> str:
    """Of the file with the metadata, in the video's directory."""
    return os.path.splitext(os.path.basename(job.output))[0] + ".json"


def write_json(target: int, comment: str) -> None:
    """Write and sync the file with the metadata; its descriptor is closed."""
    with open(target, "w", encoding="utf-8") as file:
        file.write(json_text(comment))
        file.flush()
        os.fsync(target)


def json_text(comment: str) -> str:
    """What is in that file."""
    return comment + "\n"


def clean(directory: Directory, job: Job) -> None:
    """Remove what an unfinished attempt has left."""
    for path in job.temporaries:
        directory.remove(os.path.basename(path))


def _comment(file: BinaryIO, top: Boxes) -> bytes:
    """ValueError if there is none, or it is too long."""
    boxes, begin, end = top, 0, 0
    for depth, (name, skipped) in enumerate(COMMENT):
        if depth:
            boxes = _boxes(file, begin, end)
        if name not in boxes:
            raise ValueError(f"there is no {name!r}")
        begin, end = boxes[name][0] + skipped, boxes[name][1]
    if end - begin > MOST_METADATA:
        raise ValueError(f"the comment has {end - begin:,} bytes; expected at most {MOST_METADATA:,}")
    return _read(file, begin, end - begin)


def _boxes(file: BinaryIO, begin: int, end: int) -> Boxes:
    """Those between two places, which they fill; of several of a type, the last. ValueError if they do not."""
    found: Boxes = {}
    for number, (name, inside, after) in enumerate(_walk(file, begin, end)):
        if number == MOST_BOXES:
            raise ValueError(f"there are more than {MOST_BOXES} boxes")
        found[name] = (inside, after)
    return found


def _walk(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while begin < end:
        size, name = struct.unpack(">I4s", _read(file, begin, 8))
        inside = begin + 8
        if size == 1:  # it is in the next 8 bytes
            (size,) = struct.unpack(">Q", _read(file, inside, 8))
            inside += 8
        if not inside <= begin + size <= end:
            raise ValueError(f"a box of {size:,} bytes in {end - begin:,}")
        begin += size
        yield name, inside, begin


def _read(file: BinaryIO, begin: int, size: int) -> bytes:
    """ValueError if the file ends before."""
    file.seek(begin)
    if len(data := file.read(size)) != size:
        raise ValueError("the file ends early")
    return data


def _digest(file: IO[bytes], size: int) -> bytes:
    """SHA-256 of so many bytes of the beginning of a file."""
    total = hashlib.sha256()
    file.seek(0)
    while size > 0 and (data := file.read(min(size, CHUNK))):
        total.update(data)
        size -= len(data)
    return total.digest()
