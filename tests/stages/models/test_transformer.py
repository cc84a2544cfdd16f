"""The DiT against Diffusers' WanTransformer3DModel, and what its split forward promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ipc.architecture import TransformerConfig
from stages.models.transformer import WanTransformer, keeps_float32

Harden = Callable[[nn.Module], nn.Module]
Compare = Callable[[Tensor, Tensor], float]

TEXT_LEN = 9
CONFIGS = [
    TransformerConfig(
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=2,
        ffn_dim=96,
        text_dim=40,
        freq_dim=32,
        text_len=TEXT_LEN,
    ),
    TransformerConfig(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=3,
        ffn_dim=60,
        text_dim=32,
        in_channels=6,
        out_channels=4,
        text_len=TEXT_LEN,
    ),
    TransformerConfig(
        num_attention_heads=1,
        attention_head_dim=128,
        num_layers=2,
        ffn_dim=64,
        text_dim=24,
        text_len=TEXT_LEN,
        cross_attn_norm=False,
    ),
]
SIZES = [(3, 6, 10), (1, 2, 14), (5, 10, 4)]


def make_reference(config: TransformerConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=config.cross_attn_norm,
        eps=config.eps,
        rope_max_seq_len=config.rope_max_seq_len,
    )


def make_model(config: TransformerConfig, weights: dict[str, Tensor]) -> WanTransformer:
    with torch.device("meta"):
        model = WanTransformer(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False)


def make_inputs(config: TransformerConfig, size: tuple[int, int, int], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config.in_channels, *size, generator=generator)
    prompt = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    prompt[0, 5:] = 0
    return latents, torch.tensor([987, 13][:batch]), prompt


def run(model: WanTransformer, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
    return model(latents, timestep, model.encode_prompt(prompt), model.rope(*latents.shape[2:]))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_velocity_equals_diffusers(
    config: TransformerConfig, size: tuple[int, int, int], harden: Harden, relative_error: Compare
) -> None:
    """A Diffusers state dict, loaded with strict keys into a module built on meta, gives the same velocity to 1e-5."""
    reference = harden(make_reference(config))
    model = make_model(config, reference.state_dict())
    latents, timestep, prompt = make_inputs(config, size, batch=2)
    expected = reference(latents, timestep, prompt, return_dict=False)[0]
    assert relative_error(run(model, latents, timestep, prompt), expected) <= 1e-5


def test_batch_is_independent(harden: Harden, relative_error: Compare) -> None:
    """Conditional and unconditional branch in one batch of 2, contexts joined along dim 2: as one after the other."""
    config = CONFIGS[0]
    model = make_model(config, harden(make_reference(config)).state_dict())
    latents, timestep, prompt = make_inputs(config, SIZES[0], batch=2)
    contexts = [model.encode_prompt(row.unsqueeze(0)) for row in prompt]
    rope = model.rope(*SIZES[0])
    together = model(latents, timestep, torch.cat(contexts, dim=2), rope)
    for i, context in enumerate(contexts):
        alone = model(latents[i : i + 1], timestep[i : i + 1], context, rope)
        assert relative_error(together[i : i + 1], alone) <= 1e-5


@pytest.mark.parametrize("keep", [True, False])
def test_bfloat16_weights_give_float32_velocity(keep: bool, harden: Harden, relative_error: Compare) -> None:
    """bf16 weights, with or without the float32 ones kept: a float32 velocity within bf16's noise of float32's."""
    config = CONFIGS[0]
    weights = harden(make_reference(config)).state_dict()
    inputs = make_inputs(config, SIZES[0], batch=2)
    expected = run(make_model(config, weights), *inputs)
    rounded = {name: w if keep and keeps_float32(name) else w.bfloat16() for name, w in weights.items()}
    actual = run(make_model(config, rounded), *inputs)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) <= 3e-2


def test_float_timesteps(harden: Harden) -> None:
    """Timestep 500 as int64 and as float32 is the same timestep."""
    config = CONFIGS[1]
    model = make_model(config, harden(make_reference(config)).state_dict())
    latents, _, prompt = make_inputs(config, SIZES[1], batch=1)
    integer = run(model, latents, torch.tensor([500]), prompt)
    assert torch.equal(run(model, latents, torch.tensor([500.0]), prompt), integer)


def test_every_parameter_is_trained(harden: Harden) -> None:
    """Backward through encode_prompt and forward leaves a finite, non-zero gradient on every parameter."""
    config = CONFIGS[0]
    model = make_model(config, harden(make_reference(config)).state_dict()).requires_grad_(True)
    run(model, *make_inputs(config, SIZES[0], batch=2)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias that all keys share moves no softmax, but the norm before it makes even that one count.
        assert parameter.grad.any(), name


def test_forward_reads_no_data_on_the_host() -> None:
    """The whole forward runs on tensors without data: nothing in it asks for a value, so CUDA graphs can capture it."""
    config = CONFIGS[0]
    with FakeTensorMode():
        model = WanTransformer(config)
        velocity = run(model, *make_inputs(config, SIZES[0], batch=2))
    assert velocity.shape == (2, 16, *SIZES[0])


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"])
def test_published_models(name: str, facts: dict[str, Any]) -> None:
    """On meta, the published configs have the published tensors: names, shapes, count; and no buffers."""
    fact = facts["transformer"][name]
    numbers = fact["config"]
    config = TransformerConfig(
        num_attention_heads=numbers["num_heads"],
        attention_head_dim=numbers["dim"] // numbers["num_heads"],
        num_layers=numbers["num_layers"],
        ffn_dim=numbers["ffn_dim"],
        text_dim=numbers["text_dim"],
    )
    with torch.device("meta"):
        model = WanTransformer(config)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == fact["tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == fact["parameters"]
    assert {key: shape for key, shape in shapes.items() if not key.startswith("blocks.") or ".0." in key[:9]} == (
        fact["shapes"]
    )
    assert not list(model.buffers())


@pytest.mark.parametrize("shape", [(1, TEXT_LEN - 1, 40), (1, TEXT_LEN, 41), (TEXT_LEN, 40)])
def test_wrong_prompt_embeddings(shape: tuple[int, ...]) -> None:
    """Prompt embeddings of another length or width: ValueError with what was expected and what came."""
    with torch.device("meta"):
        model = WanTransformer(CONFIGS[0])
    with pytest.raises(ValueError, match=rf"\[B, {TEXT_LEN}, 40\], got"):
        model.encode_prompt(torch.empty(shape))


def test_wrong_size() -> None:
    """Latents that do not divide into patches, or span more of them than RoPE knows: ValueError."""
    with torch.device("meta"):
        model = WanTransformer(CONFIGS[0])
    with pytest.raises(ValueError, match=r"\(1, 2, 2\), got \(3, 5, 6\)"):
        model.rope(3, 5, 6)
    with pytest.raises(ValueError, match="at most 1024 patches"):
        model.rope(1025, 2, 2)
