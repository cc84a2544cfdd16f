"""The Wan diffusion transformer (DiT) of Wan2.1 and Wan2.2: velocity = f(latents, timestep, prompt, image).

The forward is split by how often its parts change. Once per request: `encode_prompt` and `encode_image` (embedding, and
the keys and values of every cross-attention). Once per size: `rope`. Once per step: `forward`.

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
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.architecture import TransformerConfig

ROPE_THETA = 10000.0
TIMESTEP_PERIOD = 10000.0
IMAGE_NORM_EPS = 1e-5
"""Of the LayerNorms around the embedding of image tokens: those of the original have torch's default."""
FLOAT32_NAMES = (
    "condition_embedder.time_", "condition_embedder.image_embedder.norm", "scale_shift_table", "norm2.", "proj_out.",
)  # fmt: skip


def keeps_float32(name: str) -> bool:
    """Whether the forward uses this parameter in float32, so that a float32 checkpoint should not be rounded for it."""
    return any(part in name for part in FLOAT32_NAMES)


class WanTransformer(nn.Module):
    """The DiT of any Wan model. Latents [B, in_channels, T, H, W], velocity [B, out_channels, T, H, W]: fewer, where
    the latents of an image come with the noise."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
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

    def encode_prompt(self, prompt_embeds: Tensor) -> Tensor:
        """Prompt embeddings [B, text_len, text_dim], zero rows after the real ones, unmasked -> keys and values of all
        cross-attentions [layers, 2, B, text_len, heads, head_dim]. Batches join along dim 2.

        For one prompt of a 14B model in bfloat16 that is 0.42 GB; of its 257 image tokens 0.21 GB.
        """
        expected = [self.config.text_len, self.config.text_dim]
        if prompt_embeds.ndim != 3 or list(prompt_embeds.shape[1:]) != expected:
            raise ValueError(
                f"prompt_embeds must be [B, {expected[0]}, {expected[1]}], got {list(prompt_embeds.shape)}"
            )
        text = self.condition_embedder.text_embedder(prompt_embeds.to(self.dtype))
        return torch.stack([block.attn2.keys_values(text) for block in self._blocks])

    def encode_image(self, image_embeds: Tensor) -> Tensor:
        """Image tokens [B, N, image_dim] of CLIP -> keys and values of all cross-attentions, [layers, 2, B, N, heads,
        head_dim]; the same for every prompt. ValueError if this model sees none."""
        embedder = self.condition_embedder.image_embedder
        if embedder is None:
            raise ValueError("this model has no cross-attention to image tokens (image_dim is not set)")
        if image_embeds.ndim != 3 or image_embeds.shape[2] != self.config.image_dim:
            raise ValueError(f"image_embeds must be [B, N, {self.config.image_dim}], got {list(image_embeds.shape)}")
        image = embedder(image_embeds).to(self.dtype)
        return torch.stack([block.attn2.image_keys_values(image) for block in self._blocks])

    def rope(self, frames: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """Rotation table for latents of this size: [L, head_dim/2, 2] float32, (cos, sin) of each pair's angle."""
        grid = self._grid(frames, height, width)
        if max(grid) > self.config.rope_max_seq_len:
            raise ValueError(f"at most {self.config.rope_max_seq_len} patches along an axis, got {grid}")
        return rope_table(self.config.attention_head_dim, grid, device or self.patch_embedding.weight.device)

    def forward(
        self, latents: Tensor, timestep: Tensor, prompt: Tensor, rope: Tensor, image: Tensor | None = None
    ) -> Tensor:
        """latents [B, in_channels, T, H, W]; timestep in 0..1000, [B] or [B, 2]: the first latent frame's and the
        others'; prompt of `encode_prompt`; table of `rope`; image of `encode_image`, for models that have it ->
        velocity [B, out_channels, T, H, W] float32."""
        if (image is None) != (self.config.image_dim is None):
            raise ValueError(
                f"image is {'missing' if image is None else 'given'}, but image_dim is {self.config.image_dim}"
            )
        grid = self._grid(*latents.shape[2:])
        x = self._patchify(latents)
        time, modulation = (spread(e, grid[0]) for e in self.condition_embedder.embed_time(timestep))
        images = [None] * len(prompt) if image is None else image.unbind(0)
        for block, text_kv, image_kv in zip(self.blocks, prompt.unbind(0), images, strict=True):
            x = block(x, modulation, text_kv, rope, image_kv)
        return self._unpatchify(self._head(x, time), grid)

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

    def _head(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, L, dim], time embedding [B, S, dim] -> [B, L, patch * C], all float32."""
        shift, scale = (self.scale_shift_table.float() + time.unsqueeze(2)).unbind(2)
        return float32_linear(modulate(x, shift, scale, self.config.eps), self.proj_out)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, (pt, ph, pw, C)] -> [B, C, T, H, W]."""
        x = x.view(len(x), *grid, *self.config.patch_size, -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


class ConditionEmbedder(nn.Module):
    """Embeds the timestep, the prompt and, for models that see them, image tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = Mlp(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = Mlp(config.text_dim, config.dim)
        self.image_embedder = ImageEmbedder(config.image_dim, config.dim) if config.image_dim is not None else None

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B] or [B, S] -> time embedding [B, S, dim] for the head and modulation [B, S, 6, dim] for the blocks,
        float32; S is 1 for [B]."""
        x = sinusoid(timestep.view(len(timestep), -1), self.freq_dim)
        x = float32_linear(F.silu(float32_linear(x, self.time_embedder.linear_1)), self.time_embedder.linear_2)
        return x, float32_linear(F.silu(x), self.time_proj).unflatten(-1, (6, -1))


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class ImageEmbedder(nn.Module):
    """LayerNorm, Linear, GELU, Linear, LayerNorm: the norms in float32, GELU exact, unlike everywhere else."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim, eps=IMAGE_NORM_EPS)
        self.ff = FeedForward(image_dim, image_dim, dim, gelu="none")
        self.norm2 = nn.LayerNorm(dim, eps=IMAGE_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, image_dim] -> [B, N, dim] float32."""
        return layer_norm(self.ff(layer_norm(x, self.norm1).to(self.ff.dtype)), self.norm2)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward on a float32 residual stream [B, L, dim]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim, gelu="tanh")
        self.scale_shift_table = modulation_table(6, config.dim)

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor, rope: Tensor, image: Tensor | None) -> Tensor:
        """x [B, L, dim] and modulation [B, S, 6, dim] float32; keys and values of the prompt's rows and of the image's
        tokens, [2, B, N, heads, head_dim] -> [B, L, dim] float32."""
        dtype = self.ffn.dtype
        table = self.scale_shift_table.float() + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)
        x = x + gated(self.attn1(modulate(x, shift1, scale1, self.eps).to(dtype), rope), gate1)
        x = x + self.attn2((x if self.norm2 is None else layer_norm(x, self.norm2)).to(dtype), text, image)
        return x + gated(self.ffn(modulate(x, shift2, scale2, self.eps).to(dtype)), gate2)


class Attention(nn.Module):
    """Projections of one attention. Queries and keys are normalised over the whole width, before the split in heads."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, heads, head_dim]."""
        return x.view(*x.shape[:-1], self.heads, -1)


class SelfAttention(Attention):
    """Attention of every token of the clip to every other, with RoPE."""

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, dim]."""
        q = rotate(self.split(rms_norm(self.to_q(x), self.norm_q)), rope)
        k = rotate(self.split(rms_norm(self.to_k(x), self.norm_k)), rope)
        y = attention(q, k, self.split(self.to_v(x)))
        return self.to_out[0](y.flatten(2))


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
        k = self.split(rms_norm(self.to_k(text), self.norm_k))
        return torch.stack([k, self.split(self.to_v(text))])

    def image_keys_values(self, image: Tensor) -> Tensor:
        """Embedded image tokens [B, N, dim] -> keys and values [2, B, N, heads, head_dim]."""
        k = self.split(rms_norm(self.add_k_proj(image), self.norm_added_k))
        return torch.stack([k, self.split(self.add_v_proj(image))])

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """x [B, L, dim], keys and values [2, B, N, heads, head_dim] -> [B, L, dim]."""
        q = self.split(rms_norm(self.to_q(x), self.norm_q))
        y = attention(q, *text.unbind(0))
        if image is not None:
            y = y + attention(q, *image.unbind(0))
        return self.to_out[0](y.flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU, Linear; the nesting gives Diffusers' names `net.0.proj` and `net.2`."""

    def __init__(self, width_in: int, hidden: int, width: int, gelu: Literal["tanh", "none"]) -> None:
        super().__init__()
        self.gelu = gelu
        self.net = nn.ModuleList(
            [nn.ModuleDict({"proj": nn.Linear(width_in, hidden)}), nn.Identity(), nn.Linear(hidden, width)]
        )

    @property
    def _linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.net[0]["proj"], self.net[2]  # type: ignore[index, return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._linears[0].weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        up, down = self._linears
        return down(F.gelu(up(x), approximate=self.gelu))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, no mask. q [B, L, heads, head_dim]; k, v [B, M, heads, head_dim] -> as q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def spread(embedding: Tensor, frames: int) -> Tensor:
    """[B, 1, ...] as it is; [B, 2, ...], of the first frame and of the others -> [B, frames, ...]."""
    if embedding.shape[1] == 1:
        return embedding
    others = embedding[:, 1:].expand(-1, frames - 1, *embedding.shape[2:])
    return torch.cat((embedding[:, :1], others), dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift. x [B, L, dim]; shift, scale [B, S, dim]; float32."""
    x = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (x * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x [B, L, dim] times gate [B, S, dim] float32."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """[1, rows, dim], for training normal with a variance of 1 / dim."""
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, dim), std=dim**-0.5))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm in float32, whatever the dtype of x and of the weights."""
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMS norm over the last dim, computed in float32, in and out in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def float32_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """The linear in float32, whatever the dtype of its weights and under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), linear.weight.float(), linear.bias.float())


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[B, S] -> [B, S, dim] float32: cosines then sines of timestep * 10000^(-2i/dim), angles in float64."""
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2)
    angle = timestep.double().unsqueeze(-1) * TIMESTEP_PERIOD**-exponent
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def rope_table(head_dim: int, grid: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """(cos, sin) of the angles of every token: [L, head_dim/2, 2] float32, tokens in row-major (frame, row, column).

    The pairs are split over the three axes; each axis has a full range of frequencies, base 10000, over its own pairs.
    """
    space = 2 * (head_dim // 6)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * space, space, space)):
        frequency = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        position = torch.arange(grid[axis], dtype=torch.float64, device=device)
        shape = [1, 1, 1, -1]
        shape[axis] = grid[axis]
        angles.append(torch.outer(position, frequency).view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [B, L, heads, head_dim] by the table's angles, in float32; dtype of x kept."""
    cos, sin = rope.unsqueeze(1).unbind(-1)
    even, odd = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
