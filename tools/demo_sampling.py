"""Samples clips from `wan-demo` in one process: prompts in, uint8 frames out. For measuring, not for serving."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch import Tensor

from stages.solvers import SolverName, make_schedule, new_state, step
from tools.demo_networks import Networks, prompt_embeds
from tools.demo_scenes import FRAMES, SIZE
from tools.demo_tokenizer import token_rows
from tools.demo_vae_training import to_uint8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How clips are sampled; clip i of a batch gets the noise of seed + i, drawn on the CPU."""

    solver: SolverName = "unipc"
    steps: int = 20
    guidance_scale: float = 3.0
    flow_shift: float = 3.0
    seed: int = 0


@torch.no_grad()
def generate(
    networks: Networks, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling, chunk: int = 32
) -> Tensor:
    """Clips [B, 3, FRAMES, SIZE, SIZE] uint8 on the networks' device; the empty prompt is the negative one."""
    parts = []
    for at in range(0, len(prompts), chunk):
        latents = denoise(
            networks, tokenizer, prompts[at : at + chunk], dataclasses.replace(sampling, seed=sampling.seed + at)
        )
        parts.append(to_uint8(networks.vae.decode(latents)))
    return torch.cat(parts)


def denoise(networks: Networks, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling) -> Tensor:
    """Normalised latents [B, z, t, h, w] float32."""
    transformer = networks.transformer
    device = next(transformer.parameters()).device
    noise = [
        torch.randn(
            16,
            1 + (FRAMES - 1) // 4,
            SIZE // 8,
            SIZE // 8,
            generator=torch.Generator().manual_seed(sampling.seed + row),
        )
        for row in range(len(prompts))
    ]
    sample = torch.stack(noise).to(device)
    longest = max(len(encoding.ids) for encoding in tokenizer.encode_batch(["", *prompts]))
    ids = token_rows(tokenizer, [*prompts, ""], longest).long().to(device)
    embeds = prompt_embeds(networks.text_encoder, ids, transformer.config.text_len)
    context = transformer.encode_prompt(embeds[:-1])
    empty = transformer.encode_prompt(embeds[-1:]).expand(-1, -1, len(prompts), -1, -1, -1)
    rope = transformer.rope(*sample.shape[2:])
    schedule = make_schedule(sampling.solver, sampling.steps, sampling.flow_shift)
    state = new_state(schedule, sample)
    for index, timestep in enumerate(schedule.timesteps):
        time = torch.full((len(prompts),), float(timestep), device=device)
        velocity = transformer(sample, time, context, rope)
        if sampling.guidance_scale != 1:
            negative = transformer(sample, time, empty, rope)
            velocity = negative + sampling.guidance_scale * (velocity - negative)
        sample, state = step(schedule, index, velocity, sample, state)
    return sample


def contact_sheet(
    clips: Tensor, titles: list[str], path: Path, shown: tuple[int, ...] = (0, 4, 8, 12, 16), columns: int = 2
) -> None:
    """A PNG with a row of frames and a title per clip; clips [B, 3, T, H, W] uint8."""
    height, width = clips.shape[-2:]
    gap, title_height = 6, 13
    cell_width, cell_height = len(shown) * (width + 2) + gap, height + title_height + gap
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), (60, 60, 64))
    draw = ImageDraw.Draw(sheet)
    for number, (clip, title) in enumerate(zip(clips.cpu(), titles, strict=True)):
        left, top = gap + number % columns * cell_width, gap + number // columns * cell_height
        limit = cell_width // 6
        draw.text((left, top), title if len(title) <= limit else title[: limit - 2] + "..", fill=(240, 240, 240))
        for position, frame in enumerate(shown):
            image = Image.fromarray(clip[:, frame].permute(1, 2, 0).numpy())
            sheet.paste(image, (left + position * (width + 2), top + title_height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
