"""How the VAEs cut frames into tiles, from the shapes alone; needs no GPU.

    python -m tools.vae_cuts --out docs/results/vae-cuts.txt

Activations are those of the kernels in bfloat16, the border of zeros around each frame left out; work is the
multiplications above the lowest level, in times of untiled ones. What it takes in fact: `tools/bench_vae.py --parts
tiled tiled-encode`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from engine.models import load_model
from stages.models.blank import blank
from stages.models.vae import WanVae
from stages.models.vae_decode import FastDecoder
from stages.models.vae_encode import FastEncoder
from stages.models.vae_fast_tiles import TileDecoder, TileEncoder
from stages.models.vae_tiles import TILE_BUDGET, Costs, cut_latents, cut_pixels, plan
from stages.models.vae_walk import NoOperations

SIZES = {"wan2.1-t2v-1.3b": ((480, 832), (720, 1280)), "wan2.2-ti2v-5b": ((704, 1280),)}
"""Height and width."""
GIB = 2**30


def over(levels: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    """So much per pixel of each level, for frames of these sizes."""
    return sum(each * height * width for each, (height, width) in zip(levels, sizes, strict=True))


def slots(capacity: Mapping[tuple[int, int], int], levels: int) -> list[int]:
    """Bytes per pixel of each level."""
    found = [0] * levels
    for (level, channels), count in capacity.items():
        found[level] += 2 * channels * count
    return found


def line(model: str, what: str, height: int, width: int) -> str:
    config = load_model(model).vae
    with blank():
        vae = WanVae(config)
    costs: Costs
    if what == "decode":
        decoder = FastDecoder(vae, NoOperations(), torch.bfloat16)
        costs, capacity, cut = TileDecoder(decoder).costs, decoder.capacity, cut_pixels
    else:
        encoder = FastEncoder(vae, NoOperations(), torch.bfloat16)
        costs, capacity, cut = TileEncoder(encoder).costs, encoder.capacity, cut_latents
    levels, grid = len(costs.reach), (height // config.spatial_stride, width // config.spatial_stride)
    tiles = plan(*grid, costs, TILE_BUDGET, cut)
    window = [tiles[0].window.size(level) for level in range(levels)]
    full = [(grid[0] << level, grid[1] << level) for level in range(levels)]
    scale = config.patch_size if what == "decode" else config.spatial_stride
    rows, columns = tiles[0].rows.size * scale, tiles[0].columns.size * scale
    work = len(tiles) * over(costs.work, window) / over(costs.work, full)
    return (
        f"{model} {what} {width}x{height}: {len(tiles)} tiles of {columns}x{rows}, activations "
        f"{over(costs.nbytes, window) / GIB:.2f} GiB, untiled {over(slots(capacity, levels), full) / GIB:.2f}; "
        f"work {work:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the text goes there")
    args = parser.parse_args()
    lines = ["$ python -m tools.vae_cuts"]
    for model, sizes in SIZES.items():
        lines += [line(model, what, *size) for what in ("decode", "encode") for size in sizes]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
