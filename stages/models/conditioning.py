"""What a transformer's tokens are conditioned on, embedded: timestep, prompt, image tokens, place in the clip."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.architecture import TransformerConfig
from stages.models.feed_forward import FeedForward

ROPE_THETA = 10000.0
TIMESTEP_PERIOD = 10000.0
IMAGE_NORM_EPS = 1e-5
"""Of the LayerNorms around the embedding of image tokens: those of the original have torch's default."""


class Time(NamedTuple):
    """Timesteps, embedded: float32."""

    embedding: Tensor
    """[B, S, dim], for the head."""
    modulation: Tensor
    """[B, S, 6, dim], for the blocks."""

    def row(self, index: int) -> Time:
        """One of B, as B = 1."""
        return Time(self.embedding[index : index + 1], self.modulation[index : index + 1])

    def spread(self, frames: int) -> Time:
        """S = 1 as it is; S = 2, of the first frame and of the others, as S = frames."""
        return Time(spread(self.embedding, frames), spread(self.modulation, frames))


class ConditionEmbedder(nn.Module):
    """Embeds the timestep, the prompt and, for models that see them, image tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = Mlp(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = Mlp(config.text_dim, config.dim)
        self.image_embedder = ImageEmbedder(config.image_dim, config.dim) if config.image_dim is not None else None

    def embed_time(self, timestep: Tensor) -> Time:
        """[B] or [B, S]; S is 1 for [B]."""
        x = sinusoid(timestep.view(len(timestep), -1), self.freq_dim)
        x = float32_linear(F.silu(float32_linear(x, self.time_embedder.linear_1)), self.time_embedder.linear_2)
        return Time(x, float32_linear(F.silu(x), self.time_proj).unflatten(-1, (6, -1)))

    def embed_image(self, tokens: Tensor) -> Tensor:
        """[B, N, image_dim] -> [B, N, dim] float32, in a model that sees images."""
        assert self.image_embedder is not None, "image_dim is set"
        return self.image_embedder(tokens)


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


def spread(embedding: Tensor, frames: int) -> Tensor:
    """[B, 1, ...] as it is; [B, 2, ...], of the first frame and of the others -> [B, frames, ...]."""
    if embedding.shape[1] == 1:
        return embedding
    others = embedding[:, 1:].expand(-1, frames - 1, *embedding.shape[2:])
    return torch.cat((embedding[:, :1], others), dim=1)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm in float32, whatever the dtype of x and of the weights."""
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)


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
