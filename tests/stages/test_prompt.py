"""Prompts: cleaned, tokenised, counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, strategies as st

from ipc.errors import BadCheckpoint, BadRequest, EngineError
from stages.prompt import clean, load_tokenizer, prompt_ids, token_ids
from tests.stages.process import ROOT


@pytest.fixture
def tokenizer_json(checkpoint: Path) -> Path:
    return checkpoint / "tokenizer" / "tokenizer.json"


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a \n red\t circle ", "a red circle"),
        ("a &amp;lt;red&amp;gt; circle", "a <red> circle"),
        ("cafÃ©", "café"),
        ("\u3000红 色 圆", "红 色 圆"),
        ("", ""),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    """White space collapses, HTML that was escaped twice is unescaped, mojibake is repaired."""
    assert clean(raw) == cleaned


@pytest.mark.parametrize(
    "raw",
    [
        "&lt;b&gt; &amp; &quot;q&quot; &#128512; &#x1F600; &nbsp;&hellip;",
        "a &amp;lt;red&amp;gt; circle &amp;amp;amp; more",
        "<b>a &amp;lt;red&amp;gt; circle &amp;amp;amp; more</b>",  # a tag keeps ftfy from unescaping
        "👩‍👩‍👧 a family 🎬, ☺️ and 🇮🇹",
        "cafÃ© â€œquotedâ€\x9d ðŸ˜€ ä¸\xadæ–‡",
        "一只猫在草地上奔跑，画面清晰。",
        "ＦＵＬＬ　ｗｉｄｔｈ，１２３",
        "\u3000 a\u00a0\u2003b\u200bc \r\n\t d\u2028e \u3000",
        "“curly” ‘quotes’, ﬁne ligatures, e\u0301 combining",
        "\ufeffmark\x00\x07 and \x1b[31mcontrol\x1b[0m characters",
        "< not a tag > && &unknown; &",
    ],
)
def test_cleaning_equals_diffusers(raw: str) -> None:
    """HTML entities, once and more often escaped, emoji, mojibake, Chinese, full-width forms, every kind of white
    space, control characters: character for character what Diffusers' Wan pipelines make of them with ftfy, which is
    the original's cleaning."""
    assert clean(raw) == prompt_clean(raw)


@given(st.text(st.sampled_from("a &;#<>lgtmpquo128x\n\t\u3000Ã©â€œ😀猫Ａ\x1b"), max_size=40) | st.text(max_size=40))
def test_cleaning_of_any_text_equals_diffusers(raw: str) -> None:
    """The same for any text."""
    assert clean(raw) == prompt_clean(raw)


def test_a_prompt_becomes_ids_with_its_end_token(tokenizer_json: Path) -> None:
    """Known words, an unknown one and the end token; the empty prompt is the end token alone."""
    tokenizer = load_tokenizer(str(tokenizer_json))
    assert token_ids(tokenizer, " a  red whale ") == [3, 4, 2, 1]
    assert token_ids(tokenizer, "") == [1]


def test_a_long_prompt_is_refused_with_its_length(tokenizer_json: Path) -> None:
    """Twelve tokens fit in twelve; thirteen are refused, saying how many there are."""
    tokenizer = load_tokenizer(str(tokenizer_json))
    assert len(prompt_ids(tokenizer, "a " * 11, 12)) == 12
    with pytest.raises(BadRequest, match="13 tokens; the model reads at most 12"):
        prompt_ids(tokenizer, "a " * 12, 12)


def test_the_command_counts_without_torch(tokenizer_json: Path) -> None:
    """`python -m stages.prompt` prints the number of tokens of its input, broken UTF-8 included, and loads no torch."""
    command = [sys.executable, "-X", "importtime", "-m", "stages.prompt", str(tokenizer_json)]
    ran = subprocess.run(command, input=b"a red \xff circle", capture_output=True, timeout=60, check=True, cwd=ROOT)
    assert ran.stdout == b"5\n"
    assert b"torch" not in ran.stderr


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    """A missing and a broken tokenizer.json are a `BadCheckpoint`."""
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_that_makes_its_library_panic_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    """Its normalizer is cut short, at which tokenizers panics: a `BadCheckpoint` that says what to do."""
    described = json.loads(tokenizer_json.read_text())
    described["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(described))
    with pytest.raises(BadCheckpoint, match=r"cannot be read: Precompiled: .*; download https://"):
        load_tokenizer(str(file))


def test_a_tokenizer_that_fails_at_a_text(tokenizer_json: Path, tmp_path: Path) -> None:
    """It names no piece for unknown words, which shows with the first of them: an `EngineError`; known words pass."""
    described = json.loads(tokenizer_json.read_text())
    described["model"]["unk_token"] = "<nothing>"
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(described))
    tokenizer = load_tokenizer(str(file))
    assert token_ids(tokenizer, "a red") == [3, 4, 1]
    with pytest.raises(EngineError, match=r"the tokenizer failed at this prompt: .*; use other words"):
        token_ids(tokenizer, "a red whale")
