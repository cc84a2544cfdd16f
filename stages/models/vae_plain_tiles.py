"""Decoding a whole clip with `WanVae` tile by tile (`stages/models/vae_tiles.py`), in plain torch.

The middle and the lowest blocks, which are small, see whole frames. What they make is kept on the host; each tile takes
its part of it through the levels above, a few latent frames at a time, with causal caches of its own.

On a CPU the result is that of the same chunks untiled, bit for bit but where a library goes about sums or the end of a
tensor in another way because of its shape: see `stages/models/vae.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from stages.models.vae import ResidualUpBlock, UpBlock, WanVae
from stages.models.vae_layers import Cache, unfold_pixels
from stages.models.vae_tiles import Costs, Piece, Tile, plan

WORKING_FRAMES = 5
"""Tensors of a chunk's size that a residual block has at once, roughly."""


def decode_tiles(vae: WanVae, latents: Tensor, chunk: int, budget: int, beat: Callable[[], None]) -> Iterator[Piece]:
    """Normalised latents [1, z, T, h, w] of a whole clip -> all its pixels, in [-1, 1]; of a tile, frames come in
    order. chunk: latent frames at a time. budget: bytes of a tile's activations. beat: called before the first piece
    comes."""
    height, width = latents.shape[3:]
    chosen = plan(height, width, costs(vae, chunk), budget)
    kept = list(_lowest(vae, latents, chunk, beat))
    for tile in chosen:
        frame = 0
        cache: Cache = {}
        for frames, x in kept:
            pixels = _tile(vae, frames, x, tile, cache).movedim(-1, 1).clamp(-1, 1)
            row, column = (span.start * vae.config.patch_size for span in (tile.rows, tile.columns))
            yield Piece(frame, row, column, pixels)
            frame += pixels.shape[2]


def costs(vae: WanVae, chunk: int) -> Costs:
    """Of `vae` in the dtype of its weights; the lowest level is all but free, as it is only read."""
    item, frames = vae.quant_conv.weight.element_size(), chunk
    reach, nbytes, work = [0], [0], [0]
    doubles = reversed(vae.config.temporal_downsample)
    for block, time in zip(list(vae.decoder.up_blocks)[1:], doubles, strict=True):
        frames *= 2 if time else 1
        assert isinstance(block, UpBlock | ResidualUpBlock)
        width = vae.decoder.norm_out.gamma.numel()
        for resnet in block.resnets:
            width = max(width, *(resnet.get_parameter(f"norm{i}.gamma").numel() for i in (1, 2)))
        reach.append(2 * len(block.resnets))
        nbytes.append((2 * reach[-1] + WORKING_FRAMES * (frames + 2)) * width * item)
        work.append(frames * width**2)
    reach[-1] += 1
    return Costs(tuple(reach), tuple(nbytes), tuple(work))


def _lowest(vae: WanVae, latents: Tensor, chunk: int, beat: Callable[[], None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each chunk, on the host, [1, t, h, w, C]: the frames that the lowest level enlarges, and its input."""
    decoder = vae.decoder
    cache: Cache = {}
    lowest = decoder.up_blocks[0]
    assert isinstance(lowest, UpBlock | ResidualUpBlock)
    for part in latents.split(chunk, dim=2):
        x = vae.denormalise(part).movedim(1, -1).to(vae.quant_conv.weight.dtype).contiguous()
        x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(x), cache), cache)
        frames = lowest.frames(x, cache)
        yield frames.cpu(), (x if isinstance(lowest, ResidualUpBlock) else x[:, :0]).cpu()
        beat()


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
