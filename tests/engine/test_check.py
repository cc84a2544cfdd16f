"""`engine check`, and what is said of a checkpoint before any process is started.

Full-size models have real headers and no data.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import Supervisor, SystemParams
from engine.check import check_checkpoint
from engine.checkpoint import identify, open_model
from engine.models import CONFIGS, checkpoint_directory, list_models, load_model
from hotreload.checkpoint import Layout, find_component
from hotreload.safetensors_file import read_header
from ipc.errors import BadCheckpoint, BadConfig
from stages.check import check
from tests.engine.sparse import networks, unused_block, write_checkpoint, write_hole
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
    for says in ("all of them", "one GPU, bfloat16", "CPU, float32", "shared host memory of the queues: 12 MB"):
        assert says in ran.stdout
    assert "at a time" not in ran.stdout


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
    assert gpu["resident"] == sum(gpu["components"].values())
    assert gpu["components"]["transformer"] == gpu["components"]["transformer_2"]
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
    """No directory, a directory without weights: each its own error. One without a DiT: what is there is told, and
    compared with a model when that is named."""
    with pytest.raises(BadConfig, match="not a directory"):
        check_checkpoint(tmp_path / "nowhere", None)
    with pytest.raises(BadCheckpoint, match="without weights"):
        check_checkpoint(tmp_path, None)
    shutil.copytree(CONFIGS / "demo", tmp_path / "demo")
    (tmp_path / "demo" / DIFFUSERS_DIT).unlink()
    (tmp_path / "demo" / "tokenizer" / "tokenizer.json").unlink()
    report = check_checkpoint(tmp_path / "demo", None)
    assert (report.model, report.fits, report.gpu) == ("", [], None)
    assert "name one with --model" in report.problems[0] and "tokenizer" in report.problems[1]
    assert {c.name: c.complete for c in report.components} == {"text_encoder": True, "transformer": False, "vae": True}
    report = check_checkpoint(tmp_path / "demo", "wan-demo")
    assert not report.complete
    assert {c.name: c.complete for c in report.components} == {"text_encoder": True, "transformer": False, "vae": True}
    assert "tokenizer" in report.problems[0]


def spoil(directory: Path, how: str) -> None:
    """Make the transformer of a directory of ComfyUI files one that cannot be chosen."""
    [file] = (directory / "diffusion_models").iterdir()
    table = {entry.name: entry.shape for entry in read_header(file, "").entries}
    match how:
        case "two candidates":
            shutil.copy(file, file.with_name("copy.safetensors"))
        case "cut short":
            os.truncate(file, file.stat().st_size - 5)
        case "gguf":
            file.rename(file.with_suffix(".gguf"))
        case "fp8":
            write_hole(file, table, "F8_E4M3")
        case "other":
            write_hole(file, {name: (*shape[:-1], 7) for name, shape in table.items()})


@pytest.mark.parametrize(
    ("how", "says", "fits"),
    [
        ("two candidates", "several files could be the transformer: diffusion_models/copy.safetensors", ["wan-demo"]),
        ("two candidates", "told apart by 'high' and 'low' in their names", ["wan-demo"]),
        ("cut short", "it is cut short or damaged", []),
        ("gguf", "is GGUF, which is not supported: use the bf16 or fp16 file", []),
        ("fp8", "holds F8_E4M3 weights (fp8), which are not supported", []),
        ("other", "it has no transformer of a known model", []),
    ],
)
def test_without_a_model_the_reason_is_said(tmp_path: Path, how: str, says: str, fits: list[str]) -> None:
    """A transformer that cannot be told: no model is compared, but why is said, with what is known of the rest."""
    directory = write_demo(tmp_path / "d", "comfyui")
    spoil(directory, how)
    report = check_checkpoint(directory, None)
    assert (report.layout, report.model, report.fits, report.gpu) == ("comfyui", "", fits, None)
    found = {c.name: c for c in report.components}
    assert found["vae"].parameters == DEMO_PARAMETERS["vae"] and not found["vae"].problem
    assert any(says in text for text in (found["transformer"].problem, *report.problems))


def test_without_a_model_the_reason_is_printed(tmp_path: Path) -> None:
    """As a table and as JSON, both on stdout; exit code 2."""
    directory = write_demo(tmp_path / "d", "comfyui")
    spoil(directory, "gguf")
    ran, as_json = run_engine("check", directory), run_engine("check", directory, "--json")
    assert (ran.returncode, ran.stderr, as_json.returncode, as_json.stderr) == (2, "", 2, "")
    assert "comfyui layout, model not known" in ran.stdout and "name one with --model" in ran.stdout
    assert "is GGUF" in ran.stdout and "is GGUF" in as_json.stdout
    assert json.loads(as_json.stdout)["model"] == ""


def shapes_of(model: str, component: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in networks(load_model(model))[component].tensors().items()}


def test_of_several_models_in_a_folder_the_files_of_the_named_one_are_used(tmp_path: Path) -> None:
    """ComfyUI's folders with the DiTs of TI2V-5B and I2V-14B and both VAEs: with either model named, its own files are
    found by their shapes; without, both are offered; a copy is one too many; a model of neither is told so."""
    five, fourteen = "wan2.2-ti2v-5b", "wan2.1-i2v-14b-480p"
    directory = tmp_path / "d"
    write_hole(directory / "diffusion_models" / "5b.safetensors", shapes_of(five, "transformer"))
    write_hole(directory / "diffusion_models" / "14b.safetensors", shapes_of(fourteen, "transformer"))
    write_hole(directory / "vae" / "wan2.2_vae.safetensors", shapes_of(five, "vae"))
    write_hole(directory / "vae" / "wan_2.1_vae.safetensors", shapes_of(fourteen, "vae"))
    write_hole(directory / "text_encoders" / "umt5.safetensors", shapes_of(five, "text_encoder"))
    image = shapes_of(fourteen, "image_encoder")
    write_hole(directory / "clip_vision" / "clip.safetensors", image | unused_block(image))
    shutil.copy(CONFIGS / "demo" / "tokenizer" / "tokenizer.json", directory)
    for name, files in ((five, ("5b", "wan2.2_vae")), (fourteen, ("14b", "wan_2.1_vae"))):
        found = open_model(load_model(name), SystemParams(model=name, checkpoint=str(directory))).components
        assert tuple(Path(found[c].files[0]).stem for c in ("transformer", "vae")) == files
        assert check_checkpoint(directory, name).complete
    assert set(check_checkpoint(directory, None).fits) == {five, fourteen, "wan2.1-i2v-14b-720p"}
    assert "none is of this model" in refusal("wan2.1-t2v-1.3b", directory)
    shutil.copy(directory / "vae" / "wan2.2_vae.safetensors", directory / "vae" / "copy.safetensors")
    text = refusal(five, directory)
    assert "several files could be the vae: vae/copy.safetensors, vae/wan2.2_vae.safetensors; leave one" in text


def test_the_vae_of_the_other_family_is_named(tmp_path: Path) -> None:
    """TI2V-5B with Wan2.1's VAE: said in these words before anything starts, and by `engine check`."""
    model = load_model("wan2.2-ti2v-5b")
    directory = write_checkpoint(tmp_path / "d", model, only=("text_encoder", "transformer"))
    write_hole(directory / "vae" / "diffusion_pytorch_model.safetensors", shapes_of("wan2.1-t2v-1.3b", "vae"))
    says = "this is the Wan2.1 VAE, the model needs the Wan2.2 VAE"
    assert refusal(model.name, directory).endswith(says)
    [vae] = [c for c in check_checkpoint(directory, None).components if c.name == "vae"]
    assert vae.problem == says


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


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that other users may enter: pytest's own may not be."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)
        yield Path(made)


@contextlib.contextmanager
def not_root() -> Iterator[None]:
    """Root may read all; in here, we are someone else."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("loop", "cannot be read: Too many|is not a directory: Symlink loop"), ("x" * 300, "File name too long"),
        ("~nosuchuser/x", "Could not determine home"), ("a\0b", "null byte"), ("gone", "is not a directory"),
        ("file", "is not a directory"), ("locked/x", "Permission denied"),
    ],
)  # fmt: skip
def test_a_path_that_is_no_directory_is_refused(
    reachable: Path, monkeypatch: pytest.MonkeyPatch, given: str, problem: str
) -> None:
    """A loop of links, a name too long, a user who is not there, a NUL, no permission: the operator's name for it and
    the reason, from `engine check` as from `engine serve`."""
    monkeypatch.chdir(reachable)
    (reachable / "loop").symlink_to("loop")
    (reachable / "file").touch()
    (reachable / "locked").mkdir(mode=0)
    with not_root():
        for look in (lambda: check_checkpoint(Path(given), None), lambda: checkpoint_directory(DEMO, given)):
            with pytest.raises(BadConfig, match=rf"^the checkpoint '.*({problem})"):
                look()


def test_a_directory_without_permission_is_named(reachable: Path) -> None:
    """The whole of it, the folder of a component, of ComfyUI's files, of the tokenizer: an error, or in the report."""
    for folder in ("whole", "vae/vae", "files/diffusion_models", "words/tokenizer"):
        (reachable / folder).mkdir(parents=True)
    for name in ("vae", "words"):
        (reachable / name / "transformer").mkdir()
    for folder in ("whole", "vae/vae", "files/diffusion_models", "words/tokenizer"):
        (reachable / folder).chmod(0)
    with not_root():
        for name in ("whole", "files"):
            with pytest.raises(BadCheckpoint, match=r"cannot be read: .*: Permission denied"):
                check_checkpoint(reachable / name, None)
        [vae] = [c for c in check_checkpoint(reachable / "vae", None).components if c.name == "vae"]
        assert "vae" in vae.problem
        assert (
            "cannot be read: tokenizer.json: Permission denied"
            in check_checkpoint(reachable / "words", None).problems[-1]
        )


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


def test_the_memory_of_a_video_of_any_size() -> None:
    """As `engine check --size` tells it: the usual size by default, and one that the model makes."""
    usual = check_checkpoint(CONFIGS / "demo", None)
    assert usual.size is not None and (usual.size.width, usual.size.height, usual.size.frames) == (96, 96, 17)
    assert [need.level for need in usual.levels] == [0, 1, 2, 3]
    small = check_checkpoint(CONFIGS / "demo", None, "64x48")
    assert small.size is not None and (small.size.width, small.size.height, small.size.frames) == (64, 48, 17)
    assert small.levels[0].gpu < usual.levels[0].gpu
    ran = run_engine("check", CONFIGS / "demo", "--size", "64x48x5")
    assert ran.returncode == 0 and "64x48, 5 frames" in ran.stdout and "3, the DiT's blocks streamed" in ran.stdout


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("large", "expected WIDTHxHEIGHT"), ("64x48x5x1", "expected WIDTHxHEIGHT"), ("64", "expected WIDTHxHEIGHT"),
        ("64x\u0664\u0668", "expected WIDTHxHEIGHT"), ("-64x48", "expected WIDTHxHEIGHT"), ("64x50", "multiple of 16"),
        ("64x48x4", "4n . 1"), ("1024x1024", "takes up to"), ("64x48x37", "up to 33 frames"),
        ("0x48", "multiple of 16"),
    ],
)  # fmt: skip
def test_a_size_that_is_none(size: str, says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        check_checkpoint(CONFIGS / "demo", None, size)
