"""Which code encodes and decodes clips, that both are used in the same way, and the test that decides."""

from __future__ import annotations

import re

import pytest
import torch

from engine.models import load_model
from stages.models.vae import WanVae
from stages.models.vae_check import choose, compare
from stages.models.vae_codec import ClipCoder, FastCodec, PlainCodec, make_codec
from stages.models.vae_conv import Conv, Target
from stages.models.vae_frames import FramePool
from stages.models.vae_walk import TorchOperations
from tests.stages.models.test_vae import (
    SMALL,
    SMALL_22,
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
    """Plain torch in float32. What was chosen before is not tested again."""
    cpu = torch.device("cpu")
    assert choose("auto", SMALL, cpu) == ("torch", "needs an NVIDIA GPU")
    assert choose("torch", SMALL, cpu) == ("torch", "")
    assert choose("triton", SMALL, cpu) == ("triton", "")
    codec = make_codec(vae, "torch", cpu)
    assert isinstance(codec, PlainCodec) and codec.name == "plain torch, float32"


class Shifted(TorchOperations):
    """Kernels of which one is wrong: frames that become two come in the wrong order."""

    def conv(self, layer: Conv, source: FramePool, slots: list[int], target: Target) -> None:  # type: ignore[override]
        if layer.halves == 2:
            target = Target(target.pool, target.residual, target.raw[::-1], target.normed, target.gamma)
        TorchOperations.conv(layer, source, slots, target)


def test_the_test_of_the_kernels() -> None:
    """Operations that are right pass it, in float32 and with the rounding of bfloat16; wrong ones do not, and it says
    what is wrong. It beats after every chunk."""
    cpu, beats = torch.device("cpu"), []
    right = TorchOperations()
    assert compare(SMALL, cpu, [right], torch.float32, lambda: beats.append(1)) == ""
    assert len(beats) == 8
    assert compare(SMALL_22, cpu, [right], torch.float32, lambda: None) == ""
    assert compare(SMALL, cpu, [right], torch.bfloat16, lambda: None) == ""
    problem = compare(SMALL, cpu, [right, Shifted()], torch.bfloat16, lambda: None)
    assert re.fullmatch(r"a decoded clip is \S+ from float32, expected at most 3e-02", problem)


@pytest.mark.gpu
@torch.inference_mode()
def test_the_choice_on_a_gpu(vae: WanVae, relative_error: Compare) -> None:
    """Fused kernels in bfloat16, for both kinds of VAE and for widths of 8 channels too: within its rounding of
    float32."""
    gpu = torch.device("cuda:0")
    assert choose("auto", SMALL, gpu) == ("triton", "")
    assert choose("auto", load_model("wan2.1-t2v-1.3b").vae, gpu) == ("triton", "")
    assert choose("auto", SMALL_22, gpu) == ("triton", "")
    assert choose("auto", load_model("wan2.2-ti2v-5b").vae, gpu) == ("triton", "")
    codec = make_codec(vae.cuda(), "triton", gpu)
    assert isinstance(codec, FastCodec) and codec.name == "fused kernels, bfloat16"
    latents, frames = random_latents(vae.config, 2, 3, 5).cuda(), random_frames(5, 24, 40).cuda()
    assert relative_error(codec.clip(3, 5).decode(latents), vae.decode(latents)) <= 3e-2
    assert relative_error(codec.clip(3, 5).encode(frames), vae.encode(frames)) <= 3e-2
