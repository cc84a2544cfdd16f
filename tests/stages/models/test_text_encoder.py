"""The text encoder as the engine runs it: transformers' UMT5, without padding, on weights bound from outside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ipc.architecture import TextEncoderConfig
from stages.models.text_encoder import ALIASES, build, encode

Harden = Callable[[nn.Module], nn.Module]
Compare = Callable[[Tensor, Tensor], float]

CONFIG = TextEncoderConfig(vocab_size=100, d_model=48, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
TEXT_LEN = 512


@pytest.mark.parametrize("length", [1, 5, 150, 512])
def test_rows_do_not_depend_on_padding(length: int, harden: Harden, relative_error: Compare) -> None:
    """The rows of a prompt run alone equal those of the same prompt padded to 512 rows with a mask, as the original and
    Diffusers run it, to 1e-5."""
    encoder = harden(build(CONFIG))
    ids = torch.randint(2, 100, (length,), generator=torch.Generator().manual_seed(1))
    padded = torch.zeros(1, TEXT_LEN, dtype=torch.long)
    padded[0, :length] = ids
    mask = (torch.arange(TEXT_LEN) < length).long().unsqueeze(0)
    expected = encoder(padded, attention_mask=mask).last_hidden_state[0, :length]
    actual = encode(encoder, ids.tolist())
    assert actual.shape == (length, CONFIG.d_model)
    assert relative_error(actual, expected) <= 1e-5


def test_bound_weights_give_the_same_rows(harden: Harden) -> None:
    """Built on meta and bound to the tensors of another encoder, alias included: identical rows, nothing on meta."""
    reference = harden(build(CONFIG))
    with torch.device("meta"):
        encoder = build(CONFIG)
    state = {name: tensor for name, tensor in reference.state_dict().items() if name not in ALIASES}
    encoder.load_state_dict(state | {alias: state[name] for alias, name in ALIASES.items()}, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))
    assert torch.equal(encode(encoder, [5, 7, 1]), encode(reference, [5, 7, 1]))


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
