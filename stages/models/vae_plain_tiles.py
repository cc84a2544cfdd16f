"""Whole clips tile by tile (`stages/models/vae_tiles.py`) with `WanVae`, in plain torch.

The middle and the lowest blocks, which are small, see whole frames. What lies between them and the tiles is kept on the
host; each tile takes its part of it through the levels above, a few latent frames at a time, with causal caches of its
own. So nothing is on the device between two tiles.

On a CPU the result is that of the same chunks untiled, bit for bit but where a library goes about sums or the end of a
tensor in another way because of its shape: see `stages/models/vae.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from stages.models.vae import DownBlock, ResidualUpBlock, UpBlock, WanVae
from stages.models.vae_layers import Cache, Downsample, ResBlock, average_down, fold_pixels, unfold_pixels
from stages.models.vae_tiles import Costs, Piece, Tile, Window, cut_latents, cut_pixels, plan

WORKING_FRAMES = 5
"""Tensors of a chunk's size that a residual block has at once, roughly."""

Risen: TypeAlias = tuple[Tensor, Tensor]
"""Of a chunk, on the host, [1, t, h, w, C]: the frames that the lowest level enlarges, and its input."""


def tiles_to_decode(vae: WanVae, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
    """Of clips of height x width latents. chunk: latent frames at a time. budget: bytes of a tile's activations."""
    return plan(height, width, decoder_costs(vae, chunk), budget, cut_pixels)


def decode_lowest(vae: WanVae, latents: Tensor, chunk: int, beat: Callable[[], None]) -> list[Risen]:
    """Normalised latents [1, z, T, h, w] of a whole clip through the middle and the lowest level. beat: called after
    every chunk."""
    decoder, lowest = vae.decoder, vae.decoder.up_blocks[0]
    assert isinstance(lowest, UpBlock | ResidualUpBlock)
    cache: Cache = {}
    kept = []
    for part in latents.split(chunk, dim=2):
        x = vae.denormalise(part).movedim(1, -1).to(vae.quant_conv.weight.dtype).contiguous()
        x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(x), cache), cache)
        frames = lowest.frames(x, cache)
        kept.append((frames.cpu(), (x if isinstance(lowest, ResidualUpBlock) else x[:, :0]).cpu()))
        beat()
    return kept


def decode_tile(vae: WanVae, kept: list[Risen], tile: Tile) -> Iterator[Piece]:
    """What `decode_lowest` gives -> all pixels of a tile, in [-1, 1], a chunk at a time."""
    frame = 0
    cache: Cache = {}
    row, column = (span.start * vae.config.patch_size for span in (tile.rows, tile.columns))
    for frames, x in kept:
        pixels = _tile(vae, frames, x, tile, cache).movedim(-1, 1).clamp(-1, 1)
        yield Piece(frame, row, column, pixels)
        frame += pixels.shape[2]


def tiles_to_encode(vae: WanVae, height: int, width: int, chunk: int, budget: int) -> list[Tile]:
    """As `tiles_to_decode`. chunk: latent frames that the longest chunk becomes."""
    return plan(height, width, encoder_costs(vae, chunk), budget, cut_latents)


def encode_tile(
    vae: WanVae, chunks: Iterable[Tensor], height: int, width: int, tile: Tile, kept: list[Tensor],
    beat: Callable[[], None],
) -> None:  # fmt: skip
    """All frames of a clip of height x width latents, in chunks as `WanVae.encode_chunk` takes them and on any device
    -> a tile of what the lowest level is to see of each, which is `kept` on the host and made by the first tile. beat:
    called after every chunk."""
    upper = _halves(vae)[0]
    cache: Cache = {}
    for i, chunk in enumerate(chunks):
        vae.check_frames(chunk, first=not cache)
        part = _descend(vae, upper, chunk, tile.window, cache)
        if i == len(kept):
            kept.append(torch.empty(*part.shape[:2], height, width, part.shape[-1], dtype=part.dtype))
        tile.window.cut(kept[i], 0).copy_(part)
        beat()


def encode_lowest(vae: WanVae, kept: list[Tensor]) -> Tensor:
    """What all tiles have `kept` -> normalised latents [1, z, T, h, w]."""
    lower, encoder, latents = _halves(vae)[1], vae.encoder, []
    cache: Cache = {}
    for x in kept:
        x = x.to(vae.quant_conv.weight.device)
        for module in lower:
            x = module(x, cache)
        x = encoder.conv_out(encoder.norm_out.silu(encoder.mid_block(x, cache)), cache)
        latents.append(vae.normalise(vae.quant_conv(x).movedim(-1, 1).chunk(2, dim=1)[0]))
    return torch.cat(latents, dim=2)


def decoder_costs(vae: WanVae, chunk: int) -> Costs:
    """Of `vae` in the dtype of its weights; the lowest level is all but free, as it is only read or written."""
    upper = [list(_resnets([block])) for block in vae.decoder.up_blocks][1:]
    return _costs(vae, upper, list(reversed(vae.config.temporal_downsample)), chunk)


def encoder_costs(vae: WanVae, chunk: int) -> Costs:
    """See `decoder_costs`."""
    stages: list[list[ResBlock]] = [[]]
    for module in _halves(vae)[0]:
        stages[-1] += _resnets([module])
        if not isinstance(module, ResBlock):
            stages.append([])
    return _costs(vae, stages[-2::-1], list(reversed(vae.config.temporal_downsample)), chunk)


def _costs(vae: WanVae, levels: list[list[ResBlock]], doubles: list[bool], chunk: int) -> Costs:
    """Of levels above the lowest, each with its residual blocks and whether it has twice the frames of the one below.
    One more convolution is at the highest."""
    item, frames = vae.quant_conv.weight.element_size(), chunk
    reach, nbytes, work = [0], [0], [0]
    for resnets, time in zip(levels, doubles, strict=True):
        frames *= 2 if time else 1
        width = max(norm.gamma.numel() for resnet in resnets for norm in (resnet.norm1, resnet.norm2))
        reach.append(2 * len(resnets))
        nbytes.append((2 * reach[-1] + WORKING_FRAMES * (frames + 2)) * width * item)
        work.append(frames * width**2)
    reach[-1] += 1
    return Costs(tuple(reach), tuple(nbytes), tuple(work))


def _resnets(modules: list[nn.Module]) -> Iterator[ResBlock]:
    for module in modules:
        yield from (found for found in module.modules() if isinstance(found, ResBlock))


def _halves(vae: WanVae) -> tuple[list[nn.Module], list[nn.Module]]:
    """The encoder's modules up to the last that halves the size, and those after it."""
    modules = list(vae.encoder.down_blocks)
    ends = [
        i for i, module in enumerate(modules)
        if isinstance(module, Downsample) or (isinstance(module, DownBlock) and module.downsampler is not None)
    ]  # fmt: skip
    return modules[: ends[-1] + 1], modules[ends[-1] + 1 :]


def _descend(vae: WanVae, modules: list[nn.Module], frames: Tensor, window: Window, cache: Cache) -> Tensor:
    """The window of frames [1, 3, T, H, W] of the whole size through all levels but the lowest, [1, t, h, w, C]."""
    level, weight = len(window.rows) - 1, vae.quant_conv.weight
    frames = window.cut_frames(frames, vae.config.patch_size).to(weight.device, weight.dtype)
    x = vae.encoder.conv_in(fold_pixels(frames.movedim(1, -1), vae.config.patch_size).contiguous(), cache)
    for module in modules:
        if isinstance(module, ResBlock):
            x = module(x, cache)
            continue
        y, down = x, module
        if isinstance(module, DownBlock):
            for resnet in module.resnets:
                y = resnet(y, cache)
            assert module.downsampler is not None
            down = module.downsampler
        # What makes the window of the level below: 2n rows, and one more if they are not the frame's last.
        (row, column), (height, width) = window.source(level), window.size(level - 1)
        y = down(y[:, :, row : row + 2 * height + 1, column : column + 2 * width + 1].contiguous(), cache)
        if isinstance(module, DownBlock):
            x = x[:, :, row : row + 2 * height, column : column + 2 * width]
            y = y + average_down(x, y.shape[-1], *module.shortcut)
        x, level = y, level - 1
    return x


def _tile(vae: WanVae, frames: Tensor, x: Tensor, tile: Tile, cache: Cache) -> Tensor:
    """The tile's pixels of one chunk [1, t, H, W, 3], before the clamp."""
    decoder, window = vae.decoder, tile.window
    lowest, *blocks = decoder.up_blocks
    assert isinstance(lowest, UpBlock | ResidualUpBlock)
    device = vae.quant_conv.weight.device
    frames, x = (window.cut(part, 0).to(device).contiguous() for part in (frames, x))
    x = lowest.enlarge(frames, x)
    for level, block in enumerate(blocks):
        x = block(window.follow(x, level).contiguous(), cache)
    x = decoder.conv_out(decoder.norm_out.silu(x), cache)
    return unfold_pixels(tile.crop(x), vae.config.patch_size)
