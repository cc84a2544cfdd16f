"""Makes the tokenizer of `wan-demo`: a unigram model of its captions' words with byte fallback, in UMT5's conventions.

Pad is id 0, `</s>` is id 1 and is appended to every prompt, unknown is id 2. Text is lower-cased and NFKC-normalised.
Characters that captions never use become their UTF-8 bytes, so that no text fails.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tools.demo_captions import Wording, captions
from tools.demo_scenes import sample_scenes

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2
SPACE = "\u2581"
"""Stands before every word, as in sentencepiece."""
CHARACTER_SCORE, BYTE_SCORE = -16.0, -30.0
"""Log-probabilities below that of any word, so that a known word is never spelt out."""


def make_tokenizer(captions_seen: int = 20_000, seed: int = 0) -> Tokenizer:
    """Every word of the captions is a piece scored by its frequency; below them ASCII characters, then 256 bytes."""
    scenes = sample_scenes(captions_seen, torch.Generator().manual_seed(seed))
    rules = _with_rules(Tokenizer(models.Unigram()))
    words: Counter[str] = Counter()
    for line in captions(scenes, Random(seed), Wording(noise=0.0)):
        normal = rules.normalizer.normalize_str(line)
        words.update(word for word, _ in rules.pre_tokenizer.pre_tokenize_str(normal))
    total = words.total()
    pieces = [(PAD, 0.0), (END, 0.0), (UNKNOWN, 0.0)]
    pieces += [(word, math.log(count / total)) for word, count in words.most_common()]
    characters = [SPACE, *(chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper())]
    pieces += [(character, CHARACTER_SCORE) for character in characters if character not in words]
    pieces += [(f"<0x{byte:02X}>", BYTE_SCORE) for byte in range(256)]
    tokenizer = _with_rules(Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN_ID, byte_fallback=True)))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, END_ID)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and the settings that transformers' AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "padding_side": "right",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def token_rows(tokenizer: Tokenizer, lines: list[str], length: int) -> torch.Tensor:
    """Token ids [N, length] int16, padded with 0; a caption that is too long keeps its end token."""
    rows = torch.zeros(len(lines), length, dtype=torch.int16)
    for row, encoding in zip(rows, tokenizer.encode_batch_fast(lines), strict=True):
        ids = encoding.ids if len(encoding.ids) <= length else [*encoding.ids[: length - 1], END_ID]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int16)
    return rows


def _with_rules(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(behavior="isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer
