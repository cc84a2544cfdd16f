"""Whether the VAE's kernels are right on a device: what they decode and encode, against `WanVae` in float32.

The weights are random, so that the verdict is about the device and not about a checkpoint. The clips are small, but no
kernel is specialised on a size: what the test has compiled is what requests will launch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from ipc.architecture import VaeConfig
from ipc.messages.names import KernelKind
from stages.models.blank import blank
from stages.models.vae import WanVae
from stages.models.vae_codec import Codec, FastCodec, PlainCodec, has_tma
from stages.models.vae_walk import Operations

TOLERANCE = 3e-2
"""Relative L2 distance from float32 that counts as right. The rounding of bfloat16 gives 7e-3 in the full network on an
H100; a tap, a channel or a pixel of a tile that is wrong gives more than 1e-1."""
LATENTS = (6, 10)
"""Height and width of the test: the last tile of every level is ragged."""


def choose(
    wanted: str, config: VaeConfig, device: torch.device, beat: Callable[[], None] = lambda: None
) -> tuple[KernelKind, str]:
    """What a vae computes with, and why not with the kernels; `wanted`: auto or a kind, which is then taken without a
    test. `beat`: as in `Links`."""
    if wanted == "torch":
        return "torch", ""
    if wanted == "triton":
        return "triton", ""
    problem = missing(config, device) or check(config, device, beat)
    return ("torch" if problem else "triton"), problem


def missing(config: VaeConfig, device: torch.device) -> str:
    """Why there are no kernels for this VAE on this device; empty if there are."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}"
    return "needs triton, which is not installed" if importlib.util.find_spec("triton") is None else ""


def check(config: VaeConfig, device: torch.device, beat: Callable[[], None] = lambda: None) -> str:
    """What is wrong with the kernels at this VAE's widths; empty if nothing is."""
    try:
        from stages.kernels.vae_launch import Kernels

        tma = has_tma(device)
        # The second takes the tiles of large frames, too.
        return compare(config, device, [Kernels(tma), Kernels(tma, wide_from=0)], torch.bfloat16, beat)
    except Exception as error:  # no compiler for Triton, no support of the device: they are not used then
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@torch.inference_mode()
def compare(
    config: VaeConfig, device: torch.device, kinds: Sequence[Operations], dtype: torch.dtype, beat: Callable[[], None]
) -> str:
    """What is wrong with what each of `kinds` decodes and encodes; empty if nothing is.

    The network has all kinds of block that `config` has, but fewer of each.
    """
    vae = random_vae(msgspec.structs.replace(config, num_res_blocks=1), device)
    exact = clips(PlainCodec(vae), device, beat)
    for operations in kinds:
        found = clips(FastCodec(vae, operations, dtype), device, beat)
        for what, got, expected in zip(("decoded", "encoded"), found, exact, strict=True):
            distance = float((got - expected).norm() / expected.norm())
            if not distance <= TOLERANCE:
                return f"a {what} clip is {distance:.1e} from float32, expected at most {TOLERANCE:.0e}"
    return ""


def clips(codec: Codec, device: torch.device, beat: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Three latent frames, decoded in two chunks, and nine frames, encoded in two."""
    config, generator = codec.config, torch.Generator(device).manual_seed(1)
    latents = torch.randn(1, config.z_dim, 3, *LATENTS, generator=generator, device=device)
    size = [side * config.spatial_stride for side in LATENTS]
    frames = torch.rand(1, 3, 9, *size, generator=generator, device=device) * 2 - 1
    clip, chunks = codec.clip(*LATENTS), []
    for part in latents.split([1, 2], dim=2):
        chunks.append(clip.decode(part))
        beat()
    decoded = torch.cat(chunks, dim=2)
    clip, chunks = codec.clip(*LATENTS), []
    for part in frames.split([1, 8], dim=2):
        chunks.append(clip.encode(part))
        beat()
    return decoded, torch.cat(chunks, dim=2)


def random_vae(config: VaeConfig, device: torch.device, seed: int = 0) -> WanVae:
    """A VAE in float32 with random weights that keep activations near 1 and most pixels within [-1, 1], where the clamp
    does not hide errors."""
    with blank():
        vae = WanVae(config)
    vae = vae.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        if "norm" in name:
            parameter.copy_(1.0 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    vae.decoder.conv_out.weight.mul_(0.35)
    return vae
