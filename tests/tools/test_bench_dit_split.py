"""Where the time of a forward goes: each product and each attention is seen once; at full size, nothing computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from engine.models import load_model
from stages.models import transformer
from stages.models.conditioning import Time
from stages.models.transformer import Compute, WanTransformer
from tools.bench_dit_split import KINDS, Brackets

TOKENS = 32760


@pytest.mark.parametrize(("name", "tflop"), [("wan2.1-t2v-1.3b", 282.8), ("wan2.1-t2v-14b", 1676.2)])
def test_the_work_of_a_forward(name: str, tflop: float) -> None:
    """What the widths say of 832x480x81: the parts, and their sum, which docs/performance.md takes; afterwards products
    are plain again."""
    config = load_model(name).transformer
    linear, attention = F.linear, transformer.attention
    with FakeTensorMode():
        model = WanTransformer(config).eval().requires_grad_(False)
        model.compute = Compute("sdpa", "torch")
        head = (config.num_attention_heads, config.attention_head_dim)
        prompt = torch.empty(config.num_layers, 2, 1, config.text_len, *head)
        rope = torch.empty(TOKENS, config.attention_head_dim // 2, 2)
        time = Time(torch.empty(1, 1, config.dim), torch.empty(1, 1, 6, config.dim))
        with Brackets("cpu") as brackets:
            model.velocity(torch.empty(1, config.in_channels, 21, 60, 104), time, prompt, rope)
    assert (F.linear, transformer.attention) == (linear, attention)
    found = brackets.split()
    assert tuple(found.milliseconds) == KINDS and all(ms > 0 for ms in found.milliseconds.values())
    layers, dim = config.num_layers, config.dim
    assert found.flop["attention"] == 4 * TOKENS**2 * dim * layers
    assert found.flop["cross-attention"] == 4 * TOKENS * config.text_len * dim * layers
    in_blocks = 2 * TOKENS * (6 * dim**2 + 2 * dim * config.ffn_dim) * layers
    at_ends = 2 * TOKENS * 4 * dim * (config.in_channels + config.out_channels)
    assert found.flop["products"] == in_blocks + at_ends
    assert sum(found.flop.values()) / 1e12 == pytest.approx(tflop, rel=5e-4)
