"""How names that come from files stand in messages: escaped and short, and few of many."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 100
"""Characters of a name that are shown."""
MOST = 10
"""Names that are shown of a list."""


def shown(name: object) -> str:
    """A name on one line, what cannot be printed escaped, at most `LONGEST` characters."""
    text = str(name)
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: LONGEST + 1])
    return escaped if len(escaped) <= LONGEST else f"{escaped[: LONGEST - 3]}..."


def listed(texts: Iterable[str], separator: str = ", ") -> str:
    """The first of several texts, and how many more there are."""
    every = list(texts)
    more = f" and {len(every) - MOST} more" if len(every) > MOST else ""
    return f"{separator.join(every[:MOST])}{more}"
