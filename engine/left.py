"""What an engine that was killed has left: requests that have not ended, and how others have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.adapters import KeptAdapter
from engine.journal import Ended, Entry, Journal
from engine.params import ModelParams


class Left(NamedTuple):
    """What there is to take up."""

    entries: Sequence[Entry] = ()
    """Of requests that have not ended, oldest first."""
    ended: Sequence[Ended] = ()
    """The latest last."""
    adapters: Sequence[KeptAdapter] = ()


async def take_stock(journal: Journal, model: ModelParams) -> Left:
    """Open the journal. The adapters are of one model, the requests of all. `BadConfig` if it cannot be used."""
    return Left(await journal.open(), await journal.ended(), await journal.adapters(model.name))
