"""Random checkpoints of every model in every layout: the loader's own modules, and the libraries', take them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.models import CONFIGS, list_models, load_model, read_yaml
from engine.params import ModelParams
from hotreload.checkpoint import Checkpoint, open_checkpoint
from hotreload.weights import load_weights
from stages.models import text_encoder
from stages.models.image_encoder import ImageEncoder
from stages.models.transformer import WanTransformer
from stages.models.vae import WanVae
from tools.make_checkpoint import PREFIX, Layout, directory_source, make_checkpoint, shrink, table_of
from tools.random_weights import BLOCK, RandomWeights

ROOT = Path(__file__).parents[2]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "original", "comfyui")
MODELS = [name for name in list_models() if name != "wan-demo"]


def build(model: ModelParams, component: str) -> nn.Module:
    """Our module of a component, without memory."""
    with torch.device("meta"):
        match component:
            case "text_encoder":
                return text_encoder.build(model.text_encoder)
            case "image_encoder":
                assert model.image_encoder is not None
                return ImageEncoder(model.image_encoder)
            case "vae":
                return WanVae(model.vae)
        return WanTransformer(model.transformer)


def load(checkpoint: Checkpoint, model: ModelParams) -> dict[str, nn.Module]:
    """Every component in float32, as a stage loads it."""
    modules = {name: build(model, name) for name in model.components}
    for name, module in modules.items():
        aliases = text_encoder.ALIASES if name == "text_encoder" else None
        load_weights(module, checkpoint.components[name], dtype=lambda key: torch.float32, aliases=aliases)
    return modules


def make_and_load(model: ModelParams, directory: Path, layout: Layout, **options: object) -> dict[str, nn.Module]:
    make_checkpoint(model, directory, layout, **{"dtype": torch.float32, **options})  # type: ignore[arg-type]
    checkpoint = open_checkpoint(directory, model.components)
    assert checkpoint.layout == layout
    return load(checkpoint, model)


def assert_same(got: dict[str, nn.Module], expected: dict[str, nn.Module]) -> None:
    assert got.keys() == expected.keys()
    for component in got:
        ours, theirs = got[component].state_dict(), expected[component].state_dict()
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"{component}: {different[:5]}"


@torch.inference_mode()
def activations(model: ModelParams, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What each network makes of normal numbers."""
    torch.manual_seed(0)
    made = {}
    t, image = model.transformer, None
    (rows,) = text_encoder.encode(modules["text_encoder"], [5, 60, 211, 1])  # type: ignore[arg-type]
    made["text_encoder"] = rows
    prompt = torch.zeros(1, t.text_len, t.text_dim)
    prompt[0, : len(rows)] = rows
    if model.image_encoder is not None:
        side = model.image_encoder.image_size
        made["image_encoder"] = modules["image_encoder"](torch.randn(1, 3, side, side))
    for name in [name for name in modules if name.startswith("transformer")]:
        dit = modules[name]
        assert isinstance(dit, WanTransformer)
        if model.image_encoder is not None:
            image = dit.encode_image(made["image_encoder"])
        latents = torch.randn(1, t.in_channels, 3, 8, 8)
        made[name] = dit(latents, torch.tensor([700]), dit.encode_prompt(prompt), dit.rope(3, 8, 8), image)
    vae = modules["vae"]
    assert isinstance(vae, WanVae)
    side = 2 * model.size_multiple
    made["encoded"] = vae.encode(torch.rand(1, 3, 5, side, side) * 2 - 1)
    made["decoded"] = vae.decode(torch.randn(1, model.vae.z_dim, 2, 4, 4))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_holds_the_same_model(name: str, tmp_path: Path) -> None:
    """A shrunken model written in the three layouts, in shards and in one file: each is found by looking, every tensor
    is the same, and all activations are finite and near 1."""
    model = shrink(load_model(name))
    expected = make_and_load(model, tmp_path / "diffusers", "diffusers", shard_bytes=200_000)
    for layout in LAYOUTS[1:]:
        assert_same(make_and_load(model, tmp_path / layout, layout, shard_bytes=50_000), expected)
    assert_same(make_and_load(model, tmp_path / "prefixed", "comfyui", prefix=PREFIX), expected)
    for what, values in activations(model, expected).items():
        assert 0.05 < float(values.std()) < 20, f"{what} deviates by {float(values.std())}"


def test_file_names_are_those_of_the_public_repositories(tmp_path: Path) -> None:
    """A model with two experts in Wan's own layout, in shards: a directory per expert, `.pth` files and the tokenizer
    where they are; in ComfyUI's, a file per expert."""
    model = shrink(load_model("wan2.2-t2v-a14b"))
    make_checkpoint(model, tmp_path / "original", "original", shard_bytes=200_000)
    stem = "diffusion_pytorch_model"
    names = {str(path.relative_to(tmp_path / "original")) for path in (tmp_path / "original").rglob("*.*")}
    assert names >= {
        "high_noise_model/config.json", f"low_noise_model/{stem}-00001-of-00002.safetensors",
        f"high_noise_model/{stem}.safetensors.index.json", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth",
        "google/umt5-xxl/tokenizer.json",
    }  # fmt: skip
    make_checkpoint(model, tmp_path / "comfyui", "comfyui")
    assert {path.name for path in (tmp_path / "comfyui").rglob("*.safetensors")} == {
        "wan2.2_t2v_high_noise_14B_bf16.safetensors", "wan2.2_t2v_low_noise_14B_bf16.safetensors",
        "umt5_xxl_bf16.safetensors", "wan_2.1_vae.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b-480p", "wan2.2-ti2v-5b"])
def test_the_libraries_read_the_diffusers_layout(name: str, tmp_path: Path) -> None:
    """Diffusers and transformers build their own networks from the directory, without a missing or an extra tensor, and
    ours has the same ones."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionModel, UMT5EncoderModel

    model = shrink(load_model(name))
    ours = make_and_load(model, tmp_path, "diffusers", shard_bytes=200_000)
    for component, reader in (("transformer", WanTransformer3DModel), ("vae", AutoencoderKLWan)):
        theirs = reader.from_config(reader.load_config(tmp_path / component))
        files = (tmp_path / component).glob("*.safetensors")
        theirs.load_state_dict({key: value for file in files for key, value in load_file(file).items()})
        assert_same({component: ours[component]}, {component: theirs})
    for component, reader in (("text_encoder", UMT5EncoderModel), ("image_encoder", CLIPVisionModel)):
        if component in ours:
            theirs, said = reader.from_pretrained(tmp_path / component, output_loading_info=True)
            assert not any(said.values()), f"{component}: {said}"
            base = "vision_model." if component == "image_encoder" else ""
            tensors = {base + key: value for key, value in theirs.state_dict().items()}
            assert all(torch.equal(value, tensors[key]) for key, value in ours[component].state_dict().items())


def test_the_seed_decides_the_values(tmp_path: Path) -> None:
    """The same seed gives the same bytes; another seed, another component or another name gives others."""
    model = shrink(load_model("wan2.2-t2v-a14b"))
    file = "transformer/diffusion_pytorch_model.safetensors"
    for directory, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint(model, tmp_path / directory, "diffusers", seed=seed)
    first, same, other = ((tmp_path / directory / file).read_bytes() for directory in "abc")
    assert first == same
    assert first != other
    high, low = (load_file(tmp_path / "a" / file.replace("transformer/", f"{c}/")) for c in model.components[1:3])
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(high[name], low[name])
    assert not torch.equal(high[name], high[name.replace("to_q", "to_k")])


def test_experts_can_be_the_same_files(tmp_path: Path) -> None:
    """With twins the second expert takes no room: its files are the first one's under another name."""
    model = shrink(load_model("wan2.2-t2v-a14b"))
    for layout in LAYOUTS:
        make_checkpoint(model, tmp_path / layout, layout, twins=True)
        modules = load(open_checkpoint(tmp_path / layout, model.components), model)
        high, low = modules["transformer"].state_dict(), modules["transformer_2"].state_dict()
        assert all(torch.equal(high[name], low[name]) for name in high)
        linked = {path.stat().st_ino for path in (tmp_path / layout).rglob("*") if path.stat().st_nlink == 2}
        assert len([path for path in (tmp_path / layout).rglob("*") if path.stat().st_ino in linked and path.is_file()])


def test_a_large_tensor_goes_around_the_block() -> None:
    """A matrix of more numbers than the block: it has all of them, normal with the deviation of its fan-in, and is the
    same in stretches; its rows differ."""
    weights, shape = RandomWeights(), (3500, 5120)
    assert shape[0] * shape[1] > BLOCK
    matrix = weights.tensor("transformer", "blocks.0.attn1.to_q.weight", shape, torch.bfloat16)
    assert matrix.shape == shape
    assert abs(float(matrix.float().std()) * 5120**0.5 - 1) < 0.01
    wrapped = BLOCK // 5120
    assert not torch.equal(matrix[0], matrix[wrapped])
    stretches = list(weights.stretches("transformer", "blocks.0.attn1.to_q.weight", shape, torch.bfloat16))
    assert len(stretches) > 1
    assert torch.equal(torch.cat(stretches), matrix.flatten())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_demo_model_in_every_layout(layout: Layout, tmp_path: Path) -> None:
    """`--from configs/demo` writes the weights that ship in another layout: loaded, they are the same tensors."""
    model = load_model("wan-demo")
    source = directory_source(CONFIGS / "demo", model.components)
    got = make_and_load(model, tmp_path, layout, dtype=torch.float16, source=source)
    assert_same(got, load(open_checkpoint(CONFIGS / "demo", model.components), model))


def test_the_command(tmp_path: Path) -> None:
    """One component of a shrunken model from the command line: its files and no other's, and the parameters beside the
    directory, which are those of a model that can be read back."""
    command = [sys.executable, "-m", "tools.make_checkpoint", "wan2.2-ti2v-5b", str(tmp_path / "tiny"), "--shrink"]
    ran = subprocess.run([*command, "--only", "vae"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert "GB/s" in ran.stdout
    assert [path.parent.name for path in (tmp_path / "tiny").rglob("*.safetensors")] == ["vae"]
    model = read_yaml(tmp_path / "tiny.yaml", ModelParams)
    assert model == shrink(load_model("wan2.2-ti2v-5b"))
    assert table_of(model, "vae").keys() == load_file(next((tmp_path / "tiny").rglob("*.safetensors"))).keys()


def test_a_component_that_the_model_has_not(tmp_path: Path) -> None:
    """Asking for the image encoder of a text-to-video model is an error that names those there are."""
    with pytest.raises(ValueError, match=r"has no image_encoder; its components: text_encoder, transformer, vae"):
        make_checkpoint(shrink(load_model("wan2.1-t2v-1.3b")), tmp_path, "diffusers", only=("image_encoder",))
