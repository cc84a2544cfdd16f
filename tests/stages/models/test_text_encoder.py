"""The text encoder against transformers' UMT5EncoderModel, and the way from a prompt to its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from ipc.architecture import TextEncoderConfig
from stages.models.text_encoder import (
    PromptTooLongError,
    Umt5Encoder,
    clean,
    encode,
    load_tokenizer,
    prompt_ids,
    relative_buckets,
)

Harden = Callable[[nn.Module], nn.Module]
Compare = Callable[[Tensor, Tensor], float]

CONFIG = TextEncoderConfig(vocab_size=100, d_model=48, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
TEXT_LEN = 160


def make_reference(config: TextEncoderConfig) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
        )
    )


def make_model(reference: nn.Module) -> Umt5Encoder:
    weights = reference.state_dict()
    del weights["encoder.embed_tokens.weight"]  # The alias of shared.weight, not saved in checkpoints.
    with torch.device("meta"):
        model = Umt5Encoder(CONFIG)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False)


def save_tokenizer(path: Path, end: bool = True) -> Path:
    """A tokenizer of three words that, like UMT5's, asks for padding and truncation and ends prompts with </s>."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5}, "<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if end:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """The three-word tokenizer, loaded."""
    return load_tokenizer(save_tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("length", [1, 5, 150])
def test_rows_equal_transformers(length: int, harden: Harden, relative_error: Compare) -> None:
    """Our rows, computed without padding, equal theirs with padding and mask to 1e-5; the rows after them are zero."""
    reference = harden(make_reference(CONFIG))
    ids = torch.randint(2, 100, (length,), generator=torch.Generator().manual_seed(1))
    padded = torch.zeros(1, TEXT_LEN, dtype=torch.long)
    padded[0, :length] = ids
    mask = (torch.arange(TEXT_LEN) < length).long().unsqueeze(0)
    expected = reference(padded, attention_mask=mask).last_hidden_state[0, :length]
    actual = encode(make_model(reference), ids.tolist(), TEXT_LEN)
    assert actual.shape == (TEXT_LEN, CONFIG.d_model)
    assert relative_error(actual[:length], expected) <= 1e-5
    assert not actual[length:].any()


def test_batches_equal_transformers(harden: Harden, relative_error: Compare) -> None:
    """The module takes batches of equal length too."""
    reference = harden(make_reference(CONFIG))
    ids = torch.randint(2, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    assert relative_error(make_model(reference)(ids), reference(ids).last_hidden_state) <= 1e-5


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64)])
def test_relative_buckets(buckets: int, max_distance: int) -> None:
    """Every distance up to 599 falls into the bucket that exact integer arithmetic gives: float32 logarithms do not
    miss a border."""
    half, exact = buckets // 2, buckets // 4
    steps = half - exact

    def expected(distance: int) -> int:
        if distance < exact:
            return distance
        # distance >= exact * (max_distance / exact) ** (k / steps), raised to the power of `steps`.
        passed = [k for k in range(steps) if distance**steps >= exact ** (steps - k) * max_distance**k]
        return exact + max(passed)

    table = relative_buckets(600, buckets, max_distance)
    assert table[:, 0].tolist() == [expected(i) for i in range(600)]
    assert table[0, 1:].tolist() == [half + expected(i) for i in range(1, 600)]


def test_published_model() -> None:
    """On meta, UMT5-XXL has 242 tensors, 5,680,910,336 numbers, and no buffers."""
    with torch.device("meta"):
        model = Umt5Encoder(
            TextEncoderConfig(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    assert len(model.state_dict()) == 242
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\t red \n\n circle  ", "a red circle"),
        ("a &amp;lt;red&amp;gt; circle", "a <red> circle"),
        ("schÃ¶n", "schön"),
        ("&nbsp;a&nbsp;&nbsp;red ", "a red"),
        ("红色的圆，移动", "红色的圆,移动"),
        ("", ""),
    ],
)
def test_clean(text: str, expected: str) -> None:
    """Whitespace collapsed, entities decoded twice, mojibake and full-width forms repaired by ftfy."""
    assert clean(text) == expected


def test_prompt_ids(tokenizer: Tokenizer) -> None:
    """Cleaned, tokenised, ended with </s>, neither padded nor cut; an empty prompt is </s> alone."""
    assert prompt_ids(tokenizer, " a  red&nbsp;circle ", TEXT_LEN) == [3, 4, 5, 1]
    assert prompt_ids(tokenizer, "a " * 20, TEXT_LEN) == [3] * 20 + [1]
    assert prompt_ids(tokenizer, "", TEXT_LEN) == [1]


def test_prompt_too_long(tokenizer: Tokenizer) -> None:
    """A prompt of exactly text_len tokens is taken; one word more is refused, with its number of tokens."""
    assert len(prompt_ids(tokenizer, "a " * 7, 8)) == 8
    with pytest.raises(PromptTooLongError, match=r"prompt has 9 tokens .*, expected at most 8"):
        prompt_ids(tokenizer, "a " * 8, 8)


def test_encode_checks_the_length(harden: Harden) -> None:
    """encode itself refuses ids that do not fit."""
    with pytest.raises(PromptTooLongError, match="has 5 tokens"):
        encode(make_model(harden(make_reference(CONFIG))), [3, 3, 3, 3, 1], 4)


def test_tokenizer_without_end(tmp_path: Path) -> None:
    """A tokenizer.json that does not add </s> is refused at load: its prompts would lack their last row."""
    with pytest.raises(ValueError, match=r"as \[1\] \(</s>\), got \[\]"):
        load_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", end=False))
