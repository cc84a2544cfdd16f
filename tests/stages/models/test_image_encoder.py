"""The image encoder against transformers' CLIPVisionModel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from engine.models import load_model
from ipc.architecture import ImageEncoderConfig
from stages.models.image_encoder import MEAN, STD, ImageEncoder, image_tokens, preprocess

Harden = Callable[[nn.Module], nn.Module]
Compare = Callable[[Tensor, Tensor], float]

SMALL = ImageEncoderConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=56, patch_size=14
)


def make_reference(config: ImageEncoderConfig) -> CLIPVisionModel:
    numbers = {name: getattr(config, name) for name in config.__struct_fields__}
    return CLIPVisionModel(CLIPVisionConfig(**numbers, hidden_act="gelu"))


def published_names(reference: CLIPVisionModel) -> dict[str, Tensor]:
    """Its state dict under the names that are in files: some versions of the class drop the first part."""
    prefix = "vision_model."
    return {prefix + name.removeprefix(prefix): tensor for name, tensor in reference.state_dict().items()}


def is_used(name: str, config: ImageEncoderConfig) -> bool:
    return not name.startswith(
        (f"vision_model.encoder.layers.{config.num_hidden_layers - 1}.", "vision_model.post_layernorm.")
    )


@pytest.fixture
def reference(harden: Harden) -> CLIPVisionModel:
    model = harden(make_reference(SMALL))
    assert isinstance(model, CLIPVisionModel)
    return model


@pytest.fixture
def encoder(reference: CLIPVisionModel) -> ImageEncoder:
    """Built on meta, with the weights of the reference that it has a place for, by strict keys."""
    with torch.device("meta"):
        model = ImageEncoder(SMALL)
    weights = {name: tensor for name, tensor in published_names(reference).items() if is_used(name, SMALL)}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def test_equals_transformers(encoder: ImageEncoder, reference: CLIPVisionModel, relative_error: Compare) -> None:
    """Two pictures: 17 tokens each, within 1e-5 of the hidden state before the reference's last block."""
    pictures = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    expected = reference(pictures, output_hidden_states=True).hidden_states[-2]
    assert expected.shape == (2, 17, 32)
    assert relative_error(encoder(pictures), expected) <= 1e-5


@pytest.mark.parametrize("size", [(40, 90), (200, 56), (1, 3)])
def test_tokens_of_a_picture(
    size: tuple[int, int], encoder: ImageEncoder, reference: CLIPVisionModel, relative_error: Compare
) -> None:
    """A picture of any size, larger or smaller than the encoder's: the tokens are those of the original's steps, from
    [-1, 1] by bicubic interpolation and back to [0, 1], then CLIP's mean and deviation."""
    frame = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    picture = frame.permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
    picture = F.interpolate(picture, size=(56, 56), mode="bicubic", align_corners=False).mul(0.5).add(0.5)
    picture = torch.stack([(picture[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    assert relative_error(preprocess(frame, 56), picture) <= 1e-5
    expected = reference(picture, output_hidden_states=True).hidden_states[-2][0]
    tokens = image_tokens(encoder, frame)
    assert tokens.dtype == torch.float32
    assert relative_error(tokens, expected) <= 1e-5


def test_bfloat16(encoder: ImageEncoder, relative_error: Compare) -> None:
    """With bf16 weights the tokens come as float32, within bf16's noise."""
    frame = torch.randint(256, (60, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    expected = image_tokens(encoder, frame)
    actual = image_tokens(encoder.bfloat16(), frame)
    assert actual.dtype == torch.float32
    assert 0 < relative_error(actual, expected) <= 5e-2


def test_published_model() -> None:
    """On meta, the config that ships has 257 tokens and the tensors of transformers' ViT-H of 632 million numbers, but
    for the last block and the last norm; no buffers."""
    config = load_model("wan2.1-i2v-14b-480p").image_encoder
    assert config is not None and config.tokens == 257
    with torch.device("meta"):
        model, reference = ImageEncoder(config), make_reference(config)
    assert 630e6 < sum(tensor.numel() for tensor in reference.state_dict().values()) < 633e6
    shapes = {name: tensor.shape for name, tensor in published_names(reference).items() if is_used(name, config)}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert not list(model.buffers())
