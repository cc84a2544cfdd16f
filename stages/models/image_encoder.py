"""The CLIP vision tower of Wan2.1's image-to-video models: a picture -> image tokens.

Source of the conventions (all blocks but the last are run, no norm after them, the picture squeezed into a square): the
Wan2.1 repository (`wan/modules/clip.py`). Only what is run has weights: of a checkpoint's tensors, the last block's
and `post_layernorm`'s have no place here. Names are those of transformers' `CLIPVisionModel` as they are in the files
of a Diffusers repository. That class itself is the tests' oracle only: importing it took this stage 4 s and 115 MB.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipc.architecture import ImageEncoderConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, RGB in [0, 1]."""


class ImageEncoder(nn.Module):
    """Normalised pictures [B, 3, image_size, image_size] -> tokens [B, tokens, hidden_size], in the weights' dtype."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.vision_model(pictures)


class VisionTower(nn.Module):
    """Patches and the class token, a norm, blocks."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Blocks(config)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pictures)))


class Blocks(nn.Module):
    """All blocks but the last."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class Embeddings(nn.Module):
    """[B, 3, image_size, image_size] -> [B, tokens, hidden_size]: the class token, then patches row by row."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.tokens, config.hidden_size)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.patch_embedding(pictures.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.self_attn = Attention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = Mlp(width, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Attention of all tokens to all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def image_tokens(encoder: ImageEncoder, frame: Tensor) -> Tensor:
    """A picture of any size, [H, W, 3] uint8 RGB -> tokens [tokens, hidden_size] float32, on the encoder's device."""
    weight = encoder.vision_model.embeddings.patch_embedding.weight
    picture = preprocess(frame, encoder.config.image_size).to(weight.device)
    return encoder(picture)[0].float()


def preprocess(frame: Tensor, size: int) -> Tensor:
    """[H, W, 3] uint8 -> [1, 3, size, size] float32 on the same device: the whole picture, its aspect ignored; bicubic
    without antialiasing, so that values may lie outside [0, 1]; normalised.

    One colour at a time: in float a picture is four times as large as it came, and it may be of 64 million pixels.
    """
    colours = [
        F.interpolate(frame[None, None, :, :, c].float(), size=(size, size), mode="bicubic", align_corners=False)
        for c in range(3)
    ]
    mean, std = (torch.tensor(x, device=frame.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (torch.cat(colours, dim=1) / 255 - mean) / std
