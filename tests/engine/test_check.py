"""`engine check`, and what is said of a checkpoint before any process is started.

Full-size models have real headers and no data.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine import Supervisor, SystemParams
from engine.check import check_checkpoint
from engine.checkpoint import identify
from engine.models import CONFIGS, list_models, load_model
from hotreload.checkpoint import Layout, find_component
from ipc.errors import BadCheckpoint, BadConfig
from stages.check import check
from tests.engine.sparse import networks, write_checkpoint, write_hole
from tests.engine.wire import run_engine
from tools.make_checkpoint import directory_source, make_checkpoint

DIFFUSERS_DIT = Path("transformer") / "diffusion_pytorch_model.safetensors"
DEMO = load_model("wan-demo")
DEMO_PARAMETERS = {"text_encoder": 394_112, "transformer": 3_076_480, "vae": 1_346_579}
OFFICIAL = [name for name in list_models() if name != "wan-demo"]


def write_demo(directory: Path, layout: Layout) -> Path:
    """The demo model in another layout."""
    source = directory_source(CONFIGS / "demo", DEMO.components)
    make_checkpoint(DEMO, directory, layout, source=source)
    return directory


@pytest.mark.parametrize("name", OFFICIAL)
def test_headers_of_every_model_are_complete_and_identified(name: str, tmp_path: Path) -> None:
    """A directory with exactly a model's tensors: every component is complete, the model is among those it is taken
    for, and loaded in bfloat16 it takes what the facts say of the DiT, and less than in float32."""
    model = load_model(name)
    directory = write_checkpoint(tmp_path / name, model)
    fits = identify(directory)
    assert name in fits
    assert {(load_model(fit).transformer, load_model(fit).boundary) for fit in fits} == {
        (model.transformer, model.boundary)
    }
    for component, network in networks(model).items():
        checked = check(component, find_component(directory, "diffusers", component, model.components), network)
        assert (checked.wrong, checked.unreadable, list(checked.dtypes)) == ({}, "", ["BF16"])
        assert 2 * checked.parameters <= checked.bytes_bfloat16 <= checked.bytes_float32 == 4 * checked.parameters
        if component == "transformer":
            assert checked.bytes_bfloat16 < 2.1 * checked.parameters


def test_check_of_what_ships() -> None:
    """The demo model's directory is complete; its model is found by looking; nothing is in the wrong unit."""
    ran = run_engine("check", CONFIGS / "demo")
    assert ran.returncode == 0, ran.stderr
    assert "diffusers layout, wan-demo" in ran.stdout
    assert ran.stdout.count("complete") == 3
    for says in ("everything resident", "GPU, bfloat16", "CPU, float32", "shared host memory of the queues: 14 MB"):
        assert says in ran.stdout


def test_check_names_all_that_is_missing_or_wrong(tmp_path: Path) -> None:
    """An A14B directory without the low-noise expert, with a VAE of which two tensors are gone, one is misshaped and
    one is new, and a text encoder that is cut short: exit code 2, and JSON says all of it."""
    model = load_model("wan2.2-i2v-a14b")
    directory = write_checkpoint(tmp_path / "d", model, only=("text_encoder", "transformer"))
    shapes = {key: tuple(tensor.shape) for key, tensor in networks(model)["vae"].tensors().items()}
    first, second, third, *_ = sorted(shapes)
    del shapes[first], shapes[second]
    shapes[third] = (1, *shapes[third])
    write_hole(directory / "vae" / "diffusion_pytorch_model.safetensors", {**shapes, "new": (1,)})
    text = directory / "text_encoder" / "model.safetensors"
    with text.open("r+b") as file:
        file.truncate(text.stat().st_size - 1)
    ran = run_engine("check", directory, "--json")
    assert ran.returncode == 2, ran.stderr
    report = json.loads(ran.stdout)
    assert report["model"] == "wan2.2-i2v-a14b"
    found = {component["name"]: component for component in report["components"]}
    assert found["transformer"]["problem"] == "" and found["transformer"]["wrong"] == {}
    assert "transformer_2" in found["transformer_2"]["problem"] and "lacks" in found["transformer_2"]["problem"]
    assert "cut short" in found["text_encoder"]["problem"]
    assert found["vae"]["wrong"]["missing"] == [first, second]
    assert found["vae"]["wrong"]["not of this model"] == ["new"]
    [misshaped] = found["vae"]["wrong"]["of another shape"]
    assert misshaped.startswith(third)
    gpu = report["gpu"]
    assert gpu["resident"] == sum(gpu["components"].values()) == gpu["expert"] + gpu["host"]
    assert gpu["largest"] == gpu["components"]["transformer"] == gpu["components"]["transformer_2"]
    assert 2 * 28.5e9 < gpu["resident"] < 72e9
    ran = run_engine("check", directory)
    assert ran.returncode == 2
    assert f"vae: 2 missing: {first}, {second}" in ran.stdout


@pytest.mark.parametrize("layout", ["diffusers", "original", "comfyui"])
def test_check_of_every_layout(layout: Layout, tmp_path: Path) -> None:
    """The demo model in each layout: found, named, complete, with the same number of parameters."""
    report = check_checkpoint(write_demo(tmp_path / "d", layout), None)
    assert (report.layout, report.model, report.fits) == (layout, "wan-demo", ["wan-demo"])
    assert report.complete, report
    assert {c.name: c.parameters for c in report.components} == DEMO_PARAMETERS


def test_check_without_anything_to_go_by(tmp_path: Path) -> None:
    """No directory, a directory without weights, one without a DiT that is known: each its own error; with a model
    named, what is there is examined."""
    with pytest.raises(BadConfig, match="not a directory"):
        check_checkpoint(tmp_path / "nowhere", None)
    with pytest.raises(BadCheckpoint, match="without weights"):
        check_checkpoint(tmp_path, None)
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    (tmp_path / "demo" / DIFFUSERS_DIT).unlink()
    (tmp_path / "demo" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(BadCheckpoint, match="--model"):
        check_checkpoint(tmp_path / "demo", None)
    report = check_checkpoint(tmp_path / "demo", "wan-demo")
    assert not report.complete
    assert {c.name: c.complete for c in report.components} == {"text_encoder": True, "transformer": False, "vae": True}
    assert "tokenizer" in report.problems[0]


def test_a_hostile_file_ends_only_the_process_that_looks(tmp_path: Path) -> None:
    """A `.pth` whose pickle calls a function is refused, and the function is not called."""
    write_demo(tmp_path / "d", "original")

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (open, (str(tmp_path / "pwned"), "w"))

    [vae] = (tmp_path / "d").glob("*VAE.pth")
    torch.save({"decoder.conv1.weight": Evil()}, vae)
    report = check_checkpoint(tmp_path / "d", None)
    [found] = [c for c in report.components if c.name == "vae"]
    assert vae.name in found.problem
    assert not (tmp_path / "pwned").exists()


def refusal(model: str, directory: Path, **fields: object) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        Supervisor(SystemParams(model=model, checkpoint=str(directory), **fields))  # type: ignore[arg-type]
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    """14B weights for the 1.3B model, an image-to-video model for a text-to-video one, a pair of experts for a single
    model: before anything starts, the error says which model it is and what to type."""
    t2v = write_checkpoint(tmp_path / "t2v", load_model("wan2.1-t2v-14b"))
    text = refusal("wan2.1-t2v-1.3b", t2v)
    assert "dim is 5120, expected 1536" in text
    assert text.endswith("this is wan2.1-t2v-14b: serve it with --model wan2.1-t2v-14b")
    i2v = write_checkpoint(tmp_path / "i2v", load_model("wan2.1-i2v-14b-480p"))
    text = refusal("wan2.1-t2v-14b", i2v)
    assert "in_channels is 36, expected 16" in text
    assert "--model wan2.1-i2v-14b-480p or --model wan2.1-i2v-14b-720p" in text
    pair = write_checkpoint(tmp_path / "pair", load_model("wan2.2-t2v-a14b"))
    assert refusal("wan2.1-t2v-14b", pair).endswith("serve it with --model wan2.2-t2v-a14b")
    assert refusal("wan2.2-i2v-a14b", pair).endswith("serve it with --model wan2.2-t2v-a14b")
    shutil.rmtree(pair / "transformer_2")
    text = refusal("wan2.2-t2v-a14b", pair)
    assert "lacks transformer_2" in text
    assert "this is wan2.1-t2v-14b" in text
    assert "of none of the known models" not in text


def test_a_checkpoint_of_an_unknown_model(tmp_path: Path) -> None:
    """A DiT of other sizes than any known model's: the error says so."""
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    shapes = {
        "patch_embedding.weight": (64, 16, 1, 2, 2),
        "proj_out.weight": (64, 64),
        "blocks.0.ffn.net.0.proj.weight": (9, 9),
    }
    write_hole(tmp_path / "demo" / DIFFUSERS_DIT, shapes)
    text = refusal("wan-demo", tmp_path / "demo")
    assert "dim is 64, expected 192" in text
    assert "of none of the known models" in text
