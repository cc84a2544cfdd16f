"""First stage of the demo's training: the VAE, on clips of both styles."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.models.vae import WanVae
from tools.demo_judge import judge, score
from tools.demo_recipe import VaePhase
from tools.demo_scenes import BACKGROUND_RGB, SIZE, STYLES, crop_origins, render, sample_scenes
from tools.demo_training import Outcome, train

LATENT_NOISE = 0.1
"""Deviation of the noise on latents between encoder and decoder: the decoder learns to forgive the DiT's errors."""
LATENT_DECAY = 1e-4
"""Weight of the mean square of the latents; against the noise, it sets their scale."""
FOREGROUND_WEIGHT = 9.0


@dataclasses.dataclass(frozen=True)
class ClipPool:
    """Drawn clips: frames [N, 3, T, H, W] uint8 and each clip's background colour [N, 3] float32 in [-1, 1]."""

    frames: Tensor
    background: Tensor

    def draw(self, batch: int, frames: int) -> tuple[Tensor, Tensor]:
        """A random batch of the first `frames` frames, float32 in [-1, 1], and the backgrounds."""
        index = torch.randint(len(self.frames), (batch,), device=self.frames.device)
        return to_float(self.frames[index, :, :frames]), self.background[index]


def to_float(frames: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_uint8(frames: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def make_pool(
    count: int, generator: torch.Generator, *, held_out: bool = False, size: int = SIZE, chunk: int = 512
) -> ClipPool:
    """Draw `count` clips, every other one in the second style; below full size, cut out around a shape."""
    scenes = sample_scenes(count, generator, held_out=held_out)
    styles = torch.arange(count, device=generator.device) % len(STYLES)
    origins = crop_origins(scenes, size, generator)
    parts = []
    for at in range(0, count, chunk):
        part = slice(at, at + chunk)
        parts.append(to_uint8(render(scenes[part], style=styles[part], size=size, origin=origins[part])))
    background = to_float(torch.tensor(BACKGROUND_RGB, device=generator.device))[scenes.background]
    return ClipPool(torch.cat(parts), background)


def vae_loss(vae: WanVae, frames: Tensor, background: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction loss of clips [B, 3, T, H, W] through latents with `noise` [B, z, t, h, w] added.

    Absolute and squared error, ten times heavier on shapes and their surroundings, plus the error's gradient over space
    and time (edges and motion) and its mean over 4x4 pixels (flat areas).
    """
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.device.type == "cuda"):
        mean, _ = vae.encode_moments(frames)
        mean = mean.float()
        decoded = vae.decode_raw(mean + LATENT_NOISE * noise).float()
    error = decoded - frames
    weight = 1 + FOREGROUND_WEIGHT * foreground(frames, background)
    loss = (weight * (error.abs() + 3 * error.square())).mean()
    folded = error.transpose(1, 2).flatten(0, 1)
    folded_weight = weight.transpose(1, 2).flatten(0, 1)
    loss = loss + 0.5 * (folded_weight[..., 1:] * folded.diff(dim=-1).abs()).mean()
    loss = loss + 0.5 * (folded_weight[..., 1:, :] * folded.diff(dim=-2).abs()).mean()
    if error.shape[2] > 1:
        loss = loss + 0.5 * (weight[:, :, 1:] * error.diff(dim=2).abs()).mean()
    loss = loss + F.avg_pool2d(folded, 4).abs().mean()
    return loss + LATENT_DECAY * mean.square().mean()


def foreground(frames: Tensor, background: Tensor) -> Tensor:
    """1 within two pixels of anything that is not background, else 0: [B, 1, T, H, W]."""
    distance = (frames - background[:, :, None, None, None]).abs().amax(dim=1)
    return F.max_pool2d((distance > 0.06).float(), 5, stride=1, padding=2).unsqueeze(1)


@torch.no_grad()
def reconstruct(vae: WanVae, frames: Tensor, chunk: int = 32) -> Tensor:
    """uint8 clips -> their reconstructions, uint8, in float32 arithmetic."""
    return torch.cat([
        to_uint8(vae.decode_raw(vae.encode_moments(to_float(part))[0]).float()) for part in frames.split(chunk)
    ])  # fmt: skip


def psnr(frames: Tensor, decoded: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio of uint8 clips in dB, over the pixels of `mask` [B, 1, T, H, W] if given."""
    error = (frames.float() - decoded.float()).square()
    mean = error.mean() if mask is None else (error * mask).sum() / (mask.sum() * error.shape[1])
    return 10 * math.log10(255**2 / float(mean))


@torch.no_grad()
def encode_means(vae: WanVae, frames: Tensor, chunk: int = 128) -> Tensor:
    """uint8 clips -> latents before normalisation, float32."""
    parts = []
    for part in frames.split(chunk):
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.device.type == "cuda"):
            parts.append(vae.encode_moments(to_float(part))[0].float())
    return torch.cat(parts)


def train_vae(vae: WanVae, phase: VaePhase, generator: torch.Generator) -> Outcome:
    """Run one phase on freshly drawn clips."""
    device = generator.device
    pool = make_pool(phase.clips, generator, size=phase.size)
    latent_shape = (phase.batch, vae.config.z_dim, 1 + (phase.frames - 1) // 4, phase.size // 8, phase.size // 8)
    compute = torch.compile(vae_loss, dynamic=False) if phase.compiled else vae_loss

    def loss() -> Tensor:
        frames, background = pool.draw(phase.batch, phase.frames)
        return compute(vae, frames, background, torch.randn(latent_shape, device=device))

    name = f"vae {phase.frames}x{phase.size}x{phase.size}"
    return train(name, dict(vae.named_parameters()), loss, phase.schedule)


def measure_statistics(vae: WanVae, clips: int, generator: torch.Generator) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents per channel, over both styles."""
    latents = encode_means(vae, make_pool(clips, generator).frames).double().transpose(0, 1).flatten(1)
    return [round(v, 6) for v in latents.mean(dim=1).tolist()], [round(v, 6) for v in latents.std(dim=1).tolist()]


def validate_vae(vae: WanVae, clips: int, generator: torch.Generator) -> dict[str, float]:
    """Reconstruction quality on held-out clips: PSNR, whole and near shapes, and what the judge still recognises."""
    scenes = sample_scenes(clips, generator, held_out=True)
    figures = {}
    for number, style in enumerate(STYLES):
        frames = to_uint8(torch.cat([render(scenes[at : at + 64], style=number) for at in range(0, clips, 64)]))
        decoded = reconstruct(vae, frames)
        background = to_float(torch.tensor(BACKGROUND_RGB, device=generator.device))[scenes.background]
        figures[f"{style}_psnr"] = psnr(frames, decoded)
        figures[f"{style}_foreground_psnr"] = psnr(frames, decoded, foreground(to_float(frames), background))
        figures |= {f"{style}_{name}": value for name, value in score(judge(decoded), scenes).items()}
    return {name: round(value, 4) for name, value in figures.items()}
