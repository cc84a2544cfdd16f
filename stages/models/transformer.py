"""The Wan diffusion transformer (DiT), text to video: velocity = f(latents, timestep, prompt).

The forward is split by how often its parts change. Once per request: `encode_prompt` (text embedding, and the keys and
values of every cross-attention). Once per size: `rope`. Once per step: `forward`.

Parameter names are those of Diffusers' `WanTransformer3DModel`; the numerics are those of the Wan2.1 repository
(`wan/modules/model.py` under bf16 autocast): linears and attention in the dtype of the weights; time embedding,
modulation, LayerNorms, residual stream and head in float32; sinusoid and RoPE angles in float64.

L = tokens of a clip = (T/pt)(H/ph)(W/pw) for latents [B, C, T, H, W] and patches (pt, ph, pw).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.architecture import TransformerConfig

ROPE_THETA = 10000.0
TIMESTEP_PERIOD = 10000.0
FLOAT32_NAMES = ("condition_embedder.time_", "scale_shift_table", "norm2.", "proj_out.")


def keeps_float32(name: str) -> bool:
    """Whether the forward uses this parameter in float32, so that a float32 checkpoint should not be rounded for it."""
    return any(part in name for part in FLOAT32_NAMES)


class WanTransformer(nn.Module):
    """The text-to-video DiT. Latents and velocity: [B, C, T, H, W]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(dim, config.out_channels * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the linears and of attention."""
        return self.patch_embedding.weight.dtype

    def encode_prompt(self, prompt_embeds: Tensor) -> Tensor:
        """Prompt embeddings [B, text_len, text_dim], zero rows after the real ones, unmasked -> the context: keys and
        values of all cross-attentions [layers, 2, B, text_len, heads, head_dim]. Batches join along dim 2."""
        expected = [self.config.text_len, self.config.text_dim]
        if prompt_embeds.ndim != 3 or list(prompt_embeds.shape[1:]) != expected:
            raise ValueError(
                f"prompt_embeds must be [B, {expected[0]}, {expected[1]}], got {list(prompt_embeds.shape)}"
            )
        text = self.condition_embedder.text_embedder(prompt_embeds.to(self.dtype))
        return torch.stack([block.attn2.keys_values(text) for block in self.blocks])  # type: ignore[operator, union-attr]

    def rope(self, frames: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """Rotation table for latents of this size: [L, head_dim/2, 2] float32, (cos, sin) of each pair's angle."""
        grid = self._grid(frames, height, width)
        if max(grid) > self.config.rope_max_seq_len:
            raise ValueError(f"at most {self.config.rope_max_seq_len} patches along an axis, got {grid}")
        return rope_table(self.config.attention_head_dim, grid, device or self.patch_embedding.weight.device)

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        """latents [B, C, T, H, W], timestep [B] in 0..1000, context of `encode_prompt`, table of `rope` -> velocity
        [B, C, T, H, W] float32."""
        grid = self._grid(*latents.shape[2:])
        x = self._patchify(latents)
        time, modulation = self.condition_embedder.embed_time(timestep)
        for block, (k, v) in zip(self.blocks, context.unbind(0), strict=True):
            x = block(x, modulation, k, v, rope)
        return self._unpatchify(self._head(x, time), grid)

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
        """[B, L, dim], time embedding [B, dim] -> [B, L, patch * C], all float32."""
        shift, scale = (self.scale_shift_table.float() + time.unsqueeze(1)).chunk(2, dim=1)
        return float32_linear(modulate(x, shift, scale, self.config.eps), self.proj_out)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, (pt, ph, pw, C)] -> [B, C, T, H, W]."""
        x = x.view(len(x), *grid, *self.config.patch_size, -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


class ConditionEmbedder(nn.Module):
    """Embeds the timestep and the prompt."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = Mlp(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = Mlp(config.text_dim, config.dim)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> time embedding [B, dim] for the head and modulation [B, 6, dim] for the blocks, float32."""
        x = sinusoid(timestep, self.freq_dim)
        x = float32_linear(F.silu(float32_linear(x, self.time_embedder.linear_1)), self.time_embedder.linear_2)
        return x, float32_linear(F.silu(x), self.time_proj).view(len(x), 6, -1)


class Mlp(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward on a float32 residual stream [B, L, dim]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, modulation: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
        """x [B, L, dim] and modulation [B, 6, dim] float32; k, v [B, text_len, heads, head_dim]."""
        dtype = self.ffn.dtype
        table = self.scale_shift_table.float() + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
        x = x + gate1 * self.attn1(modulate(x, shift1, scale1, self.eps).to(dtype), rope)
        x = x + self.attn2(self._cross_norm(x).to(dtype), k, v)
        return x + gate2 * self.ffn(modulate(x, shift2, scale2, self.eps).to(dtype))

    def _cross_norm(self, x: Tensor) -> Tensor:
        if self.norm2 is None:
            return x
        return F.layer_norm(x, x.shape[-1:], self.norm2.weight.float(), self.norm2.bias.float(), self.eps)


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
    """Attention of the clip's tokens to the prompt's rows, padding included."""

    def keys_values(self, text: Tensor) -> Tensor:
        """Embedded text [B, text_len, dim] -> keys and values [2, B, text_len, heads, head_dim]."""
        k = self.split(rms_norm(self.to_k(text), self.norm_k))
        return torch.stack([k, self.split(self.to_v(text))])

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, dim]."""
        q = self.split(rms_norm(self.to_q(x), self.norm_q))
        return self.to_out[0](attention(q, k, v).flatten(2))


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear; the nesting gives Diffusers' names `net.0.proj` and `net.2`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [nn.ModuleDict({"proj": nn.Linear(dim, hidden)}), nn.Identity(), nn.Linear(hidden, dim)]
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
        return down(F.gelu(up(x), approximate="tanh"))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, no mask. q [B, L, heads, head_dim]; k, v [B, M, heads, head_dim] -> as q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift. x [B, L, dim]; shift, scale [B, 1, dim]; float32."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMS norm over the last dim, computed in float32, in and out in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def float32_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """The linear in float32, whatever the dtype of its weights and under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), linear.weight.float(), linear.bias.float())


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[B] -> [B, dim] float32: cosines then sines of timestep * 10000^(-2i/dim), angles in float64."""
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2)
    angle = timestep.double().unsqueeze(1) * TIMESTEP_PERIOD**-exponent
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


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
