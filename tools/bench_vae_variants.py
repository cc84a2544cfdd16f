"""What tools/bench_vae.py compares: ways to decode and encode a clip, each a function that returns its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.kernels.vae_launch import Kernels
from stages.models.vae import WanVae
from stages.models.vae_decode import FastDecoder
from stages.models.vae_encode import FastEncoder
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
        if part == "encode":
            variants[f"fast n={chunk}"] = fast_encode(vae, data, chunk)
    return variants


def diffusers_run(vae: WanVae, theirs: Any, data: Tensor, part: str) -> Tensor:
    """Pixels of normalised latents, or normalised latents of pixels."""
    if part == "decode":
        pixels: Tensor = theirs.decode(vae.denormalise(data).bfloat16(), return_dict=False)[0]
        return pixels
    return vae.normalise(theirs.encode(data.bfloat16()).latent_dist.mean)


def fast_encode(vae: WanVae, frames: Tensor, chunk: int) -> Run:
    """`FastEncoder` in bfloat16, the first frame and then frames of `chunk` latent frames per call."""
    encoder = FastEncoder(vae, make_kernels(), torch.bfloat16)
    height, width = frames.shape[3] // vae.config.spatial_stride, frames.shape[4] // vae.config.spatial_stride

    def run(keep: bool) -> list[Tensor]:
        clip = encoder.clip(height, width)
        rest = frames[:, :, 1:].split(chunk * vae.config.temporal_stride, dim=2) if frames.shape[2] > 1 else ()
        return [encoder.encode_chunk(part, clip) for part in (frames[:, :, :1], *rest)]

    return run


def make_kernels() -> Kernels:
    return Kernels(tma=torch.cuda.get_device_capability()[0] >= 9)


def fast_decode(vae: WanVae, latents: Tensor, chunk: int, groups: tuple[int, ...]) -> Run:
    """`FastDecoder` in bfloat16, `chunk` latent frames per call."""
    decoder = FastDecoder(vae, make_kernels(), torch.bfloat16, groups)

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
