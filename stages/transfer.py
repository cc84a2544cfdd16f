"""What streaming weights costs on this machine: how fast host memory is page-locked and copied to the GPU, and from how
many tokens on a transformer block computes for longer than the next one travels. For `engine doctor`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hotreload.placement import Placement
from ipc.architecture import TransformerConfig
from ipc.messages.doctor import TransfersMeasured
from stages.models.blank import blank
from stages.models.transformer import Block, Compute, Stream, keeps_float32

PINNED_BYTES = 1 << 30
"""Of the measurement: some blocks of a 14B model."""
REPEATS = 5
"""Of which the fastest counts: what else runs on the machine only ever takes time."""
TOKENS = (4096, 8192, 16384)
"""Lengths at which a block is timed; shorter ones wait for the host as much as they compute."""
BLOCKS = 4
"""That are timed together, so that one is asked for while another computes."""


def measure(
    config: TransformerConfig, block_bytes: int, dtype: torch.dtype, device: torch.device, compute: Compute
) -> TransfersMeasured:
    """`block_bytes`: of one block, what travels at each step. Without a GPU nothing is measured; a problem is said, not
    raised."""
    if device.type != "cuda":
        return TransfersMeasured(problem="needs a GPU")
    try:
        copies = time_copies(device)
        seconds = [time_block(config, dtype, device, compute, tokens) for tokens in TOKENS]
    except (RuntimeError, OSError) as error:
        text = (str(error).splitlines() or [""])[0][:200]
        return TransfersMeasured(problem=f"{type(error).__name__}: {text}")
    timed = list(zip(TOKENS, seconds, strict=True))
    return TransfersMeasured(
        **copies._asdict(), block_seconds=dict(timed), break_even=break_even(timed, block_bytes / copies.copy_in)
    )


class Copies(NamedTuple):
    """As in `TransfersMeasured`."""

    pinning: float
    unlocked: str
    copy_in: float
    copy_in_unlocked: float
    copy_out: float


def time_copies(device: torch.device, size: int = PINNED_BYTES) -> Copies:
    """Of memory as that of weights (`hotreload/placement.py`), which is there already when it is page-locked."""
    placement = Placement.create("engine-doctor", {"weights": (torch.uint8, (size,))})
    try:
        host = placement.flat
        host.fill_(1)
        there = torch.empty(len(host), dtype=torch.uint8, device=device)
        before = fastest(lambda: there.copy_(host, non_blocking=True), device)
        began = time.perf_counter()
        placement.pin()
        pinning = size / (time.perf_counter() - began)
        to = fastest(lambda: there.copy_(host, non_blocking=True), device)
        back = fastest(lambda: host.copy_(there, non_blocking=True), device)
        why = placement.unlocked
        return Copies(0.0 if why else pinning, why, size / to, size / before, size / back)
    finally:
        placement.close()


@torch.inference_mode()
def time_block(
    config: TransformerConfig, dtype: torch.dtype, device: torch.device, compute: Compute, tokens: int
) -> float:
    """Seconds of one transformer block on so many tokens, with random weights."""
    with blank():
        block = Block(config)
    for name, weight in list(block.named_parameters()):
        kept = torch.float32 if keeps_float32(name) else dtype
        _replace(block, name, torch.randn(weight.shape, device=device, dtype=kept) * 0.02)
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    x = torch.randn(1, tokens, config.dim, device=device)
    modulation = torch.randn(1, 1, 6, config.dim, device=device)
    text = torch.randn(2, 1, config.text_len, heads, head_dim, device=device, dtype=dtype)
    image = text if config.image_dim is not None else None
    rope = torch.zeros(tokens, head_dim // 2, 2, device=device)

    def blocks() -> None:
        for _ in range(BLOCKS):
            block(Stream(x.clone()), modulation, text, rope, image, compute)  # the stream that comes in is used up

    return fastest(blocks, device) / BLOCKS


def _replace(block: torch.nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of `REPEATS` calls, after one to warm up."""
    seconds = []
    for _ in range(REPEATS + 1):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def break_even(timed: Sequence[tuple[int, float]], copied: float) -> int:
    """From how many tokens on a block computes for `copied` seconds: of (tokens, seconds), seconds are taken to be
    a * tokens + b * tokens^2, as products and attention are, by least squares."""
    tokens, seconds = (np.array(column, np.float64) for column in zip(*timed, strict=True))
    (a, b), *_ = np.linalg.lstsq(np.stack((tokens, tokens**2), axis=1), seconds, rcond=None)
    if b < 0:  # less than linear, as where a block is too short for the GPU: the longest tells the most
        a, b = seconds[-1] / tokens[-1], 0.0
    return round(2 * copied / (a + np.sqrt(a * a + 4 * b * copied)))
