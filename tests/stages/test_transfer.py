"""What `engine doctor` measures of streaming weights."""

from __future__ import annotations

import pytest
import torch

from engine.models import load_model
from engine.weight_sizes import transformer_bytes
from ipc.messages.names import AttentionBackend, KernelKind
from stages import kernels, transfer
from stages.attention.backends import Case
from stages.attention.choice import choose
from stages.models.transformer import Compute
from stages.transfer import PINNED_BYTES, TOKENS, break_even, measure, time_block, time_copies

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_break_even_of_known_times() -> None:
    """A block whose seconds are 2e-6 n + 3e-10 n^2: found where they are those of the copy, beyond the timed lengths
    too, and with a little noise."""

    def seconds(tokens: int) -> float:
        return 2e-6 * tokens + 3e-10 * tokens**2

    timed = [(tokens, seconds(tokens)) for tokens in TOKENS]
    for tokens in (100, 3000, 8192, 50_000):
        assert abs(break_even(timed, seconds(tokens)) - tokens) <= 1
    noisy = [(n, s * factor) for (n, s), factor in zip(timed, (1.02, 0.99, 1.01), strict=True)]
    assert abs(break_even(noisy, seconds(9000)) / 9000 - 1) < 0.05
    assert break_even([(n, 2e-6 * n) for n in TOKENS], 0.02) == 10_000
    assert break_even([(1, 0.9e-6), (2, 1.7e-6), (3, 2.4e-6)], 0.01) > 10_000  # less than linear


def test_a_block_is_timed_as_it_computes() -> None:
    """With the demo model, and with one that sees image tokens; more tokens take longer."""
    config = load_model("wan-demo").transformer
    compute = Compute("sdpa", "torch")
    short, long = (time_block(config, torch.float32, CPU, compute, tokens) for tokens in (64, 2048))
    assert 0 < short < long


def test_without_a_gpu_nothing_is_measured() -> None:
    found = measure(load_model("wan-demo").transformer, 1, torch.float32, CPU, Compute())
    assert found.problem == "needs a GPU" and found.break_even == 0


def test_a_problem_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is lacking on the way: the report has the first line of it."""

    def lacking(device: torch.device) -> None:
        raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(transfer, "time_copies", lacking)
    found = measure(load_model("wan-demo").transformer, 1, torch.float32, CUDA, Compute())
    assert found.problem == "RuntimeError: no memory"


@pytest.mark.gpu
def test_copies_and_blocks_on_a_gpu() -> None:
    """Pinned memory is copied at more than 1 GB/s each way, and a block of the 1.3B computes faster than it would on a
    hundredth of the card."""
    copies = time_copies(CUDA, PINNED_BYTES // 4)
    assert not copies.unlocked and min(copies.pinning, copies.copy_out) > 1e9
    assert copies.copy_in > copies.copy_in_unlocked > 1e8
    config = load_model("wan2.1-t2v-1.3b").transformer
    case = Case(CUDA, torch.bfloat16, config.attention_head_dim)
    attention: AttentionBackend = choose("auto", case, config.num_attention_heads)
    kind: KernelKind = kernels.choose("auto", CUDA, torch.bfloat16, config.num_attention_heads, 128)[0]
    bytes_ = transformer_bytes(config, "bfloat16").block
    found = measure(config, bytes_, torch.bfloat16, CUDA, Compute(attention, kind))
    assert not found.problem
    assert list(found.block_seconds) == list(TOKENS) and max(found.block_seconds.values()) < 0.1
    assert 1000 < found.break_even < 100_000
