"""The VAE against Diffusers' AutoencoderKLWan, and chunks against whole clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from ipc.architecture import VaeConfig
from stages.models.vae import Cache, WanVae

Harden = Callable[[nn.Module], nn.Module]
Compare = Callable[[Tensor, Tensor], float]


def make_config(base_dim: int, z_dim: int, num_res_blocks: int) -> VaeConfig:
    return VaeConfig(
        base_dim=base_dim,
        z_dim=z_dim,
        num_res_blocks=num_res_blocks,
        latents_mean=tuple(0.1 * i - 0.3 for i in range(z_dim)),
        latents_std=tuple(0.5 + 0.2 * i for i in range(z_dim)),
    )


SMALL = make_config(8, 4, 1)


def make_reference(config: VaeConfig) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )


def make_model(config: VaeConfig, weights: dict[str, Tensor]) -> WanVae:
    with torch.device("meta"):
        model = WanVae(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False)


def random_frames(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latents(config: VaeConfig, frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, config.z_dim, frames, height, width, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def vae(harden: Harden) -> WanVae:
    """A small VAE with hard weights."""
    return make_model(SMALL, harden(make_reference(SMALL)).state_dict())


@pytest.mark.parametrize(
    ("config", "size"),
    [(SMALL, (9, 24, 40)), (make_config(16, 16, 2), (5, 16, 32)), (make_config(12, 6, 1), (1, 16, 24))],
)
def test_equals_diffusers(
    config: VaeConfig, size: tuple[int, int, int], harden: Harden, relative_error: Compare
) -> None:
    """A Diffusers state dict, loaded with strict keys, encodes and decodes a batch of 2 to within 1e-5 of Diffusers."""
    reference = harden(make_reference(config))
    model = make_model(config, reference.state_dict())
    frames = random_frames(*size, batch=2)
    expected = reference.encode(frames).latent_dist.mean
    assert relative_error(model.encode_moments(frames)[0], expected) <= 1e-5
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    assert relative_error(model.encode(frames), (expected - mean) / std) <= 1e-5
    latents = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    decoded = reference.decode(latents * std + mean).sample
    assert relative_error(model.decode(latents), decoded) <= 1e-5
    assert decoded.abs().mean() < 0.9, "the comparison is worthless where most pixels are clamped"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("frames", [1, 5])
def test_decode_in_chunks(chunk: int, frames: int, vae: WanVae, relative_error: Compare) -> None:
    """5 latent frames decoded 1, 2, 3 or 5 at a time: 17 frames, the same as at once."""
    latents = random_latents(SMALL, frames, 3, 5, batch=2)
    cache: Cache = {}
    parts = [vae.decode_chunk(latents[:, :, i : i + chunk], cache) for i in range(0, frames, chunk)]
    assert relative_error(torch.cat(parts, dim=2), vae.decode(latents)) <= 1e-6


@pytest.mark.parametrize("sizes", [(1, 4, 4, 4, 4), (1, 8, 8), (5, 12), (1, 16), (9, 4, 4)])
def test_encode_in_chunks(sizes: tuple[int, ...], vae: WanVae, relative_error: Compare) -> None:
    """17 frames encoded in chunks of 4n, the first of 4n+1: 5 latent frames, the same as at once."""
    frames = random_frames(17, 24, 16, batch=2)
    cache: Cache = {}
    parts = [vae.encode_chunk(part, cache) for part in frames.split(list(sizes), dim=2)]
    assert relative_error(torch.cat(parts, dim=2), vae.encode(frames)) <= 1e-6


def test_resume_from_a_stored_cache(vae: WanVae) -> None:
    """Two chunks decoded, the cache copied, a new VAE goes on from the copy: bit for bit what the first one decodes."""
    latents = random_latents(SMALL, 4, 3, 5)
    cache: Cache = {}
    for i in range(2):
        vae.decode_chunk(latents[:, :, i : i + 1], cache)
    stored = {name: tensor.clone() for name, tensor in cache.items()}
    rebuilt = make_model(SMALL, vae.state_dict())
    for i in (2, 3):
        chunk = latents[:, :, i : i + 1]
        assert torch.equal(rebuilt.decode_chunk(chunk, stored), vae.decode_chunk(chunk, cache))


def test_cache_owns_its_memory(vae: WanVae) -> None:
    """Nothing in the cache is a view of an activation: each tensor's storage is as large as the tensor."""
    cache: Cache = {}
    vae.decode_chunk(random_latents(SMALL, 3, 3, 5), cache)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in cache.values())


def test_raw_and_normalised(vae: WanVae) -> None:
    """decode is decode_raw of denormalised latents, clamped; normalise undoes denormalise."""
    latents = 3 * random_latents(SMALL, 2, 3, 5)
    raw = vae.decode_raw(vae.denormalise(latents))
    assert raw.abs().max() > 1
    assert torch.equal(vae.decode(latents), raw.clamp(-1, 1))
    assert torch.allclose(vae.normalise(vae.denormalise(latents)), latents, atol=1e-5)


def test_every_parameter_is_trained(vae: WanVae) -> None:
    """Backward through encode and decode of a whole clip leaves a finite, non-zero gradient on every parameter."""
    vae.requires_grad_(True)
    mean, log_variance = vae.encode_moments(random_frames(9, 24, 16, batch=2))
    (vae.decode_raw(mean).square().mean() + log_variance.square().mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_bfloat16(vae: WanVae, relative_error: Compare) -> None:
    """With bf16 weights the VAE gives bf16 pixels within bf16's noise of float32's."""
    latents = random_latents(SMALL, 3, 3, 5)
    expected = vae.decode(latents)
    actual = vae.bfloat16().decode(latents)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= 5e-2


def test_published_model(facts: dict[str, Any]) -> None:
    """On meta, the published config has the 194 published tensors, 126,892,531 numbers, and no buffers."""
    with torch.device("meta"):
        model = WanVae(make_config(96, 16, 2))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == facts["vae"]
    assert sum(parameter.numel() for parameter in model.parameters()) == 126_892_531
    assert not list(model.buffers())


@pytest.mark.parametrize("count", [0, 2, 4, 8])
def test_wrong_number_of_frames(count: int, vae: WanVae) -> None:
    """A clip that is not 4n+1 frames long is refused, with its length, not cut."""
    with pytest.raises(ValueError, match=rf"must be 4n\+1 in the first chunk, got {count}"):
        vae.encode(random_frames(count, 16, 16))


def test_wrong_inputs(vae: WanVae) -> None:
    """Later chunks of other than 4n frames, sizes that are no multiple of 8, wrong channels: ValueError."""
    cache: Cache = {}
    vae.encode_chunk(random_frames(1, 16, 16), cache)
    with pytest.raises(ValueError, match="must be 4n after the first chunk, got 5"):
        vae.encode_chunk(random_frames(5, 16, 16), cache)
    with pytest.raises(ValueError, match="multiples of 8, got 16x20"):
        vae.encode(random_frames(1, 16, 20))
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\], got \[1, 4, 1, 16, 16\]"):
        vae.encode(torch.zeros(1, 4, 1, 16, 16))
    with pytest.raises(ValueError, match=r"\[B, 4, T, h, w\], got \[1, 16, 1, 2, 2\]"):
        vae.decode_raw(torch.zeros(1, 16, 1, 2, 2))
