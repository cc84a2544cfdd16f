"""Reads stretches of files ahead, in order, into a few buffers or to where they belong; hashes them on the way.

Files are read with `pread`, not mapped: a file that is cut while it is read is an error here, where a mapping would
kill the process with SIGBUS.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from hotreload.content import CHUNK, chunk_digest
from hotreload.files import open_regular
from hotreload.safetensors_file import TensorEntry
from hotreload.shown import shown
from ipc.errors import BadCheckpoint

THREADS = min(8, len(os.sched_getaffinity(0)))
BUFFERS = THREADS + 2
"""Read ahead of the one that is being used: at most BUFFERS * CHUNK = 80 MiB of host memory."""

AHEAD = 64 << 20
"""Bytes that the disk is asked for before they are read; without, cold loads took 1.1 to 1.9 times as long."""


class Piece(NamedTuple):
    """`size` bytes of a tensor from `start` on."""

    entry: TensorEntry
    start: int
    size: int


class Read(NamedTuple):
    """A piece that was read: into `buffer`, or to where it belongs if that is None."""

    piece: Piece
    buffer: Buffer | None
    digest: bytes


class Buffer:
    """`CHUNK` bytes of host memory, and for a GPU, pinned, with as many on the device.

    Resource handling: what is queued on the GPU may still read the buffer; `wait` returns when it no longer does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.host = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=on_gpu)
        self.bytes = memoryview(self.host.numpy().data)
        self._device = torch.empty(CHUNK, dtype=torch.uint8, device=device) if on_gpu else None
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        """The first `size` bytes as a flat tensor, on the device."""
        if self._device is None:
            return self.host[:size].view(dtype)
        self._device[:size].copy_(self.host[:size], non_blocking=True)
        return self._device[:size].view(dtype)

    def used(self) -> None:
        """All work that reads the buffer has been queued."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Files:
    """Files that are opened when they are first read.

    Resource handling: one fd per file, closed on exit. Error handling: `BadCheckpoint` names the file.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._fds: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read_into(self, path: Path, offset: int, target: memoryview) -> None:
        """Fill `target` from `offset` on. For any number of threads at once, on files that are open."""
        fd, done = self.open(path), 0
        while done < len(target):
            try:
                count = os.preadv(fd, [target[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(path, error) from error
            if not count:
                raise BadCheckpoint(f"{self._label}: {shown(path.name)} was cut short while it was read; load it again")
            done += count

    def open(self, path: Path) -> int:
        """The fd of a file. The first time, not from several threads at once."""
        if path not in self._fds:
            try:
                self._fds[path] = open_regular(path)
            except OSError as error:
                raise self._unreadable(path, error) from error
            self._stack.callback(os.close, self._fds[path])
        return self._fds[path]

    def will_need(self, piece: Piece) -> None:
        """Have the kernel read the piece into its cache, without waiting for it."""
        entry = piece.entry
        os.posix_fadvise(self.open(entry.file), entry.offset + piece.start, piece.size, os.POSIX_FADV_WILLNEED)

    def read_tensor(self, entry: TensorEntry, dtype: torch.dtype, start: int = 0, size: int | None = None) -> Tensor:
        """`size` bytes of a tensor from `start` on (all, if None) as a flat tensor in host memory."""
        data = torch.empty(entry.size - start if size is None else size, dtype=torch.uint8)
        self.read_into(entry.file, entry.offset + start, memoryview(data.numpy().data))
        return data.view(dtype)

    def _unreadable(self, path: Path, error: OSError) -> BadCheckpoint:
        return BadCheckpoint(f"{self._label}: {shown(path.name)} cannot be read: {error.strerror}")


def pieces_of(entries: Iterable[TensorEntry]) -> list[Piece]:
    """Tensors cut into chunks, in the order of their bytes on disk."""
    ordered = sorted(entries, key=lambda entry: (entry.file, entry.offset))
    return [Piece(e, s, min(CHUNK, e.size - s)) for e in ordered for s in range(0, e.size, CHUNK)]


def read_ahead(
    files: Files, pieces: Sequence[Piece], place: Callable[[Piece], memoryview | None], device: torch.device
) -> Generator[Read, None, None]:
    """Yield each piece in order when it has been read, while the next ones are being read; `close` waits for these.

    `place`: where in host memory a piece belongs, or None to have it in a buffer, until the next piece is asked for.
    """
    free: list[Buffer] = []
    reading: deque[tuple[Piece, Buffer | None, Future[bytes]]] = deque()

    def read(piece: Piece, buffer: Buffer | None, target: memoryview) -> bytes:
        if buffer is not None:
            buffer.wait()
        files.read_into(piece.entry.file, piece.entry.offset + piece.start, target)
        return chunk_digest(target)

    def oldest() -> Iterator[Read]:
        piece, buffer, digest = reading.popleft()
        yield Read(piece, buffer, digest.result())
        if buffer is not None:
            buffer.used()
            free.append(buffer)

    following, lead = iter(pieces), 0
    with ThreadPoolExecutor(THREADS, "weights") as pool:
        for piece in pieces:
            lead -= piece.size
            while lead < AHEAD and (asked := next(following, None)) is not None:
                files.will_need(asked)
                lead += asked.size
            if len(reading) == BUFFERS:
                yield from oldest()
            target, buffer = place(piece), None
            if target is None:
                buffer = free.pop() if free else Buffer(device)
                target = buffer.bytes[: piece.size]
            reading.append((piece, buffer, pool.submit(read, piece, buffer, target)))
        while reading:
            yield from oldest()
