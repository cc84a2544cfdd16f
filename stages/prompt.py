"""A prompt as the text encoder reads it: cleaned, then token ids. No torch here.

`python -m stages.prompt TOKENIZER_JSON` prints the number of tokens of the text on standard input, its end token
included; the supervisor counts the tokens of long prompts with it.
"""

from __future__ import annotations

import contextlib
import html
import re
import sys
from collections.abc import Iterator

import ftfy
from tokenizers import Tokenizer

from hotreload.checkpoint import TOKENIZER_SOURCE
from ipc.errors import BadCheckpoint, BadRequest, EngineError

END_ID = 1
"""`</s>`, which ends every prompt and counts in its length."""


def load_tokenizer(path: str) -> Tokenizer:
    """Read a `tokenizer.json`; whatever it says of padding and truncation is switched off. Raises `BadCheckpoint`."""
    try:
        with without_panic():
            tokenizer = Tokenizer.from_file(path)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            ids = tokenizer.encode("").ids
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot open or read
        raise BadCheckpoint(f"tokenizer.json cannot be read: {brief(error)}; download {TOKENIZER_SOURCE}") from error
    if ids[-1:] != [END_ID]:
        raise BadCheckpoint(f"tokenizer.json must end every prompt with id {END_ID} (</s>); an empty one gives {ids}")
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """`BadCheckpoint` if a text could have an id for which the text encoder, of a vocabulary of `size`, has no row."""
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= size:
        raise BadCheckpoint(
            f"tokenizer.json has ids up to {highest}, expected at most {size - 1}, the text encoder's last: it is the "
            f"tokenizer of another model; download {TOKENIZER_SOURCE}"
        )


@contextlib.contextmanager
def without_panic() -> Iterator[None]:
    """A panic in the Rust of tokenizers, which no `except Exception` would catch, becomes a RuntimeError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(str(error)) from None


def brief(error: Exception) -> str:
    """Its first line, at most 300 characters of it."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def clean(text: str) -> str:
    """Repair mojibake, unescape HTML twice, collapse white space: Wan's "whitespace" cleaning."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text as the user wrote it, end token included, neither padded nor truncated.

    `EngineError` if the tokenizer fails: some faults of a `tokenizer.json` only show with a text.
    """
    try:
        with without_panic():
            return list(tokenizer.encode(clean(text)).ids)
    except Exception as error:
        raise EngineError(
            f"the tokenizer failed at this prompt: {brief(error)}; use other words, or have the operator replace "
            "tokenizer.json"
        ) from error


def prompt_ids(tokenizer: Tokenizer, text: str, most: int) -> list[int]:
    """`token_ids` of a prompt that the model can read whole; `BadRequest` if it has more than `most`."""
    ids = token_ids(tokenizer, text)
    if len(ids) > most:
        raise BadRequest(f"the prompt has {len(ids)} tokens; the model reads at most {most}: shorten it")
    return ids


def main() -> None:
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    print(len(token_ids(load_tokenizer(sys.argv[1]), text)))


if __name__ == "__main__":
    main()
