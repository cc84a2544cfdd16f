"""Names from files in messages: one line, printable, short, few."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hotreload.checkpoint import open_checkpoint
from hotreload.lora import read_lora
from hotreload.shown import listed, shown
from ipc.errors import BadCheckpoint
from tests.engine.sparse import write_hole


def test_a_name_is_shown_on_one_short_line() -> None:
    """Line ends, escape sequences, directions of writing and halves of characters are escaped; what is long is cut."""
    assert shown("blocks.0.attn1.to_q.weight") == "blocks.0.attn1.to_q.weight"
    assert shown("é 日本 '") == "é 日本 '"
    assert shown("a\nb\x1b[2J\u202e\udcff") == r"a\nb\x1b[2J\u202e\udcff"
    for long in ("a" * 101, "\n" * 60, "\U0010ffff" * 10**6):
        assert len(shown(long)) <= 100 and shown(long).endswith("...")
    assert shown("a" * 100) == "a" * 100


def test_a_list_is_cut() -> None:
    assert listed("abc") == "a, b, c"
    assert listed(map(str, range(12)), "; ") == "0; 1; 2; 3; 4; 5; 6; 7; 8; 9 and 2 more"


def test_messages_about_hostile_names_are_short_and_printable(tmp_path: Path) -> None:
    """Tensors, shards and files with terminal sequences in their names, and thousands of them."""
    evil = "\x1b[31m\n" + "x" * 200
    write_hole(tmp_path / f"{evil[:100]}.safetensors", {f"{evil}{i}": (1,) for i in range(1000)})
    index = {"weight_map": {f"{i}": f"{evil * 1000}.safetensors" for i in range(3)}}
    (tmp_path / "d" / "vae").mkdir(parents=True)
    (tmp_path / "d" / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    many = tmp_path / "many"
    for i in range(50):
        write_hole(many / f"{evil[:100]}{i}.safetensors", {"x": (1,)})
    with pytest.raises(BadCheckpoint) as lora:
        read_lora(tmp_path / f"{evil[:100]}.safetensors", "transformer", {})
    with pytest.raises(BadCheckpoint) as shard:
        open_checkpoint(tmp_path / "d", ("vae",))
    with pytest.raises(BadCheckpoint) as several:
        open_checkpoint(many, ("vae",))
    for refused in (lora, shard, several):
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 2000
