"""`config.json` of a transformer, as tools/make_checkpoint.py writes it, against the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from engine.check import check_checkpoint
from engine.models import CONFIGS, list_models, load_model
from hotreload.checkpoint import Layout
from hotreload.described import check_config
from ipc.errors import BadCheckpoint
from tests.hotreload.tiny import a_component
from tools import checkpoint_documents as documents
from tools.make_checkpoint import directory_source, make_checkpoint


@pytest.mark.parametrize("name", list_models())
def test_each_models_own_config_agrees(tmp_path: Path, name: str) -> None:
    """Diffusers' and the Wan repositories' for every model; none at all; one of a class that is not Wan's."""
    model = load_model(name)
    component = a_component("transformer", tmp_path / "x.safetensors")
    check_config(component, model.transformer)
    for said in (documents.transformer(model.transformer), documents.original_config(model), {"num_heads": 1}):
        (tmp_path / "config.json").write_text(json.dumps(said))
        check_config(component, model.transformer)


@pytest.mark.parametrize(
    ("write", "key", "value"),
    [
        ("diffusers", "num_attention_heads", 6), ("diffusers", "eps", 1e-5), ("original", "num_heads", 6),
        ("original", "dim", "\x1b" * 1000), ("original", "eps", None), ("original", "dim", [[1]]),
    ],
)  # fmt: skip
def test_a_number_of_another_model_is_named(tmp_path: Path, write: str, key: str, value: object) -> None:
    """Heads and eps, which no shape tells; no number at all: the key, what it is and what was expected."""
    model = load_model("wan-demo")
    right = documents.transformer(model.transformer) if write == "diffusers" else documents.original_config(model)
    (tmp_path / "config.json").write_text(json.dumps({**right, key: value}))
    with pytest.raises(BadCheckpoint) as refused:
        check_config(a_component("transformer", tmp_path / "x.safetensors"), model.transformer)
    assert str(refused.value).startswith(f"transformer: config.json: {key} is ")
    assert f", expected {right[key]}: it is another model's" in str(refused.value)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    """No JSON, a list, endless nesting, a hole of 3 GB, a FIFO."""
    component, config = a_component("transformer", tmp_path / "x.safetensors"), tmp_path / "config.json"
    transformer = load_model("wan-demo").transformer
    for content in (b"", b"[]", b'{"a":' + b"[" * 100_000, b"\xff"):
        config.write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"^transformer: config\.json is not a JSON object"):
            check_config(component, transformer)
    os.truncate(config, 3 << 30)
    too_long = r"^transformer: config\.json is not a JSON object: it has more than 1048576 bytes"
    with pytest.raises(BadCheckpoint, match=too_long):
        check_config(component, transformer)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(BadCheckpoint, match=r"^transformer: config\.json cannot be read: it is a FIFO"):
        check_config(component, transformer)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_engine_check_says_so(tmp_path: Path, layout: Layout) -> None:
    """The shapes are the model's, the number of heads is not: the transformer is not complete, and why."""
    model = load_model("wan-demo")
    make_checkpoint(model, tmp_path / "d", layout, source=directory_source(CONFIGS / "demo", model.components))
    wrong = msgspec.structs.replace(model.transformer, num_attention_heads=6, attention_head_dim=32)
    other = msgspec.structs.replace(model, transformer=wrong)
    said = documents.transformer(wrong) if layout == "diffusers" else documents.original_config(other)
    folder = tmp_path / "d" / ("transformer" if layout == "diffusers" else "")
    (folder / "config.json").write_text(json.dumps(said))
    report = check_checkpoint(tmp_path / "d", None)
    assert [c.name for c in report.components if not c.complete] == ["transformer"]
    [transformer] = [c for c in report.components if c.name == "transformer"]
    assert "config.json: num_" in transformer.problem and "is 6, expected 3" in transformer.problem
