"""The clips of the vae's tasks, on their way through its quanta: latents to frames, and init files to latents.

In tiles, a quantum does one part of the work of a whole clip (`stages/models/vae_tiles.py`), and nothing of the clip is
on the device between two of them. Everything is kept in host memory: what is between the tiles and the VAE's lowest
level, and the frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ipc.errors import NumericalError
from ipc.messages.job import Job
from ipc.messages.reports import Parts
from stages.media import Picture, fit, read_frames, read_image
from stages.models.vae_codec import ClipCoder, Codec, Kept
from stages.models.vae_tiles import TILE_BUDGET, Tile


class Decoding(Protocol):
    """A task whose latents are being decoded."""

    def chunk(self, codec: Callable[[], Codec], latents: Tensor, index: int) -> Tensor | None:
        """Work on chunk `index` of the clip with these latents [z, T, h, w]: its frames [t, H, W, 3] uint8, or None
        after a part of what has to be done before. codec: brings the VAE to the device, if it is not there. Raises
        `NumericalError`."""

    @property
    def parts(self) -> Parts | None:
        """How far the clip is, if it is decoded in parts."""

    @property
    def begun(self) -> bool:
        """Whether something of it is there to go on with, and it goes on in the same way."""

    @property
    def rests(self) -> bool:
        """Whether nothing of it is on the device between quanta, so that the VAE may leave it."""

    @property
    def nbytes(self) -> int:
        """Of the memory between quanta."""


@dataclass(slots=True)
class ChunkDecoding:
    """Chunk after chunk: what the causal convolutions remember, and the next one. Chunks before the one that is wanted
    are decoded again, silently, if this process has not."""

    size: int
    """Latent frames of a chunk."""
    beat: Callable[[], None]
    """As in `Links`."""
    device: torch.device
    clip: ClipCoder | None = None
    next: int = 0

    def chunk(self, codec: Callable[[], Codec], latents: Tensor, index: int) -> Tensor:
        coder = codec()
        if self.clip is None or self.next > index:
            self.clip, self.next = coder.clip(*latents.shape[2:]), 0
        try:
            while self.next <= index:
                chunk = latents[:, self.next * self.size : (self.next + 1) * self.size]
                pixels = self.clip.decode(chunk.unsqueeze(0).to(self.device))
                self.next += 1
                self.beat()
            check_finite(pixels, f"chunk {index} of the decoded video has", "the VAE")
            return to_frames(pixels)
        except BaseException:
            self.clip = None  # what it keeps of the frames before may be of two times by now
            raise

    @property
    def parts(self) -> None:
        return None

    @property
    def begun(self) -> bool:
        return self.clip is not None

    @property
    def rests(self) -> bool:
        return self.clip is None

    @property
    def nbytes(self) -> int:
        return 0 if self.clip is None else self.clip.nbytes


@dataclass(slots=True)
class TileDecoding:
    """A part in each quantum: first the lowest level of all frames, then tile after tile, each of all frames. With the
    last, chunks are there to be handed out. A part that fails leaves those before it as they are."""

    size: int
    """Latent frames of a chunk."""
    beat: Callable[[], None]
    """As in `Links`."""
    device: torch.device
    tiles: list[Tile] = field(default_factory=list)
    """Empty: nothing is done yet."""
    next: int = 0
    kept: Kept = field(default_factory=list)
    """Until the last tile is done."""
    frames: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """All of the clip's, [F, H, W, 3] uint8, as far as they are decoded."""
    stride: int = 0
    """Frames per latent frame after the first."""

    def chunk(self, codec: Callable[[], Codec], latents: Tensor, index: int) -> Tensor | None:
        if not self.tiles:
            self._begin(codec(), latents)
        elif self.next < len(self.tiles):
            self._decode(codec(), self.tiles[self.next])
        if not self.tiles or self.next < len(self.tiles):
            return None
        first, stop = (max(0, (i * self.size - 1) * self.stride + 1) for i in (index, index + 1))
        return self.frames[first:stop]

    @property
    def parts(self) -> Parts:
        return Parts(self.next + 1, len(self.tiles) + 1)

    @property
    def begun(self) -> bool:
        return bool(self.tiles)

    @property
    def rests(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return self.frames.nbytes + nbytes_of(self.kept)

    def _begin(self, codec: Codec, latents: Tensor) -> None:
        scale, (count, height, width) = codec.config.spatial_stride, latents.shape[1:]
        tiles = codec.tiles_to_decode(height, width, self.size, TILE_BUDGET)
        self.kept = codec.decode_lowest(latents.unsqueeze(0).to(self.device), self.size, self.beat)
        self.stride = codec.config.temporal_stride
        shape = ((count - 1) * self.stride + 1, height * scale, width * scale, 3)
        self.frames = torch.empty(shape, dtype=torch.uint8)
        self.tiles = tiles

    def _decode(self, codec: Codec, tile: Tile) -> None:
        for piece in codec.decode_tile(self.kept, tile):
            check_finite(piece.pixels, "the decoded video has", "the VAE")
            part = to_frames(piece.pixels)
            t, h, w = (slice(at, at + n) for at, n in zip(piece[:3], part.shape[:3], strict=True))
            self.frames[t, h, w] = part.cpu()
            self.beat()
        self.next += 1
        if self.next == len(self.tiles):
            self.kept = []


class TileEncoding:
    """An init file: tile after tile, each of all frames, then the lowest level. A part that fails leaves those before
    it as they are. The file is read with the first tile, and kept for the others: to read it for each would mix two
    files if another took its place meanwhile."""

    def __init__(self, job: Job, size: int, beat: Callable[[], None], codec: Codec) -> None:
        """size: latent frames of a chunk."""
        stride, scale = codec.config.temporal_stride, codec.config.spatial_stride
        self._beat = beat
        self._chunks = InitChunks(job, size * stride, kept=True)
        self._height, self._width = job.height // scale, job.width // scale
        longest = max(1, min(size, (self._chunks.count - 1) // stride))
        self._tiles = codec.tiles_to_encode(self._height, self._width, longest, TILE_BUDGET)
        self._next = 0
        self._kept: Kept = []

    def part(self, codec: Codec) -> Tensor | None:
        """Do the next part; after the last, the latents [1, z, T, h, w]. Raises `BadRequest`."""
        if self._next == len(self._tiles):
            return codec.encode_lowest(self._kept)
        tile = self._tiles[self._next]
        codec.encode_tile(self._chunks, self._height, self._width, tile, self._kept, self._beat)
        self._next += 1
        return None

    @property
    def parts(self) -> Parts:
        """How far the clip is before the last part."""
        return Parts(self._next, len(self._tiles) + 1)

    @property
    def nbytes(self) -> int:
        """Of the memory between quanta."""
        return self._chunks.nbytes + nbytes_of(self._kept)


def encode_untiled(job: Job, size: int, codec: Codec, device: torch.device, beat: Callable[[], None]) -> Tensor:
    """An init file, `size` latent frames at a time: the latents [1, z, T, h, w]. Raises `BadRequest`."""
    clip = codec.clip(job.height // codec.config.spatial_stride, job.width // codec.config.spatial_stride)
    latents = []
    for chunk in InitChunks(job, size * codec.config.temporal_stride):
        latents.append(clip.encode(chunk.to(device)))
        beat()
    return torch.cat(latents, dim=2)


class InitChunks(Iterable[Tensor]):
    """The clip that `job.init` stands for, [1, 3, frames, H, W] float32 at a time: the first frame, then `size` (a
    multiple of 4) frames each, which is what `encode_chunk` wants. The file is read as it is gone through: once, so
    that if it is gone through again, that is what was `kept`.

    start: the video, or the image held still. channels: the image, then mid-grey. first_frame: the image alone. All are
    scaled to cover the size and cropped in the centre. (The original does the same for first_frame; for channels it
    squeezes the picture into a size of about its own aspect, so that the crop here is of some pixels at most.)

    Resource handling: the file is open from the first chunk to the last one, or as long as this is there. Error
    handling: a chunk that cannot be read raises `BadRequest`.
    """

    def __init__(self, job: Job, size: int, *, kept: bool = False) -> None:
        """kept: what is read stays in memory, 3 bytes a pixel, so that it can be gone through again."""
        assert job.init is not None
        self._job, self._size, self._keeps = job, size, kept
        self._unread = init_frames(job)
        self._kept: list[Picture] = []

    @property
    def count(self) -> int:
        """Frames of the clip."""
        return 1 if self._job.init_as == "first_frame" else self._job.num_frames

    @property
    def nbytes(self) -> int:
        """Of what is kept; a still image is there once."""
        return sum({id(picture): picture.nbytes for picture in self._kept}.values())

    def __iter__(self) -> Iterator[Tensor]:
        job, count = self._job, self.count
        yield self._pixels(0, 1)
        for first in range(1, count, self._size):
            if job.init_as == "start":
                yield self._pixels(first, min(first + self._size, count))
            else:
                yield torch.zeros(()).expand(1, 3, min(self._size, count - first), job.height, job.width)
        self._unread.close()

    def _pixels(self, first: int, stop: int) -> Tensor:
        if self._keeps:
            self._kept += itertools.islice(self._unread, max(0, stop - len(self._kept)))
            pictures = self._kept[first:stop]
        else:
            pictures = list(itertools.islice(self._unread, stop - first))
        assert len(pictures) == stop - first, "what is not kept can be gone through once"
        return to_pixels(torch.from_numpy(np.stack(pictures)))


def init_frames(job: Job) -> Generator[Picture]:
    """Those that `job.init` has for the clip, at the request's size, as they are asked for. Raises `BadRequest`."""
    assert job.init is not None
    if job.init_as == "start":
        yield from read_frames(job.init, job.num_frames, job.height, job.width)
    else:
        yield fit(read_image(job.init), job.height, job.width)


def to_pixels(frames: Tensor) -> Tensor:
    """[T, H, W, 3] uint8 -> [1, 3, T, H, W] float32 in [-1, 1]."""
    return (frames.permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5) - 1


def to_frames(pixels: Tensor) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1] -> [T, H, W, 3] uint8, rounded to the nearest."""
    return pixels.squeeze(0).permute(1, 2, 3, 0).float().add(1).mul(127.5).round().to(torch.uint8)


def check_finite(values: Tensor, what: str, network: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{what} values that are not finite; check the weights of {network}")


def nbytes_of(kept: Kept) -> int:
    """Bytes of the tensors of `kept`, which are entries or in tuples; of one that is there twice, once."""
    fields = (value for entry in kept for value in (entry if isinstance(entry, tuple) else (entry,)))
    return sum({id(value): value.nbytes for value in fields if isinstance(value, Tensor)}.values())
