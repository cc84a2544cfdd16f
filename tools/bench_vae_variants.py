"""What tools/bench_vae.py compares: ways to decode and encode a clip, each a function that returns its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.kernels.vae_launch import Kernels
from stages.models.vae import WanVae
from stages.models.vae_fast import FastDecoder
from stages.vae import to_frames

Run = Callable[[bool], list[Tensor]]
"""Runs the whole clip. True: all of its chunks. False: nothing is kept, as in the engine, where a chunk of frames
leaves as uint8 before the next one is decoded."""


def make_variants(
    vae: WanVae, theirs: Any, data: Tensor, part: str, chunks: list[int], groups: dict[str, tuple[int, ...]]
) -> dict[str, Run]:
    """Diffusers, and ours for every number of latent frames per call and every grouping."""
    variants: dict[str, Run] = {}
    if theirs is not None:
        variants["diffusers"] = lambda keep: [diffusers_run(vae, theirs, data, part)]
    for chunk in chunks:
        for name, group in groups.items():
            if part == "decode":
                variants[f"fast n={chunk} groups {name}"] = fast_decode(vae, data, chunk, group)
    return variants


def diffusers_run(vae: WanVae, theirs: Any, data: Tensor, part: str) -> Tensor:
    """Pixels of normalised latents, or normalised latents of pixels."""
    if part == "decode":
        pixels: Tensor = theirs.decode(vae.denormalise(data).bfloat16(), return_dict=False)[0]
        return pixels
    return vae.normalise(theirs.encode(data.bfloat16()).latent_dist.mean)


def fast_decode(vae: WanVae, latents: Tensor, chunk: int, groups: tuple[int, ...]) -> Run:
    """`FastDecoder` in bfloat16, `chunk` latent frames per call."""
    major = torch.cuda.get_device_capability()[0]
    decoder = FastDecoder(vae, Kernels(tma=major >= 9), torch.bfloat16, groups)

    def run(keep: bool) -> list[Tensor]:
        clip = decoder.clip(*latents.shape[3:])
        chunks = []
        for part in latents.split(chunk, dim=2):
            pixels = decoder.decode_chunk(part, clip)
            if keep:
                chunks.append(pixels)
            else:
                to_frames(pixels)
        return chunks

    return run
