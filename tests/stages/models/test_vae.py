"""The VAEs against Diffusers' AutoencoderKLWan, and chunks against whole clips."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import AvgDown3D, DupUp3D
from torch import Tensor, nn

from engine.models import load_model
from ipc.architecture import VaeConfig
from stages.models.vae import ResidualUpBlock, WanVae
from stages.models.vae_layers import Cache, add_repeated, average_down, fold_pixels, unfold_pixels

Harden = Callable[[nn.Module], nn.Module]
Compare = Callable[[Tensor, Tensor], float]


def make_config(base_dim: int, z_dim: int, num_res_blocks: int, **fields: Any) -> VaeConfig:
    return VaeConfig(
        base_dim=base_dim,
        z_dim=z_dim,
        num_res_blocks=num_res_blocks,
        latents_mean=tuple(0.1 * i - 0.3 for i in range(z_dim)),
        latents_std=tuple(0.5 + 0.2 * i for i in range(z_dim)),
        **fields,
    )


SMALL = make_config(8, 4, 1)
SMALL_22 = make_config(8, 4, 1, decoder_base_dim=12, is_residual=True, patch_size=2)
UNUSUAL_22 = make_config(
    8, 6, 2, is_residual=True, patch_size=2, dim_mult=(1, 1, 2, 2), temporal_downsample=(True, True, False)
)
"""Its decoder doubles time where it halves the channels."""


def make_reference(config: VaeConfig) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
        decoder_base_dim=config.decoder_base_dim,
        is_residual=config.is_residual,
        patch_size=config.patch_size,
        in_channels=3 * config.patch_size**2,
        out_channels=3 * config.patch_size**2,
        scale_factor_spatial=config.spatial_stride,
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


@pytest.fixture(params=[SMALL, SMALL_22], ids=["2.1", "2.2"])
def vae(request: pytest.FixtureRequest, harden: Harden) -> WanVae:
    """A small VAE of each kind with hard weights."""
    return make_model(request.param, harden(make_reference(request.param)).state_dict())


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SMALL, (9, 24, 40)),
        (make_config(16, 16, 2), (5, 16, 32)),
        (make_config(12, 6, 1), (1, 16, 24)),
        (SMALL_22, (17, 48, 80)),
        (SMALL_22, (1, 16, 48)),
        (UNUSUAL_22, (9, 32, 48)),
    ],
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
    latents = random_latents(vae.config, frames, 3, 5, batch=2)
    cache: Cache = {}
    parts = [vae.decode_chunk(latents[:, :, i : i + chunk], cache) for i in range(0, frames, chunk)]
    assert relative_error(torch.cat(parts, dim=2), vae.decode(latents)) <= 1e-6


@pytest.mark.parametrize("sizes", [(1, 4, 4, 4, 4), (1, 8, 8), (5, 12), (1, 16), (9, 4, 4)])
def test_encode_in_chunks(sizes: tuple[int, ...], vae: WanVae, relative_error: Compare) -> None:
    """17 frames encoded in chunks of 4n, the first of 4n+1: 5 latent frames, the same as at once."""
    frames = random_frames(17, 48, 16, batch=2)
    cache: Cache = {}
    parts = [vae.encode_chunk(part, cache) for part in frames.split(list(sizes), dim=2)]
    assert relative_error(torch.cat(parts, dim=2), vae.encode(frames)) <= 1e-6


@pytest.mark.parametrize("config", [make_config(16, 16, 1), make_config(16, 16, 1, is_residual=True, patch_size=2)])
def test_chunks_are_the_whole_bit_for_bit(config: VaeConfig) -> None:
    """Every convolution takes one value of its input, so that no sum has an order: 17 frames encoded 1 + 4 + 12 and
    1 + 8 + 8 at a time, and 5 latent frames decoded 1, 2, 3 or 4 at a time, are those of the whole clip bit for bit."""
    model = make_model(config, pick_taps(WanVae(config)).state_dict())
    frames, latents = random_frames(17, 64, 64), random_latents(config, 5, 4, 4)
    for sizes in ([1, 4, 12], [1, 8, 8]):
        cache: Cache = {}
        parts = [model.encode_chunk(part, cache) for part in frames.split(sizes, dim=2)]
        assert torch.equal(torch.cat(parts, dim=2), model.encode(frames)), sizes
    whole = model.decode_raw(latents)
    assert len(whole[0, 0].flatten(1).unique(dim=0)) == 17, "the comparison is worthless where frames are equal"
    for size in (1, 2, 3, 4):
        cache = {}
        parts = [model.decode_raw(part, cache) for part in latents.split(size, dim=2)]
        assert torch.equal(torch.cat(parts, dim=2), whole), size


def pick_taps(model: WanVae) -> WanVae:
    """Kernels that are zero but for a 1 or -1 per output channel at a random tap; no attention."""
    generator = torch.Generator().manual_seed(4)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            rows = torch.zeros_like(module.weight).flatten(1)
            taps = torch.randint(rows.shape[1], (len(rows), 1), generator=generator)
            signs = torch.randint(2, (len(rows), 1), generator=generator) * 2.0 - 1
            kernel = rows.scatter_(1, taps, signs).view(module.weight.shape)
            module.weight = nn.Parameter(kernel * ("attentions" not in name), requires_grad=False)
    return model


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_shortcuts(time: int, ratio: int) -> None:
    """Averaging and repeating a clip of 5 frames, whole and as 1 + 2 + 2 or 1 + 4: Diffusers' values, bit for bit the
    same however it is cut, and repeating is added to what is there."""
    x = torch.randn(2, 5, 6, 4, 8, generator=torch.Generator().manual_seed(5))
    first, rest = x[:, :1], x[:, 1:]
    down = average_down(x, 8 * ratio, time, 2)
    reference = AvgDown3D(8, 8 * ratio, time, 2)(x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(down, reference, rtol=1e-6, atol=1e-6)
    for pieces in ([first, rest], [first, rest[:, :2], rest[:, 2:]]):
        assert torch.equal(torch.cat([average_down(p, 8 * ratio, time, 2) for p in pieces], dim=1), down)
    expected = DupUp3D(8, 8 // ratio, time, 2)(x.movedim(-1, 1), first_chunk=True).movedim(1, -1)
    y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    assert torch.equal(add_repeated(y.clone(), x, time), y + expected)
    pieces = [add_repeated(y[:, :1].clone(), first, time), add_repeated(y[:, 1:].clone(), rest, time)]
    assert torch.equal(torch.cat(pieces, dim=1), y + expected)


def test_fold() -> None:
    """Blocks of 2x2 pixels become channels in the published order "(c r q)", r the column and q the row; and back."""
    x = torch.arange(2 * 3 * 4 * 6 * 3).view(2, 3, 4, 6, 3)
    folded = fold_pixels(x, 2)
    assert folded.shape == (2, 3, 2, 3, 12)
    for c, r, q in itertools.product(range(3), range(2), range(2)):
        assert torch.equal(folded[..., 4 * c + 2 * r + q], x[:, :, q::2, r::2, c])
    assert torch.equal(unfold_pixels(folded, 2), x)


def test_resume_from_a_stored_cache(vae: WanVae) -> None:
    """Two chunks decoded, the cache copied, a new VAE goes on from the copy: bit for bit what the first one decodes."""
    latents = random_latents(vae.config, 4, 3, 5)
    cache: Cache = {}
    for i in range(2):
        vae.decode_chunk(latents[:, :, i : i + 1], cache)
    stored = {name: tensor.clone() for name, tensor in cache.items()}
    rebuilt = make_model(vae.config, vae.state_dict())
    for i in (2, 3):
        chunk = latents[:, :, i : i + 1]
        assert torch.equal(rebuilt.decode_chunk(chunk, stored), vae.decode_chunk(chunk, cache))


def test_cache_owns_its_memory(vae: WanVae) -> None:
    """Nothing in the cache is a view of an activation: each tensor's storage is as large as the tensor."""
    cache: Cache = {}
    vae.decode_chunk(random_latents(vae.config, 3, 3, 5), cache)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in cache.values())


def test_raw_and_normalised(vae: WanVae) -> None:
    """decode is decode_raw of denormalised latents, clamped; normalise undoes denormalise."""
    latents = 3 * random_latents(vae.config, 2, 3, 5)
    raw = vae.decode_raw(vae.denormalise(latents))
    assert raw.abs().max() > 1
    assert torch.equal(vae.decode(latents), raw.clamp(-1, 1))
    assert torch.allclose(vae.normalise(vae.denormalise(latents)), latents, atol=1e-5)


def test_every_parameter_is_trained(vae: WanVae) -> None:
    """Backward through encode and decode of a whole clip leaves a finite, non-zero gradient on every parameter."""
    vae.requires_grad_(True)
    mean, log_variance = vae.encode_moments(random_frames(9, 48, 16, batch=2))
    (vae.decode_raw(mean).square().mean() + log_variance.square().mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_bfloat16(vae: WanVae, relative_error: Compare) -> None:
    """With bf16 weights the VAE gives bf16 pixels within bf16's noise of float32's."""
    latents = random_latents(vae.config, 3, 3, 5)
    expected = vae.decode(latents)
    actual = vae.bfloat16().decode(latents)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= 5e-2


@pytest.mark.parametrize(
    ("model", "table", "numbers"),
    [("wan2.1-t2v-1.3b", "vae", 126_892_531), ("wan2.2-ti2v-5b", "vae22", 704_688_668)],
)
def test_published_models(model: str, table: str, numbers: int, facts: dict[str, Any]) -> None:
    """On meta, the configs that ship have the published tensors (194 and 196), as many numbers, and no buffers."""
    config = load_model(model).vae
    with torch.device("meta"):
        vae = WanVae(config)
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == facts[table]
    assert sum(parameter.numel() for parameter in vae.parameters()) == numbers
    assert not list(vae.buffers())
    assert config.spatial_stride == 8 * config.patch_size and config.temporal_stride == 4


@pytest.mark.parametrize("count", [0, 2, 4, 8])
def test_wrong_number_of_frames(count: int, vae: WanVae) -> None:
    """A clip that is not 4n+1 frames long is refused, with its length, not cut."""
    with pytest.raises(ValueError, match=rf"must be 4n\+1 in the first chunk, got {count}"):
        vae.encode(random_frames(count, 16, 16))


def test_wrong_inputs(vae: WanVae) -> None:
    """Later chunks of other than 4n frames, sizes that are no multiple of the stride, wrong channels: ValueError."""
    cache: Cache = {}
    vae.encode_chunk(random_frames(1, 16, 16), cache)
    with pytest.raises(ValueError, match="must be 4n after the first chunk, got 5"):
        vae.encode_chunk(random_frames(5, 16, 16), cache)
    with pytest.raises(ValueError, match=f"multiples of {vae.config.spatial_stride}, got 16x20"):
        vae.encode(random_frames(1, 16, 20))
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\], got \[1, 4, 1, 16, 16\]"):
        vae.encode(torch.zeros(1, 4, 1, 16, 16))
    with pytest.raises(ValueError, match=r"\[B, 4, T, h, w\], got \[1, 16, 1, 2, 2\]"):
        vae.decode_raw(torch.zeros(1, 16, 1, 2, 2))


def test_widths_that_no_shortcut_joins() -> None:
    """Stages of Wan2.2's kind whose widths have no whole ratio that fits: ValueError that has both widths."""
    with pytest.raises(ValueError, match="from 8 to 24 channels: its shortcut averages"):
        WanVae(make_config(8, 4, 1, is_residual=True, dim_mult=(1, 3, 3, 3)))
    with pytest.raises(ValueError, match="from 24 to 8 channels: its shortcut repeats"):
        ResidualUpBlock(24, 8, 1, time=True)
