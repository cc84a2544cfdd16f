"""Second stage of the demo's training: transformer and text encoder together, by flow matching on encoded clips.

x_sigma = (1 - sigma) x0 + sigma noise, the transformer predicts noise - x0, timestep 1000 sigma. A tenth of the
captions are replaced by the empty one, so that guidance against the empty prompt works.
"""

from __future__ import annotations

import dataclasses
import time
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from stages.models.vae import WanVae
from tools.demo_captions import Wording, captions
from tools.demo_networks import Networks, encode_text, training_block, training_velocity
from tools.demo_recipe import TransformerPhase
from tools.demo_scenes import render, sample_scenes
from tools.demo_tokenizer import END_ID, token_rows
from tools.demo_training import Outcome, train


@dataclasses.dataclass(frozen=True)
class LatentPool:
    """Encoded clips: normalised latents [N, z, t, h, w] float16 and their captions' tokens [N, K, L] int16."""

    latents: Tensor
    tokens: Tensor

    def draw(self, batch: int, dropout: float) -> tuple[Tensor, Tensor]:
        """Latents float32 and token ids int64 of a random batch; `dropout` of the captions become the empty one."""
        device = self.latents.device
        clip = torch.randint(len(self.latents), (batch,), device=device)
        wording = torch.randint(self.tokens.shape[1], (batch,), device=device)
        ids = self.tokens[clip, wording].long()
        empty = torch.zeros_like(ids)
        empty[:, 0] = END_ID
        dropped = torch.rand(batch, 1, device=device) < dropout
        return self.latents[clip].float(), torch.where(dropped, empty, ids)


def make_latent_pool(
    vae: WanVae, tokenizer: Tokenizer, phase: TransformerPhase, length: int, generator: torch.Generator, rng: Random
) -> LatentPool:
    """Draw, encode and caption the phase's clips."""
    started = time.monotonic()
    scenes = sample_scenes(phase.clips, generator)
    chunk = min(256, phase.clips)
    encode = torch.compile(vae.encode, dynamic=False) if generator.device.type == "cuda" else vae.encode
    latents = []
    with (
        torch.no_grad(),
        torch.autocast(generator.device.type, torch.bfloat16, enabled=generator.device.type == "cuda"),
    ):
        for at in range(0, phase.clips, chunk):
            clips = render(scenes[at : at + chunk], style=phase.style)
            # The decoder is trained on 8-bit clips; encode what it saw.
            clips = ((clips + 1) * 127.5).round() / 127.5 - 1
            latents.append(encode(clips).half())
    lines = captions(scenes.to("cpu"), rng, Wording(), phase.captions_per_clip)
    tokens = token_rows(tokenizer, lines, length).view(phase.clips, phase.captions_per_clip, length)
    pool = LatentPool(torch.cat(latents), tokens.to(generator.device))
    finite = bool(pool.latents.isfinite().all())
    print(f"pool: {phase.clips} clips, std {float(pool.latents.float().std()):.3f}, finite {finite}, "
          f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    return pool


def train_transformer(
    networks: Networks, tokenizer: Tokenizer, phase: TransformerPhase, length: int, seed: int, rng: Random
) -> Outcome:
    """Train on the phase's style; revision 2 (style 1) leaves the text encoder as it is."""
    device = next(networks.transformer.parameters()).device
    pool = make_latent_pool(networks.vae, tokenizer, phase, length, torch.Generator(device).manual_seed(seed), rng)
    parameters: dict[str, nn.Parameter] = {f"transformer.{n}": p for n, p in networks.transformer.named_parameters()}
    if phase.style == 0:
        parameters |= {f"text_encoder.{n}": p for n, p in networks.text_encoder.named_parameters()}
    networks.text_encoder.requires_grad_(phase.style == 0)
    rope = networks.transformer.rope(*pool.latents.shape[2:])
    block = torch.compile(training_block, dynamic=False) if device.type == "cuda" else training_block

    def loss() -> Tensor:
        latents, ids = pool.draw(phase.batch, phase.caption_dropout)
        uniform = torch.rand(phase.batch, device=device)
        sigma = phase.flow_shift * uniform / (1 + (phase.flow_shift - 1) * uniform)
        noise = torch.randn_like(latents)
        level = sigma.view(-1, 1, 1, 1, 1)
        noised = torch.lerp(latents, noise, level)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            rows = encode_text(networks.text_encoder, ids)
            velocity = training_velocity(networks.transformer, noised, 1000 * sigma, rows, rope, block)
        return (velocity.float() - (noise - latents)).square().mean()

    return train("style" if phase.style else "dit", parameters, loss, phase.schedule, every=1000)
