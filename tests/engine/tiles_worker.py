"""`stages.worker` whose vae cuts every clip into six tiles, each of which takes $TILE_SECONDS longer than it would,
without a sign of life meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from stages.models import vae_plain_tiles
from stages.models.vae_codec import PlainCodec
from stages.models.vae_tiles import Costs, Cut, Tile, tiles
from stages.worker import main

TILES = 6
PARTS = TILES + 1
"""With the lowest level."""
TILE_SECONDS = 0.25
"""Unless the environment says another number."""

decode_tile, encode_tile = PlainCodec.decode_tile, PlainCodec.encode_tile


def chosen(height: int, width: int, costs: Costs, budget: int, cut: Cut) -> list[Tile]:
    return list(tiles(height, width, 2, 3, costs.reach, cut))


def decode_slowly(codec: PlainCodec, kept: list[Any], tile: Tile) -> Iterator[Any]:
    time.sleep(float(os.environ.get("TILE_SECONDS", TILE_SECONDS)))
    return decode_tile(codec, kept, tile)


def encode_slowly(codec: PlainCodec, *rest: Any) -> None:
    time.sleep(float(os.environ.get("TILE_SECONDS", TILE_SECONDS)))
    encode_tile(codec, *rest)


if __name__ == "__main__":
    vae_plain_tiles.plan = chosen
    PlainCodec.decode_tile = decode_slowly  # type: ignore[method-assign]
    PlainCodec.encode_tile = encode_slowly  # type: ignore[method-assign]
    main()
