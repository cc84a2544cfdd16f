"""What tools/bench_vae.py compares: ours and Diffusers', each a whole clip that is decoded or encoded on the GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.memory import DECODE_LATENTS
from stages.kernels.vae_launch import Kernels
from stages.models.vae import WanVae
from stages.models.vae_codec import FastCodec, decode_tiles, encode_tiles, has_tma
from stages.vae_clips import to_frames

CUDA = torch.device("cuda")


class Variant(NamedTuple):
    """One way to decode or encode a clip."""

    weights: Any
    """Its network, on the GPU."""
    run: Callable[[bool], Tensor | None]
    """True: all pixels or latents, float32 on the CPU. False: nothing is kept, as in the engine, where a chunk of
    frames leaves as uint8 before the next one is decoded."""


def our_decode(vae: WanVae, latents: Tensor) -> Variant:
    """As the engine decodes: with the float32 weights beside those of the kernels, and as many latent frames per
    quantum."""
    codec = our_codec(vae)
    decoder = codec.decoder

    def run(keep: bool) -> Tensor | None:
        clip, chunks = decoder.clip(*latents.shape[3:]), []
        for part in latents.split(DECODE_LATENTS, dim=2):
            pixels = decoder.decode_chunk(part, clip)
            if keep:
                chunks.append(pixels.cpu())
            else:
                to_frames(pixels)
        return torch.cat(chunks, dim=2) if keep else None

    return Variant(codec, run)


def our_tiles(vae: WanVae, latents: Tensor) -> Variant:
    """As the engine decodes from memory level 1 on: in tiles, to uint8 frames in host memory."""
    codec = our_codec(vae)
    codec.tile_decoder  # noqa: B018 (made before its memory is measured)
    stride, scale = vae.config.temporal_stride, vae.config.spatial_stride
    count, height, width = latents.shape[2:]
    shape = ((count - 1) * stride + 1, height * scale, width * scale, 3)

    def run(keep: bool) -> Tensor | None:
        frames = torch.empty(shape, dtype=torch.float32 if keep else torch.uint8)
        for piece in decode_tiles(codec, latents, DECODE_LATENTS):
            part = piece.pixels[0].permute(1, 2, 3, 0) if keep else to_frames(piece.pixels)
            t, h, w = (slice(at, at + n) for at, n in zip(piece[:3], part.shape[:3], strict=True))
            frames[t, h, w] = part.cpu()
        return frames.permute(3, 0, 1, 2).unsqueeze(0) if keep else None

    return Variant(codec, run)


def our_encode(vae: WanVae, frames: Tensor) -> Variant:
    """As the engine encodes: the first frame, then so many latent frames at once as it decodes."""
    codec = our_codec(vae)
    encoder = codec.encoder
    height, width = (side // vae.config.spatial_stride for side in frames.shape[3:])

    def run(keep: bool) -> Tensor | None:
        clip = encoder.clip(height, width)
        rest = frames[:, :, 1:].split(DECODE_LATENTS * vae.config.temporal_stride, dim=2)
        latents = torch.cat([encoder.encode_chunk(part, clip) for part in (frames[:, :, :1], *rest)], dim=2)
        return latents.cpu() if keep else None

    return Variant(codec, run)


def our_encode_tiles(vae: WanVae, frames: Tensor) -> Variant:
    """As the engine encodes from memory level 1 on: in tiles, of frames in host memory."""
    codec = our_codec(vae)
    codec.tile_encoder  # noqa: B018 (made before its memory is measured)
    height, width = (side // vae.config.spatial_stride for side in frames.shape[3:])
    rest = frames[:, :, 1:].cpu().split(DECODE_LATENTS * vae.config.temporal_stride, dim=2)
    chunks = [frames[:, :, :1].cpu(), *rest]

    def run(keep: bool) -> Tensor | None:
        latents = encode_tiles(codec, chunks, height, width)
        return latents.cpu() if keep else None

    return Variant(codec, run)


def our_codec(vae: WanVae) -> FastCodec:
    return FastCodec(copy.deepcopy(vae).to(CUDA), Kernels(has_tma(CUDA)), torch.bfloat16)


def their_decode(vae: WanVae, latents: Tensor) -> Variant:
    model = diffusers_vae(vae)

    def run(keep: bool) -> Tensor | None:
        pixels = model.decode(vae.denormalise(latents).bfloat16(), return_dict=False)[0]
        return pixels.float().cpu() if keep else None

    return Variant(model, run)


def their_encode(vae: WanVae, frames: Tensor) -> Variant:
    model = diffusers_vae(vae)

    def run(keep: bool) -> Tensor | None:
        mean = model.encode(frames.bfloat16()).latent_dist.mean
        return vae.normalise(mean.float()).cpu() if keep else None

    return Variant(model, run)


def diffusers_vae(vae: WanVae) -> Any:
    """Diffusers' AutoencoderKLWan with the same weights, in bfloat16."""
    from diffusers import AutoencoderKLWan

    config = vae.config
    with CUDA:
        model = AutoencoderKLWan(
            base_dim=config.base_dim, z_dim=config.z_dim, dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks, temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.latents_mean), latents_std=list(config.latents_std),
            decoder_base_dim=config.decoder_base_dim, is_residual=config.is_residual, patch_size=config.patch_size,
            in_channels=3 * config.patch_size**2, out_channels=3 * config.patch_size**2,
            scale_factor_spatial=config.spatial_stride,
        )  # fmt: skip
    model.load_state_dict(vae.state_dict(), strict=True)
    return model.to(torch.bfloat16).eval().requires_grad_(False)
