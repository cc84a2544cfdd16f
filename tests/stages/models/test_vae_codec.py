"""Which code encodes and decodes clips, and that both are used in the same way."""

from __future__ import annotations

import pytest
import torch

from stages.models.vae import WanVae
from stages.models.vae_codec import ClipCoder, FastCodec, PlainCodec, choose_codec
from stages.models.vae_walk import TorchOperations
from tests.stages.models.test_vae import (
    SMALL,
    Compare,
    Harden,
    make_model,
    make_reference,
    random_frames,
    random_latents,
)


@pytest.fixture
def vae(harden: Harden) -> WanVae:
    return make_model(SMALL, harden(make_reference(SMALL)).state_dict())


def decode(clip: ClipCoder, vae: WanVae) -> torch.Tensor:
    return torch.cat([clip.decode(part) for part in random_latents(vae.config, 3, 3, 5).split(1, dim=2)], dim=2)


def encode(clip: ClipCoder) -> torch.Tensor:
    return torch.cat([clip.encode(part) for part in random_frames(9, 24, 40).split([1, 8], dim=2)], dim=2)


def test_both_codecs(vae: WanVae, relative_error: Compare) -> None:
    """A clip decoded, and one encoded, chunk by chunk with each: the same to within 1e-5, and memory in between."""
    plain, fast = PlainCodec(vae), FastCodec(vae, TorchOperations(), torch.float32)
    clips = [codec.clip(3, 5) for codec in (plain, fast)]
    assert [clip.nbytes for clip in clips] == [0, 0]
    decoded = [decode(clip, vae) for clip in clips]
    assert all(clip.nbytes > 0 for clip in clips)
    assert relative_error(decoded[1], decoded[0]) <= 1e-5
    assert relative_error(encode(fast.clip(3, 5)), encode(plain.clip(3, 5))) <= 1e-5


def test_the_choice_on_a_cpu(vae: WanVae) -> None:
    """Plain torch in float32."""
    codec = choose_codec(vae, "cpu")
    assert isinstance(codec, PlainCodec) and codec.name == "plain torch, float32"


@pytest.mark.gpu
@torch.inference_mode()
def test_the_choice_on_a_gpu(vae: WanVae, relative_error: Compare) -> None:
    """Fused kernels in bfloat16, for widths of 8 channels too: within its rounding of float32."""
    codec = choose_codec(vae.cuda(), "cuda:0")
    assert isinstance(codec, FastCodec) and codec.name == "fused kernels, bfloat16"
    latents, frames = random_latents(vae.config, 2, 3, 5).cuda(), random_frames(5, 24, 40).cuda()
    assert relative_error(codec.clip(3, 5).decode(latents), vae.decode(latents)) <= 3e-2
    assert relative_error(codec.clip(3, 5).encode(frames), vae.encode(frames)) <= 3e-2
