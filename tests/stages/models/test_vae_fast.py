"""The decoder on frame pools, in plain torch, against `WanVae`; and how it uses its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ipc.architecture import VaeConfig
from stages.models.vae import WanVae
from stages.models.vae_conv import (
    Target,
    causal_conv,
    conv,
    pad_vector,
    padded_width,
    split_width,
    upsampling_conv,
)
from stages.models.vae_decode import FastDecoder
from stages.models.vae_encode import FastEncoder
from stages.models.vae_frames import FramePool, pack
from stages.models.vae_walk import TorchOperations
from tests.stages.models.test_vae import (
    SMALL,
    SMALL_22,
    Compare,
    Harden,
    make_config,
    make_model,
    make_reference,
    random_frames,
)

FLOAT, CPU = torch.float32, torch.device("cpu")


@pytest.fixture(
    params=[SMALL, make_config(16, 16, 2, dim_mult=(1, 2, 2, 3)), SMALL_22], ids=["small", "demo widths", "2.2"]
)
def vae(request: pytest.FixtureRequest, harden: Harden) -> WanVae:
    return make_model(request.param, harden(make_reference(request.param)).state_dict())


def random_latents(config: VaeConfig, frames: int) -> Tensor:
    return torch.randn(1, config.z_dim, frames, 3, 5, generator=torch.Generator().manual_seed(2))


def decode(decoder: FastDecoder, latents: Tensor, chunk: int) -> Tensor:
    clip = decoder.clip(*latents.shape[3:])
    return torch.cat([decoder.decode_chunk(part, clip) for part in latents.split(chunk, dim=2)], dim=2)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_decodes_as_the_vae(chunk: int, vae: WanVae, relative_error: Compare) -> None:
    """5 latent frames, 1, 2 or 5 at a time, are the 17 frames that `WanVae` decodes, to within 1e-5."""
    latents = random_latents(vae.config, 5)
    got = decode(FastDecoder(vae, TorchOperations(), FLOAT), latents, chunk)
    assert relative_error(got, vae.decode(latents)) <= 1e-5


@pytest.mark.parametrize("sizes", [(17,), (1, 4, 12), (5, 8, 4)])
def test_encodes_as_the_vae(sizes: tuple[int, ...], vae: WanVae, relative_error: Compare) -> None:
    """17 frames, whole or in chunks, are the 5 latent frames of `WanVae`, to within 1e-5, however they are cut."""
    frames = random_frames(17, 3 * vae.config.spatial_stride, 5 * vae.config.spatial_stride)
    encoder = FastEncoder(vae, TorchOperations(), FLOAT)
    clip = encoder.clip(3, 5)
    got = torch.cat([encoder.encode_chunk(part, clip) for part in frames.split(list(sizes), dim=2)], dim=2)
    assert relative_error(got, vae.encode(frames)) <= 1e-5
    assert torch.equal(got, encoder.encode_chunk(frames, encoder.clip(3, 5)))
    assert all(pool.capacity == pool.peak for pool in clip.pools.values())


@pytest.mark.parametrize("groups", [(4, 4, 4, 4), (1, 2, 4, 1), (3, 1, 3, 2)])
def test_grouping_changes_no_bit(groups: tuple[int, ...], vae: WanVae) -> None:
    """However the frames are grouped into launches and chunks, the result is the same bit for bit."""
    latents = random_latents(vae.config, 6)
    whole = decode(FastDecoder(vae, TorchOperations(), FLOAT), latents, 6)
    for chunk in (1, 2, 4):
        assert torch.equal(decode(FastDecoder(vae, TorchOperations(), FLOAT, groups), latents, chunk), whole)


def test_memory_does_not_grow(vae: WanVae) -> None:
    """After the second chunk of a clip no pool is made, and none takes a slot that was not taken before; borders and
    the zero slot of every pool are zeros after all."""
    decoder = FastDecoder(vae, TorchOperations(), FLOAT)
    latents = random_latents(vae.config, 24)
    clip = decoder.clip(3, 5)
    used = []
    for part in latents.split([1, 5, 9, 9], dim=2):
        decoder.decode_chunk(part, clip)
        used.append((clip.nbytes, [pool.peak for pool in clip.pools.values()]))
    assert used[-1] == used[-2]
    for pool in clip.pools.values():
        assert pool.capacity == pool.peak
        assert not pool.frames[0].any()
        for edge in (0, -1):
            assert not pool.frames[:, edge].any() and not pool.frames[:, :, edge].any()


def test_bfloat16(vae: WanVae, relative_error: Compare) -> None:
    """In bf16 the fast decoder is at most as far from float32 as the plain one."""
    latents = random_latents(vae.config, 3)
    expected = vae.decode(latents)
    got = decode(FastDecoder(vae, TorchOperations(), torch.bfloat16), latents, 1)
    plain = vae.bfloat16().decode(latents).float()
    assert relative_error(got, expected) <= relative_error(plain, expected)


def test_two_clips_at_once(vae: WanVae) -> None:
    """Two clips whose chunks alternate are decoded as each alone."""
    decoder = FastDecoder(vae, TorchOperations(), FLOAT)
    latents = random_latents(vae.config, 8)
    parts = latents.split(4, dim=2)
    clips = [decoder.clip(3, 5) for _ in parts]
    chunks: list[list[Tensor]] = [[], []]
    for i in range(4):
        for part, clip, out in zip(parts, clips, chunks, strict=True):
            out.append(decoder.decode_chunk(part[:, :, i : i + 1], clip))
    for part, out in zip(parts, chunks, strict=True):
        assert torch.equal(torch.cat(out, dim=2), decode(decoder, part, 4))


def test_wrong_inputs(vae: WanVae) -> None:
    decoder = FastDecoder(vae, TorchOperations(), FLOAT)
    with pytest.raises(ValueError, match=r"must be \[1, \d+, T, 3, 5\], got"):
        decoder.decode_chunk(random_latents(vae.config, 1)[..., 1:], decoder.clip(3, 5))
    with pytest.raises(ValueError, match="4 numbers from 1 to 4"):
        FastDecoder(vae, TorchOperations(), FLOAT, (8, 4, 4, 4))
    encoder = FastEncoder(vae, TorchOperations(), FLOAT)
    clip, side = encoder.clip(2, 2), 2 * vae.config.spatial_stride
    with pytest.raises(ValueError, match=rf"must be \[1, 3, T, {side}, {side}\], got"):
        encoder.encode_chunk(random_frames(1, side, side + 8), clip)
    with pytest.raises(ValueError, match=r"must be 4n\+1 in the first chunk, got 4"):
        encoder.encode_chunk(random_frames(4, side, side), clip)
    encoder.encode_chunk(random_frames(1, side, side), clip)
    with pytest.raises(ValueError, match="must be 4n after the first chunk, got 5"):
        encoder.encode_chunk(random_frames(5, side, side), clip)


def test_the_folded_upsampling(relative_error: Compare) -> None:
    """Four kernels of 2x2 on a frame are its 3x3 convolution after nearest upsampling, edges included."""
    weight, bias = torch.randn(6, 5, 3, 3), torch.randn(6)
    layer = upsampling_conv("up", weight, bias, FLOAT)
    source, pool = FramePool(5, 4, 7, 2, FLOAT, CPU), FramePool(6, 8, 14, 2, FLOAT, CPU)
    source.pixels(1).copy_(torch.randn(4, 7, 5))
    conv(layer, source, [1], Target(pool, [], [1], []))
    x = F.interpolate(source.pixels(1).permute(2, 0, 1)[None], scale_factor=2, mode="nearest-exact")
    expected = F.conv2d(x, weight, bias, padding=1)[0].permute(1, 2, 0)
    assert relative_error(pool.pixels(1), expected) <= 1e-6


def test_a_causal_convolution(relative_error: Compare) -> None:
    """Frames, history in front, are convolved as conv3d does it; residual, and norm with SiLU, are added to that."""
    weight, bias, gamma = torch.randn(6, 5, 3, 3, 3) / 12, torch.randn(6), torch.randn(6)
    layer = causal_conv("conv", weight, bias, FLOAT)
    source, pool = FramePool(5, 4, 7, 6, FLOAT, CPU), FramePool(6, 4, 7, 8, FLOAT, CPU)
    for slot in range(1, 6):
        source.pixels(slot).copy_(torch.randn(4, 7, 5))
        pool.pixels(slot).copy_(torch.randn(4, 7, 6))
    slots, residual = [0, 4, 2, 1], [3, 5]
    x = torch.stack([source.pixels(slot) for slot in slots]).permute(3, 0, 1, 2)
    expected = F.conv3d(x[None], weight, bias, padding=(0, 1, 1))[0].permute(1, 2, 3, 0)
    expected = expected + torch.stack([pool.pixels(slot) for slot in residual])
    conv(layer, source, slots, Target(pool, residual, residual, [6, 7], pad_vector(gamma)))
    assert relative_error(torch.stack([pool.pixels(slot) for slot in residual]), expected) <= 1e-6
    normed = F.silu(F.normalize(expected, dim=-1) * 6**0.5 * gamma)
    assert relative_error(torch.stack([pool.pixels(slot) for slot in (6, 7)]), normed) <= 1e-5


@pytest.mark.parametrize(
    ("width", "split", "padded"),
    [(3, (16, 0), 16), (16, (16, 0), 16), (24, (32, 0), 32), (48, (32, 16), 48), (96, (64, 32), 96),
     (100, (64, 64), 128), (160, (128, 32), 160), (192, (128, 64), 192), (256, (256, 0), 256), (384, (128, 0), 384),
     (1000, (128, 0), 1024)],
)  # fmt: skip
def test_widths(width: int, split: tuple[int, int], padded: int) -> None:
    """A width as one or two powers of two, and the width with the padding that it takes."""
    assert sum(split_width(width)) == sum(split) and padded_width(width) == padded


def test_slots() -> None:
    """Slots are numbered from 1, given back ones come again, the zero slot stays; too many are an error."""
    pool = FramePool(4, 2, 2, 4, FLOAT, CPU)
    assert pool.take(2) == [1, 2]
    pool.give([1, 0])
    assert pool.take(2) == [1, 3]
    with pytest.raises(AssertionError, match="all of 4 slots are in use"):
        pool.take(1)
    with pytest.raises(ValueError, match="2 to 128 slots, got 200; decode fewer frames at once"):
        FramePool(4, 2, 2, 200, FLOAT, CPU)


def test_packed_slots() -> None:
    """Each slot is 7 bits of an integer that is 64 bits wide whatever the slots are."""
    for slots in ([], [0], [5, 0, 127], [127] * 8):
        packed = pack(slots)
        assert [packed >> 7 * i & 127 for i in range(len(slots))] == slots
        assert 1 << 62 <= packed < 1 << 63
