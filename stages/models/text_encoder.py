"""The UMT5 text encoder: token ids -> prompt embeddings.

Source of the conventions (padding is masked, rows after the prompt are zero, attention divides by nothing, every block
has its own relative bias): the Wan2.1 repository (`modules/t5.py`). Tensor names are those of transformers'
`UMT5EncoderModel`. That class, with which this agrees bit for bit (transformers 5.24), is the tests' oracle only:
importing it took every start of this stage 3.4 s of CPU, where torch takes 2, and 160 MB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.architecture import TextEncoderConfig
from stages.models.walks import Walk, WalkedModule

ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""The token embedding has two names in the module; a checkpoint may have either both or the second."""


class TextEncoder(WalkedModule):
    """Token ids -> rows of d_model in the dtype of the weights."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self._config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared)

    def walks(self) -> dict[str, Walk]:
        config = self._config
        prefixes = [f"encoder.block.{number}." for number in range(config.num_layers)]
        return {"blocks": Walk(prefixes=prefixes, build=lambda: Block(config))}

    def on_host(self) -> frozenset[str]:
        """The table of 256,384 tokens, of which a prompt takes some."""
        return frozenset({"shared.weight"})

    def forward(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Ids [B, N] of each text -> rows [B, N, d_model] of each: block by block of all, so that the weights of a
        block are needed once."""
        device = self.encoder.final_layer_norm.weight.device
        rows = [self.shared(ids.to(self.shared.weight.device)).to(device) for ids in texts]
        for block in self.walk("blocks"):
            rows = [block(x) for x in rows]
        return [self.encoder.final_layer_norm(x) for x in rows]


class Stack(nn.Module):
    """The embedding's second name, blocks, a norm."""

    def __init__(self, config: TextEncoderConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config), FeedForwardLayer(config)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class AttentionLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.SelfAttention = Attention(config)
        self.layer_norm = RMSNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x))


class FeedForwardLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.DenseReluDense = GatedGelu(config)
        self.layer_norm = RMSNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Attention(nn.Module):
    """Attention of all tokens to all tokens. The scores are not scaled; the relative bias is added to them."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(self.buckets, config.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        position = torch.arange(x.shape[1], device=x.device)
        bucket = relative_bucket(position[None, :] - position[:, None], self.buckets, self.max_distance)
        bias = self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0).contiguous()
        rows = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rows.transpose(1, 2).flatten(2))


def relative_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Key position minus query position, int64 -> bucket of the same shape, int64: half of them for each direction, of
    which half are single distances and half grow as their logarithm, the last one from `max_distance` on."""
    half = buckets // 2
    exact = half // 2
    far = torch.log(distance.abs().float() / exact) / math.log(max_distance / exact) * (half - exact)
    logarithmic = (exact + far.to(torch.long)).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(distance.abs() < exact, distance.abs(), logarithmic)


class GatedGelu(nn.Module):
    """Two layers, the first gated by the GELU (as tanh) of a third."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(gelu(self.wi_0(x)) * self.wi_1(x))


def gelu(x: Tensor) -> Tensor:
    """As the original rounds it in bfloat16: one operation after another, which torch's own does not."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class RMSNorm(nn.Module):
    """Scaled to a mean square of 1 in float32, then by the weight in its own dtype."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (x * scale).to(self.weight.dtype)


def build(config: TextEncoderConfig) -> TextEncoder:
    """The encoder of these numbers, for inference. Under `blank()` nothing is allocated."""
    return TextEncoder(config).eval()


@torch.inference_mode()
def encode(encoder: TextEncoder, *texts: Sequence[int]) -> list[Tensor]:
    """Token ids of each text, `</s>` included -> [tokens, d_model] of each in the dtype of the weights.

    Only the real tokens are run: masked padding cannot change their rows.
    """
    return [rows[0] for rows in encoder([torch.tensor([ids]) for ids in texts])]
