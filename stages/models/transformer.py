"""The Wan diffusion transformer (DiT) of Wan2.1 and Wan2.2: velocity = f(latents, timestep, prompt, image).

The forward is split by how often its parts change. Once per request: `encode_prompt` and `encode_image` (embedding, and
the keys and values of every cross-attention), and `encode_time` for all steps together. Once per size: `rope`. Once per
step: `velocity`.

Parameter names are those of Diffusers' `WanTransformer3DModel`; the numerics are those of the Wan2.1 repository
(`wan/modules/model.py` under bf16 autocast): linears and attention in the dtype of the weights; time embedding,
modulation, LayerNorms, residual stream and head in float32; sinusoid and RoPE angles in float64.

L = tokens of a clip = (T/pt)(H/ph)(W/pw) for latents [B, C, T, H, W] and patches (pt, ph, pw).

S = rows of modulation. A clip whose tokens all have the same timestep has one. Where the first latent frame is given
(Wan2.2-TI2V-5B from an image), its tokens have timestep 0 and the others t: that is two embeddings, not one per token
(27,280 of them for its usual clip), laid out as T/pt rows, one per frame of tokens. Row i modulates the i-th of S equal
runs of tokens, so modulation stays a broadcast whatever S is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotreload.placement import joined
from ipc.architecture import TransformerConfig
from ipc.messages.names import AttentionBackend, KernelKind
from stages.attention import attention
from stages.kernels import norm_rope, residual_layer_norm, residual_modulate
from stages.kernels.plain import add_gated
from stages.models.conditioning import ConditionEmbedder, Time, float32_linear, rope_table
from stages.models.feed_forward import FeedForward
from stages.models.joined import JoinedModule
from stages.models.walks import Walk, WalkedModule

FLOAT32_NAMES = (
    "condition_embedder.time_", "condition_embedder.image_embedder.norm", "scale_shift_table", "norm2.", "proj_out.",
)  # fmt: skip


KEYS = tuple(f"attn2.{x}." for x in ("to_k", "to_v", "norm_k", "add_k_proj", "add_v_proj", "norm_added_k"))
"""Of a block: what makes keys and values of the prompt, once per request."""


def keeps_float32(name: str) -> bool:
    """Whether the forward uses this parameter in float32, so that a float32 checkpoint should not be rounded for it."""
    return any(part in name for part in FLOAT32_NAMES)


class Compute(NamedTuple):
    """By what the forward is computed. Another choice gives other bits."""

    attention: AttentionBackend = "sdpa"
    kernels: KernelKind = "torch"


class WanTransformer(JoinedModule, WalkedModule):
    """The DiT of any Wan model. Latents [B, in_channels, T, H, W], velocity [B, out_channels, T, H, W]: fewer, where
    the latents of an image come with the noise."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.compute = Compute()
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(dim, config.out_channels * math.prod(patch))
        self.scale_shift_table = modulation_table(2, dim)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the linears and of attention."""
        return self.patch_embedding.weight.dtype

    def encode_prompt(self, prompt_embeds: Tensor, distinct: int | None = None) -> Tensor:
        """Prompt embeddings [B, text_len, text_dim], zero rows after the real ones, unmasked -> keys and values of all
        cross-attentions [layers, 2, B, text_len, heads, head_dim]. Batches join along dim 2.

        `distinct`, if it is known, of `distinct_rows`: the rows after these are what the last of them is.

        For one prompt of a 14B model in bfloat16 that is 0.42 GB; of its 257 image tokens 0.21 GB.
        """
        expected = [self.config.text_len, self.config.text_dim]
        if prompt_embeds.ndim != 3 or list(prompt_embeds.shape[1:]) != expected:
            raise ValueError(
                f"prompt_embeds must be [B, {expected[0]}, {expected[1]}], got {list(prompt_embeds.shape)}"
            )
        rows = prompt_embeds[:, :distinct].to(self.dtype)
        (text,) = [embedder.text_embedder(rows) for embedder in self._embedder]
        encoded = torch.stack([attention.keys_values(text) for attention in self._cross_attentions])
        if distinct is None:
            return encoded
        padding = encoded[:, :, :, -1:].expand(-1, -1, -1, expected[0] - distinct, -1, -1)
        return torch.cat((encoded, padding), dim=3)

    def encode_image(self, image_embeds: Tensor) -> Tensor:
        """Image tokens [B, N, image_dim] of CLIP -> keys and values of all cross-attentions, [layers, 2, B, N, heads,
        head_dim]; the same for every prompt. ValueError if this model sees none."""
        if self.config.image_dim is None:
            raise ValueError("this model has no cross-attention to image tokens (image_dim is not set)")
        if image_embeds.ndim != 3 or image_embeds.shape[2] != self.config.image_dim:
            raise ValueError(f"image_embeds must be [B, N, {self.config.image_dim}], got {list(image_embeds.shape)}")
        (image,) = [embedder.embed_image(image_embeds).to(self.dtype) for embedder in self._embedder]
        return torch.stack([attention.image_keys_values(image) for attention in self._cross_attentions])

    def rope(self, frames: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """Rotation table for latents of this size: [L, head_dim/2, 2] float32, (cos, sin) of each pair's angle."""
        grid = self._grid(frames, height, width)
        if max(grid) > self.config.rope_max_seq_len:
            raise ValueError(f"at most {self.config.rope_max_seq_len} patches along an axis, got {grid}")
        return rope_table(self.config.attention_head_dim, grid, device or self.patch_embedding.weight.device)

    def encode_time(self, timestep: Tensor) -> Time:
        """timestep in 0..1000, [B] or [B, 2]: the first latent frame's and the others'. For all steps of a request at
        once, B is the number of steps, and each step takes its `Time.row`."""
        (time,) = [embedder.embed_time(timestep) for embedder in self._embedder]
        return time

    def forward(
        self, latents: Tensor, timestep: Tensor, prompt: Tensor, rope: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """`velocity` at these timesteps."""
        return self.velocity(latents, self.encode_time(timestep), prompt, rope, image)

    def velocity(
        self, latents: Tensor, time: Time, prompt: Tensor, rope: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """latents [B, in_channels, T, H, W]; time of `encode_time`, of B timesteps or one for all; prompt of
        `encode_prompt`; table of `rope`; image of `encode_image`, for models that have it -> velocity
        [B, out_channels, T, H, W] float32."""
        if (image is None) != (self.config.image_dim is None):
            raise ValueError(
                f"image is {'missing' if image is None else 'given'}, but image_dim is {self.config.image_dim}"
            )
        grid = self._grid(*latents.shape[2:])
        time = time.spread(grid[0])
        stream = Stream(self._patchify(latents))
        images = [None] * len(prompt) if image is None else image.unbind(0)
        for block, text_kv, image_kv in zip(self.walk("blocks"), prompt.unbind(0), images, strict=True):
            stream = block(stream, time.modulation, text_kv, rope, image_kv, self.compute)
        return self._unpatchify(self._head(stream, time.embedding), grid)

    def walks(self) -> dict[str, Walk]:
        """The blocks, in every forward; their keys and values, and the embeddings of prompt and time, per request."""
        config = self.config
        numbers = range(config.num_layers)
        return {
            "blocks": Walk(
                prefixes=[f"blocks.{number}." for number in numbers], build=lambda: Block(config),
                has=lambda name: not name.startswith(KEYS), bound=lambda block: cast(Block, block).attn1.fuse(),
                often=True,
            ),
            "keys": Walk(
                prefixes=[f"blocks.{number}." for number in numbers], build=lambda: Block(config),
                has=lambda name: name.startswith(KEYS),
            ),
            "embedder": Walk(prefixes=["condition_embedder."], build=lambda: ConditionEmbedder(config)),
        }  # fmt: skip

    def runs(self) -> list[tuple[str, ...]]:
        """Tensors that a forward uses as one where they lie one right behind the other (`hotreload.placement.Runs`)."""
        blocks = range(len(self.blocks))
        return [
            tuple(f"blocks.{number}.attn1.to_{x}.{leaf}" for x in "qkv")
            for number in blocks
            for leaf in ("weight", "bias")
        ]

    def fuse(self) -> int:
        """Take q, k and v of each self-attention as one product where their weights lie so; to be called when weights
        are bound. Returns how many of the blocks can."""
        return sum(block.attn1.fuse() for block in self._blocks)

    @property
    def _embedder(self) -> Iterator[ConditionEmbedder]:
        """The one there is, to be used before the next is asked for."""
        for embedder in self.walk("embedder"):
            assert isinstance(embedder, ConditionEmbedder)
            yield embedder

    @property
    def _cross_attentions(self) -> Iterator[CrossAttention]:
        for block in self.walk("keys"):
            assert isinstance(block, Block)
            yield block.attn2

    @property
    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def _grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        pt, ph, pw = self.config.patch_size
        if frames % pt or height % ph or width % pw:
            raise ValueError(f"latents must be multiples of {self.config.patch_size}, got {(frames, height, width)}")
        return frames // pt, height // ph, width // pw

    def _patchify(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, L, dim] float32. The stride is the kernel, so the convolution is one linear."""
        pt, ph, pw = self.config.patch_size
        frames, height, width = self._grid(*latents.shape[2:])
        x = latents.to(self.dtype).reshape(len(latents), -1, frames, pt, height, ph, width, pw)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).float()

    def _head(self, stream: Stream, time: Tensor) -> Tensor:
        """The stream, time embedding [B, S, dim] -> [B, L, patch * C], all float32."""
        shift, scale = (self.scale_shift_table.float() + time.unsqueeze(2)).unbind(2)
        _, x = residual_modulate(self.compute.kernels, *stream.take(), scale, shift, self.config.eps, torch.float32)
        return float32_linear(x, self.proj_out)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, (pt, ph, pw, C)] -> [B, C, T, H, W]."""
        x = x.view(len(x), *grid, *self.config.patch_size, -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


@dataclass(slots=True)
class Stream:
    """The residual stream between two parts of a block: x + branch * gate, not yet added, so that the next norm can do
    that in the same pass."""

    x: Tensor
    """[B, L, dim] float32."""
    branch: Tensor | None = None
    """[B, L, dim] in the dtype of the weights."""
    gate: Tensor | None = None
    """[B, S, dim] float32; None: 1."""

    def take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All three, once: a caller that still has the stream does not keep their memory while a block computes."""
        parts = self.x, self.branch, self.gate
        del self.x, self.branch, self.gate
        return parts


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward on a float32 residual stream.

    Nothing is kept that is not needed any more. In bfloat16, beside weights, keys and values, that is per token 12
    bytes for each unit of the width at the attention, and at the feed-forward 6, and 2 for each unit of its own width.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim, gelu="tanh")
        self.scale_shift_table = modulation_table(6, config.dim)

    def forward(
        self, stream: Stream, modulation: Tensor, text: Tensor, rope: Tensor, image: Tensor | None, compute: Compute
    ) -> Stream:
        """modulation [B, S, 6, dim] float32, or of B = 1 for all; keys and values of the prompt's rows and of the
        image's tokens, [2, B, N, heads, head_dim]. The stream that comes in is used up."""
        dtype = self.ffn.dtype
        table = self.scale_shift_table.float() + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)
        x, y = residual_modulate(compute.kernels, *stream.take(), scale1, shift1, self.eps, dtype)
        qkv = self.attn1.project(y, rope, compute)
        del y
        y = self.attn1.attend(qkv, compute)
        del qkv
        y = self.attn1.to_out[0](y)
        x, y = self._before_cross(Stream(x, y, gate1), dtype, compute)
        y = self.attn2(y, text, image, compute)
        x, y = residual_modulate(compute.kernels, x, y, None, scale2, shift2, self.eps, dtype)
        hidden = self.ffn.widen(y, compute.kernels)
        del y
        return Stream(x, self.ffn.narrow(hidden), gate2)

    def _before_cross(self, stream: Stream, dtype: torch.dtype, compute: Compute) -> tuple[Tensor, Tensor]:
        """The sum of the stream, and what cross-attention makes queries of."""
        if self.norm2 is None:
            x = add_gated(*stream.take())
            return x, x.to(dtype)
        norm = self.norm2
        return residual_layer_norm(compute.kernels, *stream.take(), norm.weight, norm.bias, self.eps, dtype)


class Attention(nn.Module):
    """Projections of one attention. Queries and keys are normalised over the whole width, before the split in heads."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.eps = config.eps
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, heads, head_dim]."""
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    """Attention of every token of the clip to every other, with RoPE."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self._fused: tuple[Tensor, Tensor] | None = None

    def fuse(self) -> bool:
        """Whether the weights of q, k and v lie one right behind the other, and are one product from now on."""
        linears = (self.to_q, self.to_k, self.to_v)
        weight, bias = joined([linear.weight for linear in linears]), joined([linear.bias for linear in linears])
        self._fused = None if weight is None or bias is None else (weight, bias)
        return self._fused is not None

    def forward(self, x: Tensor, rope: Tensor, compute: Compute) -> Tensor:
        """[B, L, dim] -> [B, L, dim]."""
        return self.to_out[0](self.attend(self.project(x, rope, compute), compute))

    def project(self, x: Tensor, rope: Tensor, compute: Compute) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, dim] -> q, k, v, normalised and rotated, each [B, L, heads, head_dim]."""
        q, k, v = self._qkv(x)
        q = norm_rope(compute.kernels, q, self.norm_q.weight, self.eps, self.heads, rope)
        k = norm_rope(compute.kernels, k, self.norm_k.weight, self.eps, self.heads, rope)
        return q, k, self.split(v)

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], compute: Compute) -> Tensor:
        """What `to_out` takes: [B, L, dim]."""
        return attention(*qkv, compute.attention).flatten(2)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, L, dim] -> q, k, v, each [B, L, dim], if fused views of one tensor."""
        if self._fused is None:
            return self.to_q(x), self.to_k(x), self.to_v(x)
        assert self.to_q.weight.data_ptr() == self._fused[0].data_ptr(), "weights were bound again without fuse()"
        return F.linear(x, *self._fused).chunk(3, dim=-1)


class CrossAttention(Attention):
    """Attention of the clip's tokens to the prompt's rows, padding included, and separately to the image's tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.image_dim is not None:
            self.add_k_proj = nn.Linear(config.dim, config.dim)
            self.add_v_proj = nn.Linear(config.dim, config.dim)
            self.norm_added_k = nn.RMSNorm(config.dim, eps=config.eps)

    def keys_values(self, text: Tensor) -> Tensor:
        """Embedded text [B, text_len, dim] -> keys and values [2, B, text_len, heads, head_dim]."""
        k = norm_rope("torch", self.to_k(text), self.norm_k.weight, self.eps, self.heads, None)
        return torch.stack([k, self.split(self.to_v(text))])

    def image_keys_values(self, image: Tensor) -> Tensor:
        """Embedded image tokens [B, N, dim] -> keys and values [2, B, N, heads, head_dim]."""
        k = norm_rope("torch", self.add_k_proj(image), self.norm_added_k.weight, self.eps, self.heads, None)
        return torch.stack([k, self.split(self.add_v_proj(image))])

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, compute: Compute) -> Tensor:
        """x [B, L, dim], keys and values [2, B, N, heads, head_dim] -> [B, L, dim]."""
        q = norm_rope(compute.kernels, self.to_q(x), self.norm_q.weight, self.eps, self.heads, None)
        y = attention(q, text[0], text[1], compute.attention)
        if image is not None:
            seen = attention(q, image[0], image[1], compute.attention)
            del q
            y = y + seen
        return self.to_out[0](y.flatten(2))


def distinct_rows(prompt_embeds: Tensor) -> int | None:
    """Rows of [B, text_len, text_dim] up to the first from which on all are zero, that one included; on a CPU, where to
    encode 512 rows for the demo model takes as long as a step of a small clip. None on a GPU: there they take next to
    nothing, and to look would be to wait for it."""
    if prompt_embeds.device.type != "cpu":
        return None
    real = prompt_embeds.any(-1).any(0).nonzero()
    return min(prompt_embeds.shape[1], int(real[-1]) + 2 if len(real) else 1)


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """[1, rows, dim], for training normal with a variance of 1 / dim."""
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, dim), std=dim**-0.5))
