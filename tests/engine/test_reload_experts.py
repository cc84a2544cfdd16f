"""Reloads of a model with two experts, whose operator merges a LoRA for each: the model that ships as the high-noise
expert, its second revision as the low-noise one."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from safetensors.numpy import load_file

from engine import Supervisor, SystemParams
from engine.arrays import given_tensors
from engine.checkpoint import open_components, open_model
from engine.models import load_model
from engine.starting import Opened
from ipc.errors import BadConfig
from tests.engine.adapters import write_adapter
from tests.engine.reloading import FILES, FIRST, SECOND, order, vary, video

MODEL = msgspec.structs.replace(load_model("wan-demo"), boundary=0.875)
EXPERTS = ("transformer", "transformer_2")
FIELDS = {"steps": 4, "flow_shift": 5.0, "num_frames": 1}
"""Two steps with each expert."""


def make(directory: Path, high: Path, low: Path) -> Path:
    """A checkpoint with the transformers of these two."""
    shutil.copytree(FIRST, directory, ignore=shutil.ignore_patterns("revision-2", "transformer"))
    for name, source in zip(EXPERTS, (high, low), strict=True):
        shutil.copytree(source / "transformer", directory / name)
    return directory


@asynccontextmanager
async def engine(checkpoint: Path, *loras: str) -> AsyncIterator[Supervisor]:
    params = SystemParams(checkpoint=str(checkpoint), lora=loras, device="cpu", threads=1, placement="fused")
    opened = Opened(MODEL, "cpu", ("cpu",), open_model(MODEL, params))
    async with Supervisor(params, opened) as supervisor:
        await supervisor.ready()
        yield supervisor
        assert supervisor.check_integrity() == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("experts") / "first", FIRST, SECOND)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    """HIGH,LOW:STRENGTH."""
    directory = tmp_path_factory.mktemp("loras")
    files = [write_adapter(directory / f"{name}.safetensors", seed, 2) for seed, name in enumerate(("high", "low"))]
    return f"{files[0]},{files[1]}:0.5"


@pytest.mark.parametrize("name", EXPERTS)
async def test_one_expert_gets_other_weights(checkpoint: Path, pair: str, tmp_path: Path, name: str) -> None:
    """Its own LoRA is merged into the new weights, and the other expert stays what it was: the content and the frames
    of a start with such a checkpoint. A rollback is as before."""
    other = vary(tmp_path / "other", 1)
    sources = {"transformer": FIRST, "transformer_2": SECOND, name: other}
    mixed = make(tmp_path / "mixed", sources["transformer"], sources["transformer_2"])
    async with engine(mixed, pair) as supervisor:
        wanted = supervisor.status().weights, await video(supervisor, tmp_path / "v.mp4", **FIELDS)
    async with engine(checkpoint, pair) as supervisor:
        before = supervisor.status().weights, await video(supervisor, tmp_path / "v.mp4", **FIELDS)
        reloaded = await supervisor.reload(order(mixed, name))
        assert list(reloaded.weights) == [name]
        assert (supervisor.status().weights, await video(supervisor, tmp_path / "v.mp4", **FIELDS)) == wanted
        await supervisor.rollback()
        assert (supervisor.status().weights, await video(supervisor, tmp_path / "v.mp4", **FIELDS)) == before
    assert wanted[1] != before[1]


async def test_one_expert_is_given_in_memory(checkpoint: Path, pair: str, tmp_path: Path) -> None:
    """`update_weights` of the low-noise expert with what is served already: the same content, the LoRA in it."""
    async with engine(checkpoint, pair) as supervisor:
        before = supervisor.status().weights
        tensors = load_file(checkpoint / "transformer_2" / Path(FILES["transformer"]).name)
        given = await supervisor.update_weights("transformer_2", given_tensors(tensors))
        assert given.unchanged == {"transformer_2": before["transformer_2"]}
        assert supervisor.status().weights == before


async def test_adapters_in_pairs(checkpoint: Path, pair: str, tmp_path: Path) -> None:
    """The pair by its name, none, the pair again: each is what a fresh start with it, or without, makes. A file for one
    expert is refused when it is added."""
    high, low = pair.removesuffix(":0.5").split(",")
    async with engine(checkpoint, pair) as supervisor:
        wanted = await video(supervisor, tmp_path / "v.mp4", **FIELDS)
    async with engine(checkpoint) as supervisor:
        plain = await video(supervisor, tmp_path / "v.mp4", **FIELDS)
        assert plain != wanted
        with pytest.raises(BadConfig, match="is for one transformer, but the model has two experts"):
            await supervisor.add_lora("one", high)
        await supervisor.add_lora("pair", high, low)
        for loras, expected in ((("pair:0.5",), wanted), ((), plain), (("pair:0.5",), wanted)):
            assert await video(supervisor, tmp_path / "v.mp4", lora=loras, **FIELDS) == expected
        assert [info.name for info in supervisor.loras()] == ["pair"]


def test_which_files_go_where(checkpoint: Path, pair: str, tmp_path: Path) -> None:
    """Of a pair, each expert gets its own, alone or together; one file for one expert only is still refused, whatever
    is reloaded, and so is a pair for a model with one transformer."""
    high, low = pair.removesuffix(":0.5").split(",")
    params = SystemParams(lora=(pair,))
    expected = {"transformer": [high], "transformer_2": [low]}
    for names in (EXPERTS, EXPERTS[:1], EXPERTS[1:]):
        found = open_components(MODEL, params, checkpoint, names)
        assert {n: [lora.file for lora in c.loras] for n, c in found.items()} == {n: expected[n] for n in names}
    with pytest.raises(BadConfig, match="the model has two experts; give a file for each, HIGH,LOW"):
        open_components(MODEL, SystemParams(lora=(high,)), checkpoint, ["transformer"])
    with pytest.raises(BadConfig, match="this one has one transformer"):
        open_components(load_model("wan-demo"), params, FIRST, ["transformer"])
