"""`engine doctor` to the process that tries what is there, and back, as JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from ipc.architecture import TransformerConfig, VaeConfig
from ipc.messages.names import AttentionBackend, AttentionChoice, KernelKind


class DoctorAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Try on `device` the attention backends and the kernels as a transformer would use them, and those of a VAE."""

    device: str
    dtype: str
    transformer: TransformerConfig
    block_bytes: int
    """Of one of its blocks, what travels to the device in each step where blocks are streamed."""
    vae: VaeConfig
    attention: AttentionChoice


class AttentionMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """One backend."""

    backend: AttentionBackend
    version: str = ""
    problem: str = ""
    """Why it is not used; empty if it is right."""
    error: float | None = None
    """Relative L2 distance from float64, the largest of the self-test."""
    lse_error: float | None = None
    """Largest difference of the log-sum-exp from float64."""
    milliseconds: float | None = None
    """Of the measurement."""


class TransfersMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """What streaming weights costs. With a `problem`, nothing was measured."""

    problem: str = ""
    pinning: float = 0.0
    """Bytes a second of page-locking shared host memory that is there already; 0: it cannot be locked."""
    unlocked: str = ""
    """Why it cannot."""
    copy_in: float = 0.0
    """Bytes a second from there to the GPU."""
    copy_in_unlocked: float = 0.0
    """The same from pages that are not locked."""
    copy_out: float = 0.0
    """Bytes a second back."""
    block_seconds: dict[int, float] = {}
    """Tokens -> seconds that a transformer block computes."""
    break_even: int = 0
    """Tokens from which on a block computes for longer than one travels: streaming costs nothing."""


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `attention` and `kernels` are what an engine would take; `attention` is empty if what was asked
    for does not work."""

    device: str
    dtype: str
    heads: int
    head_dim: int
    versions: dict[str, str]
    tokens: int
    """Queries and keys of the measurement."""
    backends: list[AttentionMeasured]
    attention: Literal["", AttentionBackend]
    kernels: KernelKind
    kernels_problem: str
    """Why the Triton kernels are not used; empty if they are."""
    vae_kernels: KernelKind
    vae_kernels_problem: str
    """As `kernels_problem`."""
    transfers: TransfersMeasured
