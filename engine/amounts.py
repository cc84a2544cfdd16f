"""Amounts as people read them."""

from __future__ import annotations


def size(value: float) -> str:
    """Bytes, in powers of 1000: 999 B, 1.5 kB, 73 MB, 28.0 GB."""
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.{0 if unit == 'B' or value >= 10 else 1}f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def said_blocks(number: int) -> str:
    """0 blocks, 1 block, 12 blocks."""
    return "1 block" if number == 1 else f"{number} blocks"
