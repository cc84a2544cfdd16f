"""Checkpoints on disk: the three layouts, found by looking, and every way in which a directory can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hotreload.checkpoint import TOKENIZER_SOURCE, Checkpoint, open_checkpoint
from hotreload.pth import read_pth
from hotreload.tables import TransformerTraits, component_table, transformer_traits
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Component
from tests.hotreload.tiny import (
    ALL,
    Tensors,
    networks,
    originals,
    save,
    save_shards,
    write_comfyui,
    write_diffusers,
    write_original,
)

ONE = ("text_encoder", "transformer", "vae")
TWO = ("text_encoder", "transformer", "transformer_2", "vae")
DIT = "diffusion_pytorch_model"
Write = Callable[[Path, dict[str, Tensors]], Path]
WRITERS: list[Write] = [write_diffusers, write_original, write_comfyui]


@pytest.fixture(scope="module")
def content() -> dict[str, Tensors]:
    return networks(ALL)


def some(content: dict[str, Tensors], names: tuple[str, ...]) -> dict[str, Tensors]:
    return {name: content[name] for name in names}


def refusal(directory: Path, components: tuple[str, ...]) -> str:
    """The message of the refusal, which must not tell where the directory is."""
    with pytest.raises(BadCheckpoint) as refused:
        open_checkpoint(directory, components)
    assert str(directory.parent) not in str(refused.value)
    return str(refused.value)


def values(component: Component) -> Tensors:
    """Every float32 tensor of a component, read where its table says."""
    found = {}
    for name, entry in component_table(component, read_pth).items():
        raw = bytearray(entry.file.read_bytes()[entry.offset : entry.offset + entry.size])
        found[name] = torch.frombuffer(raw, dtype=torch.float32).view(entry.shape)
    return found


def check_same(checkpoint: Checkpoint, content: dict[str, Tensors]) -> None:
    assert checkpoint.components.keys() == content.keys()
    for name, tensors in content.items():
        found = values(checkpoint.components[name])
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("names", [ONE, TWO, ALL, ("text_encoder", "image_encoder", "transformer", "vae")])
@pytest.mark.parametrize("write", WRITERS)
def test_each_layout_holds_the_same_tensors(
    tmp_path: Path, content: dict[str, Tensors], names: tuple[str, ...], write: Write
) -> None:
    """One expert and two, with and without the image encoder: each component's files, our names, the same bytes; what
    the model does not use (the tokenizer in the UMT5 file, CLIP's text half) is left out."""
    wanted = some(content, names)
    checkpoint = open_checkpoint(write(tmp_path, wanted), names)
    assert checkpoint.layout == write.__name__.removeprefix("write_")
    assert checkpoint.tokenizer.read_text() == "{}"
    check_same(checkpoint, wanted)


def test_a_vae_of_wan22_is_found_in_each_layout(tmp_path: Path) -> None:
    """The VAE with 48 channels and residual stages, as TI2V-5B has it."""
    content = networks(ONE, residual=True)
    check_same(open_checkpoint(write_diffusers(tmp_path / "a", content), ONE), content)
    check_same(open_checkpoint(write_original(tmp_path / "b", content, residual=True), ONE), content)
    check_same(open_checkpoint(write_comfyui(tmp_path / "c", content, residual=True), ONE), content)


def test_the_supervisor_needs_no_torch_for_this(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """All layouts opened, a LoRA option parsed, in a process that has not imported torch by the end."""
    for write in WRITERS:
        write(tmp_path / write.__name__, some(content, ALL))
    script = (
        "import sys; from pathlib import Path; from hotreload.checkpoint import open_checkpoint\n"
        "from hotreload.lora_options import parse_lora; parse_lora('x.safetensors:1')\n"
        "for d in Path(sys.argv[1]).iterdir(): open_checkpoint(d, tuple(sys.argv[2:]))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *ALL], check=True, timeout=60)


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/tokenizer.json",
        "text_encoder/model.safetensors",
        "image_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer_2/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_file_of_a_diffusers_directory_is_named(
    tmp_path: Path, content: dict[str, Tensors], file: str
) -> None:
    """Whatever file is missing, the error has its name relative to the checkpoint."""
    directory = write_diffusers(tmp_path / "x", content)
    (directory / file).unlink()
    assert f"lacks {file}" in refusal(directory, ALL)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "models_clip_open-clip"),
        ("Wan2.1_VAE.pth", "Wan2.1_VAE.pth"),
        ("google/umt5-xxl/tokenizer.json", TOKENIZER_SOURCE),
        ("low_noise_model", "low_noise_model/diffusion_pytorch_model.safetensors"),
        ("high_noise_model", "high_noise_model/diffusion_pytorch_model.safetensors"),
        (f"high_noise_model/{DIT}-00002-of-00003.safetensors", f"high_noise_model/{DIT}-00002-of-00003.safetensors"),
    ],
)
def test_what_a_wan_repository_lacks_is_named(
    tmp_path: Path, content: dict[str, Tensors], file: str, named: str
) -> None:
    """The T5, the VAE, the tokenizer, a whole expert, a shard: the error says which."""
    directory = write_original(tmp_path / "x", content)
    if (directory / file).is_dir():
        shutil.rmtree(directory / file)
    else:
        (directory / file).unlink()
    message = refusal(directory, ALL)
    assert "lacks" in message
    assert named in message


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("text_encoders/umt5_xxl_fp16.safetensors", "lacks the text_encoder"),
        ("clip_vision/clip_vision_h.safetensors", "lacks the image_encoder"),
        ("vae/wan_2.1_vae.safetensors", "lacks the vae"),
        ("diffusion_models/wan_high_noise_14B_fp16.safetensors", "lacks the high-noise expert (transformer)"),
        ("diffusion_models/wan_low_noise_14B_fp16.safetensors", "lacks the low-noise expert (transformer_2)"),
        ("tokenizer.json", f"lacks tokenizer/tokenizer.json: download {TOKENIZER_SOURCE}"),
    ],
)
def test_what_comfyui_files_lack_is_named(tmp_path: Path, content: dict[str, Tensors], file: str, named: str) -> None:
    """Each file in turn: the error says which component, and (but for the tokenizer) what files there are."""
    directory = write_comfyui(tmp_path / "x", content)
    (directory / file).unlink()
    message = refusal(directory, ALL)
    assert named in message
    assert file == "tokenizer.json" or "files found: " in message


@pytest.mark.parametrize("write", WRITERS)
def test_the_number_of_experts_must_be_the_models(tmp_path: Path, content: dict[str, Tensors], write: Write) -> None:
    """The 14B models have the same shapes: only this tells that an A14B directory is not Wan2.1's, or the reverse."""
    message = refusal(write(tmp_path / "two", some(content, TWO)), ONE)
    assert "choose a Wan2.2-A14B model" in message
    message = refusal(write(tmp_path / "one", some(content, ONE)), TWO)
    assert any(name in message for name in ("transformer_2", "high-noise expert", "high_noise_model"))


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyui_files_may_lie_flat_and_have_a_prefix(
    tmp_path: Path, content: dict[str, Tensors], prefix: str, place: str
) -> None:
    """All files in one directory, the tokenizer in any of three places."""
    wanted = some(content, TWO)
    directory = write_comfyui(tmp_path, wanted, prefix=prefix, flat=True)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(directory / "tokenizer.json", tmp_path / place)
    checkpoint = open_checkpoint(directory, TWO)
    assert checkpoint.tokenizer == tmp_path / place
    check_same(checkpoint, wanted)


def test_a_repackaged_repository_as_it_is_downloaded(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """Its files are below `split_files/`."""
    write_comfyui(tmp_path / "split_files", some(content, ONE))
    shutil.move(tmp_path / "split_files" / "tokenizer.json", tmp_path)
    check_same(open_checkpoint(tmp_path, ONE), some(content, ONE))


def test_files_of_other_models_are_passed_over(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """A T5 (a bias in its first layer only), another VAE, a broken file, GGUF, fp8 twins: ComfyUI's directory is shared
    by models, and what is needed is there."""
    directory = write_comfyui(tmp_path, some(content, ONE))
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    save(directory / "text_encoders" / "t5xxl.safetensors", {bias: torch.ones(2), "shared.weight": torch.ones(2)})
    save(directory / "vae" / "ae.safetensors", {"decoder.conv_in.weight": torch.ones(2)})
    (directory / "vae" / "broken.safetensors").write_bytes(b"\xff" * 20)
    (directory / "diffusion_models" / "wan-Q4.gguf").write_bytes(b"GGUF")
    fp8 = {n: t.to(torch.float8_e4m3fn) for n, t in originals("transformer", content["transformer"]).items()}
    save(directory / "diffusion_models" / "wan_fp8_scaled.safetensors", fp8)
    check_same(open_checkpoint(directory, ONE), some(content, ONE))


def test_fp8_and_gguf_are_named_as_what_cannot_be_used(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """The only transformer is scaled fp8, the only text encoder GGUF: the error names that, and the way out."""
    directory = write_comfyui(tmp_path / "x", some(content, ONE))
    file = directory / "diffusion_models" / "wan_14B_fp16.safetensors"
    save(file, {n: t.to(torch.float8_e4m3fn) for n, t in originals("transformer", content["transformer"]).items()})
    message = refusal(directory, ("transformer", "vae"))
    assert f"diffusion_models/{file.name} holds F8_E4M3 weights (fp8)" in message
    assert "use the bf16 or fp16 file" in message
    (directory / "text_encoders" / "umt5_xxl_fp16.safetensors").rename(directory / "text_encoders" / "umt5-Q8.gguf")
    message = refusal(directory, ("text_encoder",))
    assert "umt5-Q8.gguf is GGUF, which is not supported: use the bf16 or fp16 file" in message


def test_fp8_in_a_diffusers_directory_is_refused(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """Weights whose scales no one would apply."""
    directory = write_diffusers(tmp_path / "x", some(content, ONE))
    fp8: dict[str, Tensor] = {name: t.to(torch.float8_e5m2) for name, t in content["transformer"].items()}
    save(directory / "transformer" / f"{DIT}.safetensors", fp8)
    assert f"transformer: {DIT}.safetensors holds F8_E5M2 weights (fp8)" in refusal(directory, ONE)


@pytest.mark.parametrize(
    ("write", "extra", "message"),
    [
        (
            write_diffusers,
            f"vae/{DIT}.safetensors.index.json",
            "the weights: vae/diffusion_pytorch_model.safetensors, vae/",
        ),
        (write_original, "models_t5_other.pth", "the text_encoder: models_t5_other.pth, models_t5_umt5"),
        (write_original, "Wan2.2_VAE.pth", "the vae: Wan2.1_VAE.pth, Wan2.2_VAE.pth"),
        (write_comfyui, "vae/copy.safetensors", "the vae: vae/copy.safetensors, vae/wan_2.1_vae.safetensors"),
    ],
)
def test_several_candidates_are_listed(
    tmp_path: Path, content: dict[str, Tensors], write: Write, extra: str, message: str
) -> None:
    """Two files that could be one component: neither is chosen, both are named."""
    directory = write(tmp_path / "x", some(content, ONE))
    shutil.copy(
        directory / "vae" / "wan_2.1_vae.safetensors" if write is write_comfyui else __file__, directory / extra
    )
    assert f"several files could be {message}" in refusal(directory, ONE)


@pytest.mark.parametrize("suffix", ["", "-bf16"])
@pytest.mark.parametrize("index", ["own", "of the original", "none"])
def test_shards_with_a_suffix_are_found(tmp_path: Path, content: dict[str, Tensors], suffix: str, index: str) -> None:
    """Re-uploads whose shards end in -bf16: with an index that names them, with the original's index, without one."""
    wanted = some(content, ONE)
    directory = write_original(tmp_path, wanted)
    for file in directory.glob(f"{DIT}*"):
        file.unlink()
    save_shards(directory, DIT, originals("transformer", wanted["transformer"]), suffix=suffix)
    file = directory / f"{DIT}.safetensors.index.json"
    if index == "none":
        file.unlink()
    elif index == "of the original":
        file.write_text(file.read_text().replace(suffix, "") if suffix else file.read_text())
    check_same(open_checkpoint(directory, ONE), wanted)
    (directory / f"{DIT}-00002-of-00003{suffix}.safetensors").unlink()
    assert "lacks" in refusal(directory, ONE)


def test_a_variant_is_taken_if_it_is_the_only_one(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """Diffusers' `.fp16` files: alone they are taken; beside the usual ones they are left."""
    wanted = some(content, ONE)
    directory = write_diffusers(tmp_path, wanted)
    usual, variant = (directory / "vae" / f"{DIT}{dot}.safetensors" for dot in ("", ".fp16"))
    shutil.copy(usual, variant)
    assert open_checkpoint(directory, ONE).components["vae"].files == [str(usual)]
    usual.unlink()
    assert open_checkpoint(directory, ONE).components["vae"].files == [str(variant)]


def test_an_index_is_limited(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """A hole of 3 GB, and ten thousand shards: refused by size, and by number."""
    directory = write_diffusers(tmp_path / "d", some(content, ONE))
    (directory / "vae" / f"{DIT}.safetensors").unlink()
    index = directory / "vae" / f"{DIT}.safetensors.index.json"
    with index.open("wb") as hole:
        hole.truncate(3 << 30)
    assert f"vae/{index.name} is not an index: it has more than 67108864 bytes" in refusal(directory, ONE)
    index.write_text(json.dumps({"weight_map": {f"{i}": f"{i}.safetensors" for i in range(10_000)}}))
    assert "names 10000 shards, expected at most 1000" in refusal(directory, ONE)


@pytest.mark.parametrize("index", ["not json", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../vae/x"}}',
                                   '{"weight_map": {}}', '{"weight_map": {"a": "config.json"}}'])  # fmt: skip
def test_a_broken_index_is_refused(tmp_path: Path, content: dict[str, Tensors], index: str) -> None:
    """Not JSON, no map, a number for a file, a file elsewhere, no shards, another kind of file: the index is named."""
    directory = write_diffusers(tmp_path / "x", some(content, ONE))
    (directory / "vae" / f"{DIT}.safetensors").unlink()
    (directory / "vae" / "config.json").write_text("{}")
    (directory / "vae" / f"{DIT}.safetensors.index.json").write_text(index)
    assert f"vae/{DIT}.safetensors.index.json" in refusal(directory, ONE)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """The same name in both shards: the error names it and both files."""
    directory = write_original(tmp_path / "x", some(content, ONE))
    first, second, _ = sorted(directory.glob(f"{DIT}-*.safetensors"))
    shutil.copy(second, first)
    assert f"is in both {first.name} and {second.name}" in refusal(directory, ONE)


@pytest.mark.parametrize("write", WRITERS)
def test_a_damaged_file_is_named(tmp_path: Path, content: dict[str, Tensors], write: Write) -> None:
    """The VAE's file cut in half, as by an interrupted download."""
    directory = write(tmp_path / "x", some(content, ONE))
    (file,) = (Path(f) for f in open_checkpoint(directory, ONE).components["vae"].files)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = refusal(directory, ONE)
    assert file.name in message
    assert "cut short" in message


@pytest.mark.parametrize("files", [(), ("model.bin",), ("vae/readme.md",)])
def test_a_directory_without_weights_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    """Empty, or with nothing known: the error says what the three layouts look like."""
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).write_text("")
    (tmp_path / "x").mkdir(exist_ok=True)
    assert "expected a Diffusers repository" in refusal(tmp_path / "x", ONE)
    assert refusal(tmp_path / "gone", ONE) == "the checkpoint is not a directory"


def test_traits_tell_transformers_apart(tmp_path: Path) -> None:
    """Width, layers, feed-forward width, channels and image attention, from the header in any naming."""
    content = networks(ONE, image_dim=16)
    expected = TransformerTraits(24, 2, 32, 4, 4, True)
    for write in WRITERS:
        checkpoint = open_checkpoint(write(tmp_path / write.__name__, content), ONE)
        assert transformer_traits(component_table(checkpoint.components["transformer"])) == expected
        with pytest.raises(BadCheckpoint, match="is not a Wan DiT"):
            transformer_traits({})


def test_an_index_may_name_each_shard_once(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """The files of a component are its shards, in order, each once, by absolute path."""
    directory = write_original(tmp_path, some(content, ONE))
    files = open_checkpoint(directory, ONE).components["transformer"].files
    assert files == [str(tmp_path / f"{DIT}-0000{i}-of-00003.safetensors") for i in (1, 2, 3)]
    assert set(json.loads((tmp_path / f"{DIT}.safetensors.index.json").read_text())["weight_map"].values()) == {
        Path(file).name for file in files
    }


def test_names_that_are_not_utf8_are_refused(tmp_path: Path, content: dict[str, Tensors]) -> None:
    """A directory, and a file in a good one, whose name is the byte FF: refused, because no stage could be told."""
    directory = write_comfyui(tmp_path / "\udcff", some(content, ONE))
    assert refusal(directory, ONE) == (
        "the path of the checkpoint is not UTF-8, as paths must be here; rename its directory"
    )
    directory = directory.rename(tmp_path / "good")
    vae = directory / "vae" / "wan_2.1_vae.safetensors"
    vae.rename(vae.with_name("\udcff.safetensors"))
    assert r"vae: the file name '\udcff.safetensors' is not UTF-8" in refusal(directory, ONE)
