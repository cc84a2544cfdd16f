"""A prompt as the text encoder reads it: cleaned, then token ids. No torch here.

`python -m stages.prompt TOKENIZER_JSON` prints the number of tokens of the text on standard input, its end token
included; the supervisor counts the tokens of long prompts with it.
"""

from __future__ import annotations

import html
import re
import sys

import ftfy
from tokenizers import Tokenizer

from ipc.errors import BadCheckpoint, BadRequest

END_ID = 1
"""`</s>`, which ends every prompt and counts in its length."""


def load_tokenizer(path: str) -> Tokenizer:
    """Read a `tokenizer.json`; whatever it says of padding and truncation is switched off. Raises `BadCheckpoint`."""
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot open or read
        raise BadCheckpoint(f"tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if (ids := tokenizer.encode("").ids)[-1:] != [END_ID]:
        raise BadCheckpoint(f"tokenizer.json must end every prompt with id {END_ID} (</s>); an empty one gives {ids}")
    return tokenizer


def clean(text: str) -> str:
    """Repair mojibake, unescape HTML twice, collapse white space: Wan's "whitespace" cleaning."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text as the user wrote it, end token included, neither padded nor truncated."""
    return list(tokenizer.encode(clean(text)).ids)


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
