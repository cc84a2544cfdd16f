"""The DiT against Diffusers' WanTransformer3DModel, and what its split forward promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.models import list_models, load_model
from engine.params import ModelParams
from ipc.architecture import TransformerConfig
from stages.models.conditioning import Time
from stages.models.transformer import WanTransformer, distinct_rows, keeps_float32

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
PUBLISHED = [name for name in list_models() if name.startswith("wan2")]
IMAGE = msgspec.structs.replace(CONFIGS[0], in_channels=36, image_dim=20)
IMAGE_TOKENS = 11


def shrunk(model: ModelParams) -> TransformerConfig:
    """The model's transformer, small: its channels, patches, norms and image tokens kept. text_len stays, because that
    is where Diffusers divides image from text."""
    width = 20 if model.transformer.image_dim is not None else None
    return msgspec.structs.replace(
        model.transformer, num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=60, text_dim=28,
        freq_dim=32, image_dim=width,
    )  # fmt: skip


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
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.image_dim is not None else None,
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


def make_image_tokens(config: TransformerConfig, batch: int) -> Tensor | None:
    if config.image_dim is None:
        return None
    # So small that the norms' epsilon counts.
    return 0.05 * torch.randn(batch, IMAGE_TOKENS, config.image_dim, generator=torch.Generator().manual_seed(2))


def run(
    model: WanTransformer, latents: Tensor, timestep: Tensor, prompt: Tensor, tokens: Tensor | None = None
) -> Tensor:
    image = model.encode_image(tokens) if tokens is not None else None
    return model(latents, timestep, model.encode_prompt(prompt), model.rope(*latents.shape[2:]), image)


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_velocity_of_every_published_model(name: str, harden: Harden, relative_error: Compare) -> None:
    """Each published model, shrunk, with two clips at two timesteps and image tokens if it sees them: the velocity of
    Diffusers to 1e-5, of the channels that go on, out of those that come in."""
    config = shrunk(load_model(name))
    reference = harden(make_reference(config))
    model = make_model(config, reference.state_dict())
    latents, timestep, prompt = make_inputs(config, SIZES[0], batch=2)
    tokens = make_image_tokens(config, batch=2)
    expected = reference(latents, timestep, prompt, tokens, return_dict=False)[0]
    actual = run(model, latents, timestep, prompt, tokens)
    assert actual.shape == (2, config.out_channels, *SIZES[0])
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_a_given_first_frame_has_timestep_0(
    size: tuple[int, int, int], harden: Harden, relative_error: Compare
) -> None:
    """Wan2.2-TI2V-5B, shrunk, at timesteps (0, t): the velocity of Diffusers with a timestep per token, 0 for those of
    the first latent frame; not that of t for all."""
    model_params = load_model("wan2.2-ti2v-5b")
    assert model_params.conditioning == "first_frame"
    config = shrunk(model_params)
    reference = harden(make_reference(config))
    model = make_model(config, reference.state_dict())
    latents, timestep, prompt = make_inputs(config, size, batch=2)
    mask = torch.ones(size)
    mask[0] = 0
    per_token = (mask[:, ::2, ::2].flatten() * timestep.unsqueeze(1)).long()
    assert per_token.shape == (2, model.rope(*size).shape[0])
    expected = reference(latents, per_token, prompt, return_dict=False)[0]
    pair = torch.stack((torch.zeros_like(timestep), timestep), dim=1)
    assert relative_error(run(model, latents, pair, prompt), expected) <= 1e-5
    assert relative_error(run(model, latents, timestep, prompt), expected) > 1e-3


def test_two_equal_timesteps_are_one(harden: Harden, relative_error: Compare) -> None:
    """(t, t) for the first frame and the others is t for all, also for a clip of one frame."""
    config = CONFIGS[0]
    model = make_model(config, harden(make_reference(config)).state_dict())
    for size in SIZES[:2]:
        latents, timestep, prompt = make_inputs(config, size, batch=2)
        pair = timestep.unsqueeze(1).expand(-1, 2)
        assert relative_error(run(model, latents, pair, prompt), run(model, latents, timestep, prompt)) <= 1e-6


def test_image_tokens_serve_every_prompt(harden: Harden, relative_error: Compare) -> None:
    """The image's keys and values, made once for a batch of one, go with either prompt: as when made with that prompt;
    and other tokens give another velocity."""
    model = make_model(IMAGE, harden(make_reference(IMAGE)).state_dict())
    latents, timestep, prompt = make_inputs(IMAGE, SIZES[0], batch=2)
    tokens = make_image_tokens(IMAGE, batch=1)
    assert tokens is not None
    image, rope = model.encode_image(tokens), model.rope(*SIZES[0])
    assert image.shape == (IMAGE.num_layers, 2, 1, IMAGE_TOKENS, 3, 64)
    together = run(model, latents, timestep, prompt, tokens.expand(2, -1, -1))
    for i in range(2):
        alone = model(latents[i : i + 1], timestep[i : i + 1], model.encode_prompt(prompt[i : i + 1]), rope, image)
        assert relative_error(together[i : i + 1], alone) <= 1e-5
    assert relative_error(run(model, latents, timestep, prompt, tokens.flip(2).expand(2, -1, -1)), together) > 1e-3


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


def test_padding_is_encoded_once(harden: Harden, relative_error: Compare) -> None:
    """Prompts of 3 and 5 rows, the first with a row of zeros inside: keys and values of 6 rows, the last of them for
    all after it, are those of every row. A prompt as long as can be has no padding, an empty one nothing else, and a
    NaN is no zero."""
    config = CONFIGS[0]
    model = make_model(config, harden(make_reference(config)).state_dict())
    prompt = torch.randn(2, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(4))
    assert distinct_rows(prompt) == config.text_len
    prompt[0, 3:], prompt[1, 5:], prompt[0, 1] = 0, 0, 0
    assert distinct_rows(prompt) == 6
    encoded, expected = model.encode_prompt(prompt, 6), model.encode_prompt(prompt)
    assert encoded.shape == expected.shape
    assert relative_error(encoded, expected) <= 1e-6
    assert relative_error(model.encode_prompt(prompt, 5), expected) > 1e-3
    assert distinct_rows(torch.zeros_like(prompt)) == 1
    prompt[1, 7, 0] = torch.nan
    assert distinct_rows(prompt) == 9


def test_one_product_of_q_k_and_v(harden: Harden, relative_error: Compare) -> None:
    """Weights that lie one right behind the other are used as one, without a copy: the same velocity to 1e-6; what is
    written to one of them afterwards counts. Weights that lie apart are used one by one."""
    config = CONFIGS[0]
    weights = harden(make_reference(config)).state_dict()
    apart, together = make_model(config, weights), make_model(config, weights)
    state = dict(weights)
    for names in together.runs():
        state.update(zip(names, torch.cat([weights[name] for name in names]).chunk(3), strict=True))
    together.load_state_dict(state, assign=True)
    assert (apart.fuse(), together.fuse()) == (0, config.num_layers)
    inputs = make_inputs(config, SIZES[0], batch=2)
    assert relative_error(run(together, *inputs), run(apart, *inputs)) <= 1e-6
    for model in (apart, together):
        model.blocks[1].attn1.to_k.weight.mul_(0.5)
    assert relative_error(run(together, *inputs), run(apart, *inputs)) <= 1e-6


def test_other_weights_without_fuse(harden: Harden) -> None:
    """Weights that are bound after `fuse` are never left out in silence: an AssertionError says to call it again."""
    config = CONFIGS[0]
    weights = harden(make_reference(config)).state_dict()
    model = make_model(config, weights)
    for names in model.runs():
        weights.update(zip(names, torch.cat([weights[name] for name in names]).chunk(3), strict=True))
    model.load_state_dict(weights, assign=True)
    assert model.fuse()
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    inputs = make_inputs(config, SIZES[0], batch=2)
    with pytest.raises(AssertionError, match="without fuse"):
        run(model, *inputs)
    assert model.fuse() == 0
    run(model, *inputs)


def test_all_steps_of_a_request_at_once(harden: Harden, relative_error: Compare) -> None:
    """Timesteps embedded together, then taken row by row: as embedded one by one."""
    config = CONFIGS[0]
    model = make_model(config, harden(make_reference(config)).state_dict())
    latents, _, prompt = make_inputs(config, SIZES[0], batch=2)
    context, rope = model.encode_prompt(prompt), model.rope(*SIZES[0])
    for timesteps in (torch.tensor([999, 800, 0]), torch.tensor([[0, 999], [0, 800], [0, 0]])):
        times = model.encode_time(timesteps)
        for index, timestep in enumerate(timesteps):
            one = model(latents, timestep.expand(2, *timestep.shape), context, rope)
            assert relative_error(model.velocity(latents, times.row(index), context, rope), one) <= 1e-6


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


def bfloat16_of_diffusers(reference: WanTransformer3DModel) -> WanTransformer3DModel:
    """In place what `from_pretrained(torch_dtype=torch.bfloat16)` gives: bfloat16 but for the modules it names."""
    for name, parameter in reference.named_parameters():
        if not set(name.split(".")) & set(reference._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    return reference


@pytest.mark.parametrize("kind", ["text", "image tokens", "first frame"])
def test_the_float32_residual_stream_keeps_bfloat16_exact(kind: str, harden: Harden, relative_error: Compare) -> None:
    """30 layers in bfloat16, of weights that bfloat16 holds exactly: within 6e-3 of float32, and at most half as far
    from it as Diffusers, which rounds the residual stream to bfloat16 after each of its parts."""
    config = TransformerConfig(
        num_attention_heads=2, attention_head_dim=64, num_layers=30, ffn_dim=512, text_dim=64,
        in_channels=36 if kind == "image tokens" else 16, image_dim=20 if kind == "image tokens" else None,
    )  # fmt: skip
    reference = harden(make_reference(config))
    weights = {name: w.bfloat16().float() for name, w in reference.state_dict().items()}
    reference.load_state_dict(weights)
    latents, timestep, prompt = make_inputs(config, (3, 16, 16), batch=1)
    tokens, theirs = make_image_tokens(config, batch=1), timestep
    if kind == "first frame":
        timestep, theirs = torch.tensor([[0, 987]]), torch.tensor([[0] * 64 + [987] * 128])
    exact = run(make_model(config, weights), latents, timestep, prompt, tokens)
    assert relative_error(reference(latents, theirs, prompt, tokens, return_dict=False)[0], exact) <= 1e-5
    rounded = {name: w if keeps_float32(name) else w.bfloat16() for name, w in weights.items()}
    ours = relative_error(run(make_model(config, rounded), latents, timestep, prompt, tokens), exact)
    inputs = (latents.bfloat16(), theirs, prompt.bfloat16(), None if tokens is None else tokens.bfloat16())
    diffusers = relative_error(bfloat16_of_diffusers(reference)(*inputs, return_dict=False)[0], exact)
    assert ours <= 6e-3
    assert 2 * ours <= diffusers


def test_what_stays_float32() -> None:
    """Of an image-to-video model these tensors are used in float32, and no others."""
    with torch.device("meta"):
        names = WanTransformer(IMAGE).state_dict()
    time = ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"]
    modules = [f"condition_embedder.{name}" for name in (*time, "image_embedder.norm1", "image_embedder.norm2")]
    modules += ["proj_out", *(f"blocks.{i}.norm2" for i in range(2))]
    expected = {f"{module}.{tensor}" for module in modules for tensor in ("weight", "bias")}
    expected |= {"scale_shift_table", *(f"blocks.{i}.scale_shift_table" for i in range(2))}
    assert {name for name in names if keeps_float32(name)} == expected


def test_float_timesteps(harden: Harden) -> None:
    """Timestep 500 as int64 and as float32 is the same timestep."""
    config = CONFIGS[1]
    model = make_model(config, harden(make_reference(config)).state_dict())
    latents, _, prompt = make_inputs(config, SIZES[1], batch=1)
    integer = run(model, latents, torch.tensor([500]), prompt)
    assert torch.equal(run(model, latents, torch.tensor([500.0]), prompt), integer)


@pytest.mark.parametrize("config", [CONFIGS[0], IMAGE], ids=["text", "image"])
def test_every_parameter_is_trained(config: TransformerConfig, harden: Harden) -> None:
    """Backward through both encoders and forward leaves a finite, non-zero gradient on every parameter."""
    model = make_model(config, harden(make_reference(config)).state_dict()).requires_grad_(True)
    inputs = make_inputs(config, SIZES[0], batch=2)
    run(model, *inputs, make_image_tokens(config, batch=2)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias that all keys share moves no softmax, but the norm before it makes even that one count.
        assert parameter.grad.any(), name


def test_forward_reads_no_data_on_the_host() -> None:
    """The whole forward runs on tensors without data: nothing in it asks for a value, so CUDA graphs can capture it."""
    with FakeTensorMode():
        model = WanTransformer(IMAGE)
        latents, timestep, prompt = make_inputs(IMAGE, SIZES[0], batch=2)
        tokens = make_image_tokens(IMAGE, batch=2)
        for time in (timestep, timestep.unsqueeze(1).expand(-1, 2)):
            assert run(model, latents, time, prompt, tokens).shape == (2, 16, *SIZES[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str, facts: dict[str, Any]) -> None:
    """On meta, the configs of `configs/models` have the published tensors: names, shapes, count; and no buffers."""
    model_params = load_model(name)
    fact = facts["transformer"][name.removesuffix("-480p").removesuffix("-720p")]
    with torch.device("meta"):
        model = WanTransformer(model_params.transformer)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == fact["tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == fact["parameters"]
    assert {key: shape for key, shape in shapes.items() if not key.startswith("blocks.") or ".0." in key[:9]} == (
        fact["shapes"]
    )
    assert not list(model.buffers())


def test_every_published_model_is_known(facts: dict[str, Any]) -> None:
    """No published model of the facts lacks its config, and none of the configs its facts."""
    assert {name.removesuffix("-480p").removesuffix("-720p") for name in PUBLISHED} == set(facts["transformer"])


@pytest.mark.parametrize("shape", [(1, IMAGE_TOKENS, 21), (IMAGE_TOKENS, 20)])
def test_wrong_image_tokens(shape: tuple[int, ...]) -> None:
    """Image tokens of another width or without a batch: ValueError with what was expected and what came."""
    with torch.device("meta"):
        model = WanTransformer(IMAGE)
        tokens = torch.empty(shape)
    with pytest.raises(ValueError, match=r"image_embeds must be \[B, N, 20\], got"):
        model.encode_image(tokens)


def test_an_image_for_the_wrong_model() -> None:
    """Image tokens for a model that sees none, or none for one that does: ValueError, never a forward without them."""
    for config, image in ((CONFIGS[0], torch.empty(1)), (IMAGE, None)):
        with torch.device("meta"):
            model, nothing = WanTransformer(config), torch.empty(1)
        with pytest.raises(ValueError, match=r"image is (missing|given), but image_dim is"):
            model.velocity(nothing, Time(nothing, nothing), nothing, nothing, image)
    with torch.device("meta"), pytest.raises(ValueError, match="image_dim is not set"):
        WanTransformer(CONFIGS[0]).encode_image(torch.empty(1, IMAGE_TOKENS, 20))


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
