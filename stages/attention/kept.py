"""Which backend `auto` took on this machine, for the next engine.

So that two engines with the same libraries on the same device compute the same bits, whichever backend was a little
faster when each of them measured; and so that the second need not measure.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec
import torch

from hotreload.files import small_json
from ipc.messages.names import AttentionBackend
from stages import cache
from stages.attention.backends import IMPLEMENTATIONS, Case

NAME = "attention.json"
"""File of choices: `identity` -> backend."""
MAX_BYTES = 1 << 20
"""Of a file that is read; a choice takes some 300."""

log = logging.getLogger(__name__)


def identity(case: Case, heads: int) -> str:
    """All that a choice depends on: the device, what is computed, and every backend that can be tried, with version."""
    name = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else case.device.type
    versions = [
        f"{backend} {implementation.version()}"
        for backend, implementation in IMPLEMENTATIONS.items()
        if not implementation.missing(case)
    ]
    return "; ".join([name, f"torch {torch.__version__}", f"{heads} x {case.head_dim} {case.dtype}", *versions])


def recall(case: Case, heads: int) -> AttentionBackend | None:
    """What was taken last time; None if nothing is known of it."""
    kept = cache.directory()
    return None if kept is None else _read(kept / NAME).get(identity(case, heads))


def remember(case: Case, heads: int, backend: AttentionBackend) -> None:
    """For the next engine. Of two that write at once one is heard; a failure is logged."""
    if (kept := cache.directory()) is None:
        return
    choices = _read(kept / NAME) | {identity(case, heads): backend}
    written = kept / f"{NAME}.{os.getpid()}"
    try:
        written.write_bytes(msgspec.json.format(msgspec.json.encode(choices), indent=1))
        written.replace(kept / NAME)
    except OSError as error:
        log.warning("the choice of attention is not kept for the next engine: %s", error)
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, AttentionBackend]:
    """Empty if it is not there, or not what this writes: nothing that is there in its place may keep a dit from
    starting, or have it wait."""
    try:
        return small_json(path, MAX_BYTES, dict[str, AttentionBackend])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is not read, attention is chosen anew: %s", path, error)
        return {}
