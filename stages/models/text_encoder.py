"""The UMT5 text encoder: a prompt -> prompt embeddings [text_len, d_model], real rows first, then zero rows.

`encode(encoder, prompt_ids(tokenizer, prompt, text_len), text_len)` is the whole path. Parameter names are those of
transformers' `UMT5EncoderModel` (`shared.weight` once, without its alias `encoder.embed_tokens.weight`). The encoder is
ours because importing theirs takes 2.6 s of every start of the text stage (transformers 5.23), by any path.

Cleaning, lengths and zero rows are those of the Wan2.1 repository (`wan/modules/tokenizers.py`, `t5.py`).
"""

from __future__ import annotations

import html
import math
import re
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ipc.architecture import TextEncoderConfig

END_ID = 1
"""`</s>`, which ends every prompt and counts in its length."""


class PromptTooLongError(ValueError):
    """The prompt has more tokens than the model was trained to read. The engine refuses it rather than cut it."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"prompt has {tokens} tokens (with its end mark), expected at most {limit}")
        self.tokens = tokens
        self.limit = limit


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`; whatever it says of padding and truncation is switched off."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode("").ids
    if ids != [END_ID]:
        raise ValueError(f"the tokenizer must encode an empty prompt as [{END_ID}] (</s>), got {ids}")
    return tokenizer


def clean(text: str) -> str:
    """Repair mojibake, decode HTML entities (twice, for text that was escaped twice), collapse whitespace."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def prompt_ids(tokenizer: Tokenizer, prompt: str, text_len: int) -> list[int]:
    """Clean and tokenise: at most `text_len` ids, the last one `</s>`. Raises `PromptTooLongError`."""
    ids: list[int] = tokenizer.encode(clean(prompt)).ids
    if len(ids) > text_len:
        raise PromptTooLongError(len(ids), text_len)
    return ids


@torch.inference_mode()
def encode(encoder: Umt5Encoder, ids: list[int], text_len: int) -> Tensor:
    """Token ids -> [text_len, d_model] in the dtype of the weights; rows after the last token are zero.

    Only the real tokens are run: masked padding cannot change their rows.
    """
    if len(ids) > text_len:
        raise PromptTooLongError(len(ids), text_len)
    rows = encoder(torch.tensor([ids], device=encoder.shared.weight.device))[0]
    return F.pad(rows, (0, 0, 0, text_len - len(ids)))


class Umt5Encoder(nn.Module):
    """Token ids [B, L] -> [B, L, d_model]; every token attends to every other."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def forward(self, ids: Tensor) -> Tensor:
        buckets = relative_buckets(
            ids.shape[1], self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        )
        return self.encoder(self.shared(ids), buckets.to(ids.device))


class Stack(nn.Module):
    """The blocks and the last norm, on a residual stream [B, L, d_model] in the dtype of the weights."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        for block in self.block:
            x = block(x, buckets)
        return self.final_layer_norm(x)


class Block(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config), FeedForwardLayer(config)])

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, buckets))


class AttentionLayer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.SelfAttention = Attention(config)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), buckets)


class Attention(nn.Module):
    """Attention whose scores are q k^T, not scaled, plus a learnt bias per head and bucket of relative position.

    Unlike T5, every layer has its own bias.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        """x [B, L, d_model], buckets [L, L] -> [B, L, d_model]."""
        q, k, v = (linear(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForwardLayer(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.DenseReluDense = GatedFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class GatedFeedForward(nn.Module):
    """wo(gelu(wi_0(x)) * wi_1(x)), GELU by tanh."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


def relative_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """Bucket of (key position - query position) for every query and key: [length, length] int64, on the CPU.

    Half of the buckets are for keys after the query. Of each half, the first half holds one distance per bucket; the
    rest grow geometrically up to `max_distance`, and the last one holds everything beyond.
    """
    half = buckets // 2
    exact = half // 2
    position = torch.arange(length)
    relative = position[None, :] - position[:, None]
    distance = relative.abs()
    # float32, like the reference: at powers of two the logarithm falls on a border between buckets.
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + growth.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)
