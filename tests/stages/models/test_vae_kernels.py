"""The Triton kernels of the VAE against plain torch: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.models.vae import WanVae
from stages.models.vae_codec import FastCodec, decode_tiles
from stages.models.vae_decode import FastDecoder
from stages.models.vae_walk import TorchOperations
from stages.vae_clips import to_frames
from tests.stages.models import vae_launches
from tests.stages.models.test_vae import Compare, Harden, make_config, make_model, make_reference

ROOT = Path(__file__).resolve().parents[3]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_in_the_interpreter() -> None:
    """In a process of its own, because Triton reads TRITON_INTERPRET when a kernel is defined: every kind of
    convolution with TMA and without, and the norm, in float32."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.stages.models.vae_launches"]
    ran = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    errors = dict(line.rsplit(" ", 1) for line in ran.stdout.splitlines())
    assert len(errors) == 2 * len(vae_launches.KINDS)
    assert all(float(error) <= 1e-5 for error in errors.values()), errors


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("kind", vae_launches.ON_GPU)
@pytest.mark.parametrize("tma", [True, False])
def test_on_a_gpu(kind: str, tma: bool) -> None:
    """The same compiled, in bfloat16: within its rounding."""
    assert vae_launches.error_of(kind, tma, torch.device("cuda"), torch.bfloat16) <= 4e-3


@pytest.fixture(params=[{"base_dim": 96}, {"base_dim": 64, "is_residual": True, "patch_size": 2}], ids=["2.1", "2.2"])
def vae(request: pytest.FixtureRequest, harden: Harden) -> WanVae:
    config = make_config(z_dim=16, num_res_blocks=1, **request.param)
    return make_model(config, harden(make_reference(config)).state_dict()).cuda()


def decode(decoder: FastDecoder, latents: Tensor, chunk: int) -> Tensor:
    clip = decoder.clip(*latents.shape[3:])
    return torch.cat([decoder.decode_chunk(part, clip) for part in latents.split(chunk, dim=2)], dim=2)


@pytest.mark.gpu
@needs_triton
@torch.inference_mode()
def test_a_clip_on_a_gpu(vae: WanVae, relative_error: Compare) -> None:
    """Wide networks of both kinds with the kernels, in bfloat16, 6 latent frames: as near to float32 as torch with
    the same rounding is, and the same bit for bit however the clip is cut, at any time, and at a second size."""
    from stages.kernels.vae_launch import Kernels

    decoder = FastDecoder(vae, Kernels(torch.cuda.get_device_capability()[0] >= 9), torch.bfloat16)
    other = FastDecoder(vae, TorchOperations(), torch.bfloat16, (1, 2, 4, 1))
    for size in ((10, 13), (9, 6)):
        latents = torch.randn(1, 16, 6, *size, generator=torch.Generator().manual_seed(2)).cuda()
        got, expected = decode(decoder, latents, 1), vae.decode(latents)
        assert relative_error(got, expected) <= 1.1 * relative_error(decode(other, latents, 2), expected)
        for chunk in (1, 2, 6):
            assert torch.equal(decode(decoder, latents, chunk), got)


@pytest.mark.gpu
@needs_triton
@torch.inference_mode()
def test_a_longer_clip_takes_no_more_memory_on_a_gpu(vae: WanVae) -> None:
    """Decoded and encoded with the kernels, whose chunks go as they come: the peak of 17 latent frames is that of 5."""
    from stages.kernels.vae_launch import Kernels

    codec = FastCodec(vae, Kernels(torch.cuda.get_device_capability()[0] >= 9), torch.bfloat16)
    latent = torch.randn(1, 16, 1, 10, 13, device="cuda")
    height, width = (side * codec.config.spatial_stride for side in (10, 13))
    frames = torch.rand(1, 3, codec.config.temporal_stride, height, width, device="cuda")

    def peak(decode: bool, chunks: int) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        clip = codec.clip(10, 13)
        for number in range(chunks):
            if decode:
                clip.decode(latent)
            else:
                clip.encode(frames if number else frames[:, :, :1])
        return torch.cuda.max_memory_allocated() - before

    for decode in (True, False):
        peak(decode, 3)  # what is made once, and scratch memory of libraries
        assert 0 < peak(decode, 17) <= peak(decode, 5)


@pytest.mark.gpu
@needs_triton
@torch.inference_mode()
def test_tiles_on_a_gpu(vae: WanVae) -> None:
    """A clip in tiles with the kernels is the clip untiled: at most 1 of 255 in 0.01 % of values."""
    from stages.kernels.vae_launch import Kernels

    codec = FastCodec(vae, Kernels(torch.cuda.get_device_capability()[0] >= 9), torch.bfloat16)
    latents = torch.randn(1, 16, 3, 20, 26, generator=torch.Generator().manual_seed(2)).cuda()
    expected = decode(codec.decoder, latents, 1)
    budget = sum(n * 20 * 26 << 2 * level for level, n in enumerate(codec.tile_decoder.costs.nbytes)) * 3 // 4
    got, pieces = torch.full_like(expected, torch.nan), list(decode_tiles(codec, latents, budget=budget))
    for frame, row, column, pixels in pieces:
        t, height, width = pixels.shape[2:]
        got[:, :, frame : frame + t, row : row + height, column : column + width] = pixels
    assert len({piece[1:3] for piece in pieces}) > 1
    apart = (to_frames(got).int() - to_frames(expected).int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) <= 1e-4
