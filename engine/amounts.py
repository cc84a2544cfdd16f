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


def seconds(value: float) -> str:
    """0.42 s, 4.2 s, 42 s, 7 min 2 s, 3 h 4 min."""
    if value < 60:
        return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(value: float) -> str:
    """A number of parameters: 5.1 M, 1.4 B."""
    return f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"
