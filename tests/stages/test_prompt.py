"""Prompts: cleaned, tokenised, counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipc.errors import BadCheckpoint, BadRequest
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
