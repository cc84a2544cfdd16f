"""Clips coded in tiles are the clips coded whole, with both VAEs and both codecs; and how tiles are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.models import load_model
from hotreload.checkpoint import open_checkpoint
from hotreload.weights import load_weights
from ipc.architecture import VaeConfig
from stages.models import vae_fast_tiles, vae_plain_tiles
from stages.models.vae import WanVae
from stages.models.vae_check import random_vae
from stages.models.vae_codec import Codec, FastCodec, PlainCodec, decode_tiles, encode_tiles
from stages.models.vae_tiles import Costs, Cut, Piece, Tile, cut_latents, cut_pixels, plan, tiles
from stages.models.vae_walk import TorchOperations
from stages.vae_clips import to_frames
from tests.stages.models.test_vae import (
    SMALL_22,
    UNUSUAL_22,
    make_config,
    make_model,
    pick_taps,
    random_frames,
    random_latents,
)

CPU = torch.device("cpu")
TINY = make_config(4, 3, 1, dim_mult=(1, 1, 2, 2))
KINDS = {"2.1": TINY, "2.2": SMALL_22, "unusual 2.2": UNUSUAL_22}


def codec_of(kind: str, vae: WanVae) -> Codec:
    return PlainCodec(vae) if kind == "plain" else FastCodec(vae, TorchOperations(), torch.float32)


def cut_into(monkeypatch: pytest.MonkeyPatch, down: int, across: int, short: int = 0) -> None:
    """Take this grid, whatever the budget is; with halos that are `short` pixels too small at the highest level."""

    def chosen(height: int, width: int, costs: Costs, budget: int, cut: Cut) -> list[Tile]:
        return list(tiles(height, width, down, across, (*costs.reach[:-1], costs.reach[-1] - short), cut))

    monkeypatch.setattr(vae_plain_tiles, "plan", chosen)
    monkeypatch.setattr(vae_fast_tiles, "plan", chosen)


def assemble(pieces: Iterator[Piece], like: Tensor) -> Tensor:
    """All pieces in their places, none of which is taken twice; their frames come in order."""
    whole, ends = torch.full_like(like, torch.nan), dict[tuple[int, int], int]()
    for frame, row, column, pixels in pieces:
        assert frame == ends.get((row, column), 0)
        ends[row, column] = frame + pixels.shape[2]
        part = whole[:, :, frame:, row:, column:][:, :, : pixels.shape[2], : pixels.shape[3], : pixels.shape[4]]
        assert part.shape == pixels.shape and part.isnan().all()
        part.copy_(pixels)
    return whole


def whole_clip(codec: Codec, latents: Tensor) -> Tensor:
    """Untiled, a latent frame at a time."""
    clip = codec.clip(*latents.shape[3:])
    return torch.cat([clip.decode(part) for part in latents.split(1, dim=2)], dim=2)


def agree(got: Tensor, expected: Tensor) -> None:
    """The same but for the order of sums, 2e-6; and as uint8, at most 1 of 255 in 0.01 % of values."""
    assert float((got - expected).abs().max()) <= 2e-6
    apart = (to_frames(got).int() - to_frames(expected).int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) <= 1e-4


@pytest.mark.parametrize("codec", ["plain", "fast"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "grid"),
    [((3, 5, 7), (2, 3)), ((1, 7, 3), (5, 1)), ((2, 3, 4), (1, 1)), ((6, 2, 9), (1, 4)), ((2, 1, 1), (3, 2))],
)
@torch.inference_mode()
def test_tiles_are_the_whole(
    size: tuple[int, int, int], grid: tuple[int, int], kind: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, tiles that do not divide them, one tile, one frame, one latent, many chunks."""
    cut_into(monkeypatch, *grid)
    coder = codec_of(codec, random_vae(KINDS[kind], CPU))
    latents = random_latents(KINDS[kind], *size)
    expected = whole_clip(coder, latents)
    assert expected.abs().mean() < 0.9, "the comparison is worthless where most pixels are clamped"
    agree(assemble(decode_tiles(coder, latents), expected), expected)


@pytest.mark.parametrize("codec", ["plain", "fast"])
@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@torch.inference_mode()
def test_a_halo_that_is_one_too_small(kind: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one pixel less at the highest level alone, pixels at the seams are far off. (The middle one of
    three tiles has no pixel to spare: its edges are no edges of the frame, and its window begins at an even pixel.)"""
    cut_into(monkeypatch, 1, 3, short=1)
    coder = codec_of(codec, random_vae(KINDS[kind], CPU))
    latents = random_latents(KINDS[kind], 2, 2, 24)
    expected = whole_clip(coder, latents)
    got = assemble(decode_tiles(coder, latents), expected)
    assert float((got - expected).abs().max()) > 1e-3
    cut_into(monkeypatch, 1, 3)
    agree(assemble(decode_tiles(coder, latents), expected), expected)


def clip_in_chunks(config: VaeConfig, frames: int, height: int, width: int) -> list[Tensor]:
    """The first frame, then four at a time, of a clip of height x width latents."""
    clip = random_frames(frames, height * config.spatial_stride, width * config.spatial_stride)
    return [clip[:, :, :1], *(clip[:, :, 1:].split(4, dim=2) if frames > 1 else ())]


def encode_whole(codec: Codec, chunks: list[Tensor], height: int, width: int) -> Tensor:
    clip = codec.clip(height, width)
    return torch.cat([clip.encode(chunk) for chunk in chunks], dim=2)


@pytest.mark.parametrize("codec", ["plain", "fast"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "grid"), [((9, 5, 7), (2, 3)), ((1, 7, 3), (5, 1)), ((5, 3, 4), (1, 1))])
@torch.inference_mode()
def test_encoding_in_tiles(
    size: tuple[int, int, int], grid: tuple[int, int], kind: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latents are those of the clip encoded untiled but for the order of sums, 1e-5; of one tile, bit for bit."""
    cut_into(monkeypatch, *grid)
    coder, beats = codec_of(codec, random_vae(KINDS[kind], CPU)), list[int]()
    chunks = clip_in_chunks(KINDS[kind], *size)
    expected = encode_whole(coder, chunks, *size[1:])
    got = encode_tiles(coder, chunks, *size[1:], beat=lambda: beats.append(1))
    assert torch.equal(got, expected) if grid == (1, 1) else float((got - expected).abs().max()) <= 1e-5
    assert len(beats) == len(chunks) * len(list(tiles(*size[1:], *grid, (0, 0, 0, 0), cut_latents)))


@pytest.mark.parametrize("codec", ["plain", "fast"])
@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@torch.inference_mode()
def test_encoding_with_a_halo_that_is_one_too_small(kind: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one pixel less at the highest level alone, latents at the seams are far off."""
    coder, chunks = codec_of(codec, random_vae(KINDS[kind], CPU)), clip_in_chunks(KINDS[kind], 1, 1, 9)
    expected = encode_whole(coder, chunks, 1, 9)
    cut_into(monkeypatch, 1, 3)
    assert float((encode_tiles(coder, chunks, 1, 9) - expected).abs().max()) <= 5e-6
    cut_into(monkeypatch, 1, 3, short=1)
    assert float((encode_tiles(coder, chunks, 1, 9) - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("codec", ["plain", "fast"])
@torch.inference_mode()
def test_encoding_wrong_frames(codec: str) -> None:
    """As untiled: ValueError."""
    coder = codec_of(codec, random_vae(TINY, CPU))
    with pytest.raises(ValueError, match=r"must be 4n\+1 in the first chunk, got 4"):
        encode_tiles(coder, [random_frames(4, 16, 16)], 2, 2)


@pytest.mark.parametrize("codec", ["plain", "fast"])
@pytest.mark.parametrize("residual", [False, True])
@torch.inference_mode()
def test_bit_for_bit(residual: bool, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution takes one value of its input, so that no sum has an order: all pixels are equal."""
    config = make_config(16, 16, 1, is_residual=residual, patch_size=2 if residual else 1)
    vae = make_model(config, pick_taps(WanVae(config)).state_dict())
    cut_into(monkeypatch, 2, 2)
    coder, latents = codec_of(codec, vae), random_latents(config, 2, 4, 6)
    expected = whole_clip(coder, latents)
    assert torch.equal(assemble(decode_tiles(coder, latents), expected), expected)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
@torch.inference_mode()
def test_the_demo_model(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained VAE that ships, with what computes on a CPU."""
    config = load_model("wan-demo").vae
    with torch.device("meta"):
        vae = WanVae(config)
    found = open_checkpoint(Path("configs/demo"), ("vae",)).components["vae"]
    load_weights(vae, found, device="cpu", dtype=lambda name: torch.float32)
    cut_into(monkeypatch, *grid)
    codec, latents = PlainCodec(vae), random_latents(config, 3, 8, 9)
    expected = whole_clip(codec, latents)
    beats: list[int] = []
    got = assemble(decode_tiles(codec, latents, beat=lambda: beats.append(1)), expected)
    agree(got, expected)
    assert len(beats) == 3


FULL = Costs(reach=(0, 6, 6, 7), nbytes=(8, 4, 2, 1), work=(0, 32, 8, 2))


@pytest.mark.parametrize(("height", "width"), [(60, 104), (90, 160), (13, 5)])
def test_the_choice_of_tiles(height: int, width: int) -> None:
    """All tiles cover the frame once; windows of a level are of one size, inside the frame, and hold what the level
    above needs; the activations fit the budget. Less memory is more work; all of the frame, where that fits."""
    done = [0.0]
    for budget in (1 << 30, 1 << 17, 1 << 14):
        chosen = plan(height, width, FULL, budget, cut_pixels)
        covered = torch.zeros(height * 8, width * 8)
        for tile in chosen:
            (top, h), (left, w) = tile.rows, tile.columns
            covered[top : top + h, left : left + w] += 1
            for spans, length in ((tile.window.rows, height), (tile.window.columns, width)):
                for level, (start, size) in enumerate(spans):
                    assert start >= 0 and start + size <= length << level
                    below = spans[level - 1] if level else None
                    if below is not None:
                        margin = 1 + FULL.reach[level - 1]
                        assert start % 2 == size % 2 == 0
                        assert below.start <= max(0, start // 2 - margin)
                        end = min(length << level - 1, (start + size) // 2 + margin)
                        assert below.start + below.size >= end
        assert bool((covered == 1).all())
        assert len({tuple(tile.window.size(level) for level in range(4)) for tile in chosen}) == 1
        areas = [h * w for h, w in (chosen[0].window.size(level) for level in range(4))]
        assert sum(n * area for n, area in zip(FULL.nbytes, areas, strict=True)) <= max(budget, 1 << 16)
        done.append(len(chosen) * sum(n * area for n, area in zip(FULL.work, areas, strict=True)))
        assert done[-1] >= done[-2]
    assert len(plan(height, width, FULL, 1 << 30, cut_pixels)) == 1


@torch.inference_mode()
def test_memory_of_a_tile() -> None:
    """What is planned is what the pools take and no slot is left over, for any number of frames; a budget that no tile
    fits takes the smallest."""
    codec = FastCodec(random_vae(TINY, CPU), TorchOperations(), torch.float32)
    decoder = codec.tile_decoder
    budget = sum(n * 2 * 12 << 2 * level for level, n in enumerate(decoder.costs.nbytes)) * 3 // 4
    for frames in (1, 5):
        pieces = list(decode_tiles(codec, random_latents(TINY, frames, 2, 12), budget=budget))
        assert len({piece.column for piece in pieces}) > 1
    smallest = plan(2, 12, decoder.costs, 0, cut_pixels)
    assert len(smallest) > len(plan(2, 12, decoder.costs, budget, cut_pixels))
    clip = decoder._decoder.clip_of(smallest[0].window, decoder._capacity)
    for level, channels in decoder._capacity:
        clip.pool(level, channels)
    areas = [h * w for h, w in (smallest[0].window.size(level) for level in range(4))]
    pixels = 4 * (9 + 4 * 3) * areas[-1]
    planned = sum(n * area for n, area in zip(decoder.costs.nbytes, areas, strict=True)) - pixels
    assert planned == sum(pool.pixels(slot).nbytes for pool in clip.pools.values() for slot in range(len(pool.frames)))
