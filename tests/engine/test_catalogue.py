"""`engine models`: the numbers of models whose weights are not here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine import cli, models
from engine.amounts import count
from engine.catalogue import describe_models, transformer_parameters
from engine.checkpoint import identify
from engine.display.models import print_models
from engine.footprint import RequestSize, needs
from engine.models import list_models, load_model
from ipc.errors import BadConfig
from tests.engine.wire import run_engine

PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b-480p": 16_394_878_784,
    "wan2.1-i2v-14b-720p": 16_394_878_784,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
}
"""Of one expert, counted in the official checkpoints."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_official_models(name: str) -> None:
    """The formula gives what their checkpoints have, image attention included."""
    assert transformer_parameters(load_model(name).transformer) == PARAMETERS[name]


def test_one_bad_file_hides_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A YAML that is no model among those that are: these are listed, a checkpoint of theirs is known, and the bad one
    is named with what is wrong in it."""
    shutil.copytree(models.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(models, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs" / "models" / "mine.yaml").write_text("name: mine\nfamly: wan2.1\n")
    cards, problems = describe_models()
    assert sorted(set(PARAMETERS) | {"wan-demo"}) == [card.name for card in cards]
    assert problems == ["mine.yaml has an unknown field 'famly'; did you mean 'family'?"]
    assert identify(tmp_path / "configs" / "demo") == ["wan-demo"]
    with pytest.raises(BadConfig, match=r"mine\.yaml has an unknown field"):
        cli.models()
    assert "wan2.1-t2v-1.3b" in capsys.readouterr().out


def test_every_model_has_a_row_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, kind, parameters, usual video: at most 100 columns; experts are counted, weights that do not ship are asked
    for."""
    cards = {card.name: card for card in describe_models()[0]}
    assert sorted(cards) == list_models()
    assert sorted(set(PARAMETERS) | {"wan-demo"}) == list_models()
    print_models(list(cards.values()))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    rows = {line.split()[0]: line for line in shown.partition("\n\n")[0].splitlines()}
    assert "text to video" in rows["wan2.1-t2v-1.3b"] and "1.4 B" in rows["wan2.1-t2v-1.3b"]
    assert "image to video" in rows["wan2.2-i2v-a14b"] and "2 x 14.3 B" in rows["wan2.2-i2v-a14b"]
    assert "text/image to video" in rows["wan2.2-ti2v-5b"]
    assert "--checkpoint DIR" in rows["wan2.1-i2v-14b-480p"]
    assert "here, " in rows["wan-demo"]
    assert count(cards["wan-demo"].transformer_parameters) == "3.1 M"


def test_what_the_models_take_at_each_memory_level(capsys: pytest.CaptureFixture[str]) -> None:
    """Both experts of an A14B do not fit into 80 GB beside the text encoder; at level 3 they do into 24 GB."""
    cards = {card.name: card for card in describe_models()[0]}
    for card in cards.values():
        assert [need.level for need in card.levels] == [0, 1, 2, 3]
    large = cards["wan2.2-t2v-a14b"].levels
    assert large[0].gpu > 80e9 > 48e9 > large[2].gpu > 24e9 > large[3].gpu
    print_models(list(cards.values()))
    memory = capsys.readouterr().out.partition("at each memory level:")[2]
    row = next(line for line in memory.splitlines() if line.startswith("wan2.2-t2v-a14b"))
    assert row.count(" GB") == 5 and row.rstrip().endswith("as fast")
    assert "NVIDIA H100" in memory and "configs/measured/memory.yaml" in memory


def test_what_the_models_take_for_a_video_of_any_size(capsys: pytest.CaptureFixture[str]) -> None:
    """As `engine models --size` tells it: what `engine check --size` does, of each model that makes such a video; the
    others say why not."""
    cards = {card.name: card for card in describe_models("832x480x17")[0]}
    large, demo = cards["wan2.1-t2v-14b"], cards["wan-demo"]
    assert large.size == RequestSize(832, 480, 17)
    assert large.levels == needs(load_model("wan2.1-t2v-14b"), RequestSize(832, 480, 17))
    assert demo.size is None and demo.levels == [] and "takes up to 36,864" in demo.size_refused
    print_models(list(cards.values()), "832x480x17")
    memory = capsys.readouterr().out.partition("for a video of 832x480x17, at each memory level:")[2]
    row = next(line for line in memory.splitlines() if line.startswith("wan2.1-t2v-14b"))
    assert row.rstrip().endswith(f"{large.levels[3].slowdown:.2f} x as long")
    assert "not by wan-demo: 832x480 is 399,360 pixels" in memory


@pytest.mark.parametrize(
    ("size", "says"), [("large", "expected WIDTHxHEIGHT"), ("8192x8192", "no known model makes a video of 8192x8192")]
)
def test_a_size_that_no_model_makes(size: str, says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        describe_models(size)
    ran = run_engine("models", "--size", size)
    assert ran.returncode == 2 and says in ran.stderr and not ran.stdout
