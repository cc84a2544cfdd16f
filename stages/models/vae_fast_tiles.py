"""Whole clips tile by tile (`stages/models/vae_tiles.py`) with `FastDecoder` and `FastEncoder`.

The middle and the lowest level, which are small, see whole frames. What lies between them and the tiles is kept on the
host; each tile takes its part of it through the levels above, with causal caches of its own, in frame pools that are
given back with the tile. So nothing is on the device between two tiles.

Bit for bit what the untiled clip gives, where the sum of an output pixel does not depend on where the pixel is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from stages.models.vae_decode import FastDecoder, Frame
from stages.models.vae_encode import FastEncoder
from stages.models.vae_frames import ZERO_SLOT, FramePool
from stages.models.vae_tiles import Costs, Piece, Tile, cut_latents, cut_pixels, plan
from stages.models.vae_walk import Clip

GROUPS = (4, 2, 2, 1)
"""As in `stages/models/vae_decode.py`; smaller, because here memory decides how large a tile is."""


class Kept(NamedTuple):
    """A frame that the lowest level has made, on the host."""

    frame: Tensor
    """[h, w, C]."""
    source: Tensor | None
    """[h, w, C'], the level's input where it is added, of which this is frame `half`; the same tensor for both."""
    half: int


Sunk: TypeAlias = tuple[Tensor, Tensor]
"""What the encoder's lowest level is to see of a latent frame, and the norm of it, on the host, [h, w, C] each."""


class TileDecoder:
    """Decodes whole clips with the weights of a `FastDecoder`."""

    def __init__(self, decoder: FastDecoder) -> None:
        self._decoder = decoder.regrouped(GROUPS)
        self._group = GROUPS[1]
        self._capacity = self._decoder.count_slots(self._decode_some)

    def tiles(self, height: int, width: int, budget: int) -> list[Tile]:
        """Of clips of height x width latents. budget: bytes of a tile's activations."""
        return plan(height, width, self.costs, budget, cut_pixels)

    def lowest(self, latents: Tensor, beat: Callable[[], None]) -> list[Kept]:
        """Normalised latents [1, z, T, h, w] of a whole clip through the middle and the lowest level. beat: called
        after every group."""
        decoder, kept = self._decoder, []
        height, width = latents.shape[3:]
        clip = decoder.clip(height, width)
        for part in decoder.prepare(latents, height, width):
            frames = decoder.lowest(clip, part)
            pool, sources = self._pools(clip)
            slots = {frame.source for frame in frames} if decoder.levels[0].repeats else set()
            added = {slot: sources.pixels(slot).to("cpu", copy=True) for slot in slots}
            for frame in frames:
                pixels = pool.pixels(frame.slot).to("cpu", copy=True)
                kept.append(Kept(pixels, added.get(frame.source), frame.half))
            pool.give([frame.slot for frame in frames])
            sources.give([frame.source for frame in frames if frame.last])
            beat()
        return kept

    def tile(self, kept: list[Kept], tile: Tile) -> Iterator[Piece]:
        """What `lowest` gives -> all pixels of a tile, as `FastDecoder.decode_chunk` gives them, in their order."""
        decoder, patch, frame = self._decoder, self._decoder.config.patch_size, 0
        clip = decoder.clip_of(tile.window, self._capacity)
        for first in range(0, len(kept), self._group):
            part = kept[first : first + self._group]
            pixels = decoder.pixels_of(clip, len(part) * self._multiple)
            count = decoder.rise(clip, 0, self._load(clip, part), pixels)
            cropped = decoder.finish(tile.crop(pixels[:count]))
            yield Piece(frame, tile.rows.start * patch, tile.columns.start * patch, cropped)
            frame += count

    @cached_property
    def costs(self) -> Costs:
        """What a tile takes."""
        levels, conv_out = self._decoder.levels, self._decoder.conv_out
        nbytes, work, frames = [0] * len(levels), [0], 1
        for (level, channels), slots in self._capacity.items():
            nbytes[level] += slots * channels * self._decoder.conv_in.weight.element_size()
        # Pixels in float32: the columns that `sum_columns` adds up, and their sums.
        nbytes[-1] += 4 * (GROUPS[-1] * conv_out.channels + self._group * self._multiple * conv_out.channels // 3)
        for below, above in pairwise(levels):
            frames *= below.time
            work.append(frames * above.blocks[-1].conv2.channels ** 2)
        reach = [0, *(2 * len(level.blocks) for level in levels[1:])]
        reach[-1] += 1
        return Costs(tuple(reach), tuple(nbytes), tuple(work))

    @property
    def _multiple(self) -> int:
        """Frames of the clip that one of `Kept` becomes, at most."""
        return self._decoder.config.temporal_stride // self._decoder.levels[0].time

    def _load(self, clip: Clip, kept: list[Kept]) -> list[Frame]:
        """The clip's window of frames, in slots of the lowest level."""
        pool, sources = self._pools(clip)
        frames = []
        for frame, source, half in kept:
            slot = pool.take(1)[0]
            pool.pixels(slot).copy_(clip.window.cut(frame, 0))
            if source is None:
                frames.append(Frame(slot))
                continue
            into = sources.take(1)[0]
            sources.pixels(into).copy_(clip.window.cut(source, 0))
            frames.append(Frame(slot, into, half))
        return frames

    def _decode_some(self, clip: Clip) -> None:
        """A tile's first frames, which take as many slots as any."""
        pool, sources = self._pools(clip)
        for _ in range(4):
            slots = pool.take(self._group)
            shortcut = sources.take(self._group) if self._decoder.levels[0].repeats else [ZERO_SLOT] * self._group
            frames = [Frame(slot, source) for slot, source in zip(slots, shortcut, strict=True)]
            self._decoder.rise(clip, 0, frames, torch.empty(0))

    def _pools(self, clip: Clip) -> tuple[FramePool, FramePool]:
        """Of the lowest level: its frames before they are made larger, and its input."""
        blocks = self._decoder.levels[0].blocks
        return clip.pool(0, blocks[-1].conv2.channels), clip.pool(0, blocks[0].conv1.channels_in)


class TileEncoder:
    """Encodes whole clips with a `FastEncoder`."""

    def __init__(self, encoder: FastEncoder) -> None:
        self._encoder = encoder
        self._capacity = encoder.count_slots(self._encode_some)

    def tiles(self, height: int, width: int, budget: int) -> list[Tile]:
        """Of clips of height x width latents. budget: bytes of a tile's activations."""
        return plan(height, width, self.costs, budget, cut_latents)

    def tile(
        self, chunks: Iterable[Tensor], height: int, width: int, tile: Tile, kept: list[Sunk], beat: Callable[[], None]
    ) -> None:
        """All frames of a clip of height x width latents, in chunks as `FastEncoder.encode_chunk` takes them and on any
        device -> a tile of what the lowest level is to see of each latent frame, which is `kept` on the host and made
        by the first tile. beat: called after every chunk."""
        encoder, at = self._encoder, 0
        clip = encoder.clip_of(tile.window, self._capacity)
        for chunk in chunks:
            encoder.check(chunk, height, width, clip.first)
            part = tile.window.cut_frames(chunk, encoder.config.patch_size).to(clip.device)
            for group in encoder.groups(part, clip.first):
                if at == len(kept):
                    shape = height, width, encoder.stages[-1].blocks[0].conv1.channels_in
                    kept.append((torch.empty(shape, dtype=clip.dtype), torch.empty(shape, dtype=clip.dtype)))
                self._keep(clip, encoder.descend(group, clip), kept[at])
                at += 1
            beat()

    def lowest(self, kept: list[Sunk]) -> Tensor:
        """What all tiles have `kept` -> normalised latents [1, z, T, h, w]."""
        height, width = kept[0][0].shape[:2]
        clip = self._encoder.clip(height, width)
        pool = clip.pool(0, self._encoder.stages[-1].blocks[0].conv1.channels_in)
        moments = self._encoder.moments_of(clip, len(kept))
        for i, frames in enumerate(kept):
            slots = pool.take(2)
            for slot, frame in zip(slots, frames, strict=True):
                pool.pixels(slot).copy_(frame)
            self._encoder.rest(slots[:1], slots[1:], clip, moments[i : i + 1])
        return self._encoder.finish(moments)

    @cached_property
    def costs(self) -> Costs:
        """What a tile takes."""
        stages, frames = self._encoder.stages[::-1], 1
        nbytes, work = [0] * len(stages), [0]
        for (level, channels), slots in self._capacity.items():
            nbytes[level] += slots * channels * self._encoder.conv_in.weight.element_size()
        for stage in stages[1:]:
            frames *= 1 if stage.halve_time is None else 2
            work.append(frames * stage.blocks[-1].conv2.channels ** 2)
        reach = [0, *(2 * len(stage.blocks) for stage in stages[1:])]
        reach[-1] += 1
        return Costs(tuple(reach), tuple(nbytes), tuple(work))

    def _keep(self, clip: Clip, slots: tuple[list[int], list[int]], kept: Sunk) -> None:
        """A frame, and its norm, to their place in the whole frame; their slots are given back."""
        pool = clip.pool(0, self._encoder.stages[-1].blocks[0].conv1.channels_in)
        for (slot,), whole in zip(slots, kept, strict=True):
            clip.window.cut(whole, 0).copy_(pool.pixels(slot))
            pool.give([slot])

    def _encode_some(self, pixels: Tensor, clip: Clip) -> None:
        """One group, of which the first few take as many slots as any."""
        raw, normed = self._encoder.descend(pixels, clip)
        clip.pool(0, self._encoder.stages[-1].blocks[0].conv1.channels_in).give(raw + normed)
