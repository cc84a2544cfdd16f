"""The text encoder against transformers' UMT5: without padding, on weights bound from outside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from ipc.architecture import TextEncoderConfig
from stages.models.text_encoder import ALIASES, build, encode
from tests.stages.reference import make_text_encoder

Harden = Callable[[nn.Module], nn.Module]
Compare = Callable[[Tensor, Tensor], float]

CONFIG = TextEncoderConfig(vocab_size=100, d_model=48, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
TEXT_LEN = 512


def reference(encoder: nn.Module, dtype: torch.dtype = torch.float32) -> UMT5EncoderModel:
    """transformers' encoder on the weights of ours."""
    model = make_text_encoder(CONFIG)
    model.load_state_dict(encoder.state_dict(), strict=True)
    return model.to(dtype)


def some_ids(length: int) -> Tensor:
    return torch.randint(2, 100, (length,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [1, 2, 150, 512])
def test_equals_transformers(
    length: int, dtype: torch.dtype, most: float, harden: Harden, relative_error: Compare
) -> None:
    """Within the rounding of the dtype, for distances that have a bucket of their own and beyond the last one. (With
    transformers 5.24 every bit is the same; which kernel it attends with depends on its version.)"""
    encoder = harden(build(CONFIG))
    with torch.inference_mode():
        expected = reference(encoder, dtype)(some_ids(length)[None]).last_hidden_state[0]
    (actual,) = encode(encoder.to(dtype), some_ids(length).tolist())
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= most


@pytest.mark.parametrize("length", [1, 5, 150, 512])
def test_rows_do_not_depend_on_padding(length: int, harden: Harden, relative_error: Compare) -> None:
    """The rows of a prompt run alone equal those of the same prompt padded to 512 rows with a mask, as the original and
    Diffusers run it, to 1e-5."""
    encoder = harden(build(CONFIG))
    padded = torch.zeros(1, TEXT_LEN, dtype=torch.long)
    padded[0, :length] = some_ids(length)
    mask = (torch.arange(TEXT_LEN) < length).long().unsqueeze(0)
    with torch.inference_mode():
        expected = reference(encoder)(padded, attention_mask=mask).last_hidden_state[0, :length]
    (actual,) = encode(encoder, some_ids(length).tolist())
    assert actual.shape == (length, CONFIG.d_model)
    assert relative_error(actual, expected) <= 1e-5


def test_bound_weights_give_the_same_rows(harden: Harden) -> None:
    """Built on meta and bound to the tensors of another encoder, alias included: identical rows, nothing on meta."""
    given = harden(build(CONFIG))
    with torch.device("meta"):
        encoder = build(CONFIG)
    state = {name: tensor for name, tensor in given.state_dict().items() if name not in ALIASES}
    encoder.load_state_dict(state | {alias: state[name] for alias, name in ALIASES.items()}, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))
    (one,), (other,) = encode(encoder, [5, 7, 1]), encode(given, [5, 7, 1])
    assert torch.equal(one, other)


def test_published_model() -> None:
    """On meta, UMT5-XXL has 242 tensors and 5,680,910,336 numbers, and every layer its own relative bias."""
    with torch.device("meta"):
        model = build(
            TextEncoderConfig(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    names = [name for name in model.state_dict() if name not in ALIASES]
    assert len(names) == 242
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336
    assert sum("relative_attention_bias" in name for name in names) == 24
    assert not list(model.buffers())
