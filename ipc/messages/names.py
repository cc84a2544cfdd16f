"""The words that all messages share: stages, their seats, phases, and what an operator may choose."""

from __future__ import annotations

import functools
from typing import Literal, cast

StageName = Literal["text", "dit", "vae", "writer"]
Seat = str
"""The place of a process that is one stage: the stage's name, or "dit:1", "dit:2", ... for further dits."""
Phase = Literal["text", "encode", "denoise", "decode", "write"]
"""What a quantum does. `encode` and `decode` both run on the vae stage; the others on the stage of their name."""
STAGE_OF_PHASE: dict[Phase, StageName] = {
    "text": "text", "encode": "vae", "denoise": "dit", "decode": "vae", "write": "writer",
}  # fmt: skip


AttentionBackend = Literal[
    "flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "flash", "efficient", "sdpa", "math"
]
"""Implementations of exact attention: libraries of the FlashAttention project, operators of torch, and the formula as
it is written (`stages/attention/backends.py`)."""
AttentionChoice = Literal["auto", AttentionBackend]
MemoryLevel = Literal["auto", 0, 1, 2, 3]
"""What an operator may ask for: a level of `MemoryPlan`, or whichever fits best."""
Placement = Literal["split", "fused"]
"""A process for each stage, or one for all."""
KernelKind = Literal["triton", "torch"]
"""How what stands between the matrix products is computed (`stages/kernels/`)."""


@functools.cache
def stage_of(seat: Seat) -> StageName:
    """What the process at this seat is."""
    stage = seat.partition(":")[0]
    assert stage in STAGE_OF_PHASE.values() and stage in (seat, "dit"), f"no such seat: {seat}"
    return cast(StageName, stage)


STAGE_OF_COMPONENT: dict[str, StageName] = {
    "text_encoder": "text", "image_encoder": "vae", "transformer": "dit", "transformer_2": "dit", "vae": "vae",
}  # fmt: skip
"""Whose weights they are."""


def number_of(seat: Seat) -> int:
    """Which of its stage's processes it is."""
    return int(seat.partition(":")[2] or 0)
