"""LoRA files of every known format: what they add, exactly; and what no model can take, named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hotreload.content import CHUNK
from hotreload.lora import Delta, read_lora
from hotreload.names import original_name
from hotreload.safetensors_file import TensorEntry
from hotreload.weights import load_weights
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Lora
from tests.engine.sparse import write_hole
from tests.hotreload.tiny import Tensors, a_component, build, originals, random_tensors, save

RANK = 3
TARGETS = (
    "blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_out.0.weight", "blocks.1.attn2.to_k.weight",
    "blocks.1.ffn.net.0.proj.weight", "blocks.1.ffn.net.2.weight", "condition_embedder.time_embedder.linear_1.weight",
    "proj_out.weight", "patch_embedding.weight",
)  # fmt: skip
"""Of the linears, some of each kind, and the convolution."""

Rename = Callable[[str, str], str]
"""(our module, "down" | "up" | "alpha") -> a key."""


def original(module: str) -> str:
    name = original_name("transformer", f"{module}.weight")
    assert name is not None
    return name.removesuffix(".weight")


def letter(role: str) -> str:
    return "A" if role == "down" else "B"


def suffix(role: str, pair: str) -> str:
    return ".alpha" if role == "alpha" else pair


FORMATS: dict[str, Rename] = {
    "comfyui": lambda m, r: f"diffusion_model.{original(m)}" + suffix(r, f".lora_{letter(r)}.weight"),
    "lightx2v": lambda m, r: f"diffusion_model.{original(m)}" + suffix(r, f".lora_{r}.weight"),
    "original without a prefix": lambda m, r: original(m) + suffix(r, f".lora_{r}.weight"),
    "kohya": lambda m, r: "lora_unet_" + original(m).replace(".", "_") + suffix(r, f".lora_{r}.weight"),
    "kohya with our names": lambda m, r: "lora_unet_" + m.replace(".", "_") + suffix(r, f".lora_{r}.weight"),
    "diffusers": lambda m, r: f"transformer.{m}" + suffix(r, f".lora_{letter(r)}.weight"),
    "peft": lambda m, r: f"base_model.model.{m}" + suffix(r, f".lora_{letter(r)}.default.weight"),
    "unet": lambda m, r: f"unet.{m}" + suffix(r, f".lora.{r}.weight"),
    "old diffusers": lambda m, r: f"unet.{m.replace('attn1.', 'attn1.processor.')}" + suffix(r, f"_lora.{r}.weight"),
    "linear layer": lambda m, r: f"model.{m}" + suffix(r, f".lora_linear_layer.{r}.weight"),
    "model.diffusion_model": lambda m, r: f"model.diffusion_model.{original(m)}" + suffix(r, f".lora_{r}.weight"),
}


@pytest.fixture(scope="module")
def base() -> Tensors:
    return random_tensors(build("transformer"))


@pytest.fixture
def file(tmp_path: Path, base: Tensors) -> Path:
    return save(tmp_path / "diffusion_pytorch_model.safetensors", base)


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def pair(weight: Tensor, seed: int = 5, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """(down, up) for a weight; of a convolution, as one with a 1x1 convolution after it."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    return down, torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator)


def product(down: Tensor, up: Tensor) -> Tensor:
    """up @ down in float64."""
    return (up.flatten(1).double() @ down.flatten(1).double()).view(up.shape[0], *down.shape[1:])


def pairs(base: Tensors, rename: Rename, targets: Iterable[str] = TARGETS, alpha: float | None = None) -> Tensors:
    stored: Tensors = {}
    for target in targets:
        module = target.removesuffix(".weight")
        stored[rename(module, "down")], stored[rename(module, "up")] = pair(base[target])
        if alpha is not None:
            stored[rename(module, "alpha")] = torch.tensor(alpha)
    return stored


def load(
    file: Path, *loras: Lora, dtype: torch.dtype = torch.float32, name: str = "transformer"
) -> tuple[Tensors, str]:
    module = build("transformer")
    digest = load_weights(module, a_component(name, file, loras=list(loras)), dtype=lambda key: dtype)
    return module.state_dict(), digest


def expect(found: Tensors, base: Tensors, added: Tensors) -> None:
    """`found` is base + added, to 1e-6 of the largest value; what nothing was added to is the same to the bit."""
    for name, tensor in base.items():
        if name in added:
            wanted = tensor.double() + added[name]
            assert (found[name].double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
            assert not torch.equal(found[name], tensor)
        else:
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("rename", FORMATS.values(), ids=FORMATS)
def test_each_format_adds_the_same(
    tmp_path: Path, base: Tensors, file: Path, rename: Rename, alpha: float | None
) -> None:
    """base + strength * (alpha / rank or 1) * up @ down, whatever the keys are called; other tensors are untouched."""
    lora = save(tmp_path / "lora.safetensors", pairs(base, rename, alpha=alpha))
    scale = 0.7 * (1 if alpha is None else alpha / RANK)
    found, _ = load(file, Lora(file=str(lora), strength=0.7))
    expect(found, base, {target: scale * product(*pair(base[target])) for target in TARGETS})


def test_all_modules_have_a_key_in_kohyas_format(base: Tensors) -> None:
    """Underscores for dots cannot be told apart in general: here, every module's flat name is found, and is its own."""
    modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight") and base[name].ndim > 1]
    wide = random_tensors(build("transformer", image_dim=16))
    modules += [name.removesuffix(".weight") for name in wide if name not in base and wide[name].ndim > 1]
    flat = {FORMATS["kohya"](module, "up") for module in modules}
    assert len(flat) == len(modules)


def test_differences_are_added(tmp_path: Path, base: Tensors, file: Path) -> None:
    """`.diff` on weights, norms included, `.diff_b` on biases, `.diff_m` on modulations, of blocks and of the head."""
    targets = {
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "diffusion_model.head.head.diff_b": "proj_out.bias",
        "diffusion_model.blocks.0.diff_m": "blocks.0.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
    }
    diffs = {key: torch.randn(base[name].shape) for key, name in targets.items()}
    lora = save(tmp_path / "lora.safetensors", diffs)
    found, _ = load(file, Lora(file=str(lora), strength=-1.5))
    expect(found, base, {targets[key]: -1.5 * diff.double() for key, diff in diffs.items()})


def test_several_files_are_stacked(tmp_path: Path, base: Tensors, file: Path) -> None:
    """Two files with pairs and one with a difference, on the same weight: their sum is added."""
    target, module = TARGETS[0], TARGETS[0].removesuffix(".weight")
    one, two = (pair(base[target], seed, rank) for seed, rank in ((1, 2), (2, 5)))
    keys = [FORMATS["diffusers"](module, role) for role in ("down", "up")]
    diff = torch.randn(base[target].shape)
    loras = [
        Lora(file=str(save(tmp_path / "1.safetensors", dict(zip(keys, one, strict=True)))), strength=0.5),
        Lora(file=str(save(tmp_path / "2.safetensors", dict(zip(keys, two, strict=True)))), strength=2.0),
        Lora(file=str(save(tmp_path / "3.safetensors", {f"{original(module)}.diff": diff})), strength=1.0),
    ]
    found, _ = load(file, *loras)
    expect(found, base, {target: 0.5 * product(*one) + 2 * product(*two) + diff.double()})


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_rounded_once(tmp_path: Path, base: Tensors, stored: torch.dtype) -> None:
    """Into bfloat16, from float32 and from bfloat16 weights, with bfloat16 pairs: the sum is made in float32."""
    base = {name: tensor.to(stored) for name, tensor in base.items()}
    file = save(tmp_path / "x.safetensors", base)
    lora = {key: tensor.bfloat16() for key, tensor in pairs(base, FORMATS["lightx2v"]).items()}
    path = save(tmp_path / "lora.safetensors", lora)
    found, _ = load(file, Lora(file=str(path), strength=0.3), dtype=torch.bfloat16)
    for target in TARGETS:
        down, up = (t.bfloat16() for t in pair(base[target]))
        wanted = (base[target].double() + 0.3 * product(down, up)).bfloat16()
        assert (found[target] != wanted).float().mean() < 1e-3
        torch.testing.assert_close(found[target], wanted, rtol=2**-7, atol=0)


def test_a_weight_of_many_chunks_is_merged_whole(tmp_path: Path) -> None:
    """Chunks end in the middle of rows: each element still gets what is its own, from a pair and from a difference."""
    shape = (1501, 4099)
    assert shape[0] * shape[1] * 4 > 2 * CHUNK
    assert CHUNK // 4 % shape[1]
    name = "blocks.0.ffn.net.0.proj.weight"
    weight, diff = torch.randn(shape), torch.randn(shape).half()
    down, up = pair(weight)
    lora = {"blocks.0.ffn.0.lora_down.weight": down, "blocks.0.ffn.0.lora_up.weight": up, "blocks.0.ffn.0.diff": diff}
    loras = [Lora(file=str(save(tmp_path / "lora.safetensors", lora)), strength=0.5)]
    with torch.device("meta"):
        module = torch.nn.Module()
        module.blocks = torch.nn.ModuleList([torch.nn.Module()])
        module.blocks[0].ffn = torch.nn.Module()
        module.blocks[0].ffn.net = torch.nn.ModuleList([torch.nn.Module()])
        module.blocks[0].ffn.net[0].proj = torch.nn.Linear(shape[1], shape[0], bias=False)
    component = a_component("transformer", save(tmp_path / "x.safetensors", {name: weight}), loras=loras)
    load_weights(module, component, dtype=lambda key: torch.float32)
    expect(module.state_dict(), {name: weight}, {name: 0.5 * (product(down, up) + diff.double())})


def test_the_hash_knows_what_was_merged(tmp_path: Path, base: Tensors, file: Path) -> None:
    """Another strength, alpha, file or order: another hash. Strength 0: the base's bytes and the base's hash."""
    plain, alpha = (save(tmp_path / f"{a}.safetensors", pairs(base, FORMATS["kohya"], alpha=a)) for a in (None, 2.0))
    stacks = [
        [], [(plain, 1.0)], [(plain, 0.5)], [(alpha, 1.0)], [(plain, 1.0), (alpha, 1.0)], [(alpha, 1.0), (plain, 1.0)],
    ]  # fmt: skip
    hashes = [load(file, *(Lora(file=str(f), strength=s) for f, s in stack))[1] for stack in stacks]
    assert len(set(hashes)) == len(stacks)
    found, digest = load(file, Lora(file=str(plain), strength=0.0))
    assert digest == hashes[0]
    expect(found, base, {})


def test_a_checkpoint_under_original_names_takes_the_same_file(tmp_path: Path, base: Tensors, file: Path) -> None:
    """The file's keys need not be called as the checkpoint's: the same merged weights and hash."""
    lora = Lora(file=str(save(tmp_path / "lora.safetensors", pairs(base, FORMATS["diffusers"]))), strength=1.0)
    other = save(tmp_path / "original.safetensors", originals("transformer", base))
    module = build("transformer")
    component = a_component("transformer", other, naming="original", loras=[lora])
    assert load_weights(module, component, dtype=lambda key: torch.float32) == load(file, lora)[1]


def test_a_text_to_video_file_fits_an_image_to_video_model(tmp_path: Path, base: Tensors) -> None:
    """Pairs for every linear of the narrower model, none for the image keys: nothing is missing."""
    targets = [name for name, t in base.items() if name.endswith(".weight") and t.ndim == 2]
    lora = save(tmp_path / "lora.safetensors", pairs(base, FORMATS["comfyui"], targets))
    wide = random_tensors(build("transformer", image_dim=16))
    assert {delta.target for delta in read_lora(lora, "transformer", shapes(wide))} == set(targets)
    images = save(tmp_path / "i2v.safetensors", pairs(wide, FORMATS["comfyui"], ["blocks.0.attn2.add_k_proj.weight"]))
    with pytest.raises(BadCheckpoint, match=r"without a match in the model: .*cross_attn\.k_img\.lora_A"):
        read_lora(images, "transformer", shapes(base))


def test_one_file_for_both_experts_is_split_by_prefix(tmp_path: Path, base: Tensors) -> None:
    """PEFT's `transformer.` is the high-noise expert, `transformer_2.` the low-noise one."""
    module = TARGETS[0].removesuffix(".weight")
    keys = {f"transformer.{module}.lora_A.weight": pair(base[TARGETS[0]], 1)[0],
            f"transformer.{module}.lora_B.weight": pair(base[TARGETS[0]], 1)[1],
            f"transformer_2.{module}.lora_A.weight": pair(base[TARGETS[0]], 2)[0],
            f"transformer_2.{module}.lora_B.weight": pair(base[TARGETS[0]], 2)[1]}  # fmt: skip
    lora = save(tmp_path / "lora.safetensors", keys)
    for name in ("transformer", "transformer_2"):
        (delta,) = read_lora(lora, name, shapes(base))
        assert delta.down is not None and delta.down.name.startswith(f"{name}.")
    low = save(tmp_path / "low.safetensors", {key: t for key, t in keys.items() if key.startswith("transformer_2.")})
    assert len(read_lora(low, "transformer_2", shapes(base))) == 1
    with pytest.raises(BadCheckpoint, match=r"LoRA low\.safetensors is for the low-noise expert"):
        read_lora(low, "transformer", shapes(base))


def one(base: Tensors, **changes: Tensor | None) -> Tensors:
    """A good pair under original names, and `changes` to it by the end of the key (None: left out)."""
    module = "diffusion_model.blocks.0.self_attn.q"
    down, up = pair(base[TARGETS[0]])
    keys: dict[str, Tensor | None] = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    keys |= {f"{module}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {key: value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora_up__weight": None}, "1 tensor is without the other half of the pair: .*lora_down"),
        ({"lora_down__weight": None, "alpha": torch.tensor(1.0)}, "2 tensors are without the other half"),
        ({"lora_up__weight": torch.ones(24, 4)}, r"another shape: .*lora_up\.weight \(got \[24, 4\], expected \[24, 3"),
        ({"lora_down__weight": torch.ones(3, 23)}, r"lora_down\.weight \(got \[3, 23\], expected \[rank, 24\]\)"),
        ({"lora_down__weight": torch.ones(0, 24)}, r"got \[0, 24\]"),
        ({"lora_down__weight": torch.ones(3, 24, dtype=torch.int8)}, r"not floating-point: .*lora_down\.weight \(I8\)"),
        ({"alpha": torch.ones(2)}, "alpha must be one number"),
        ({"alpha": torch.tensor(float("nan"))}, "alpha is nan"),
        ({"alpha": torch.tensor(1e300, dtype=torch.float64)}, r"alpha scales by 3\.33333e\+299, expected at most"),
        ({"lora_down__weight": torch.ones(25, 24), "lora_up__weight": torch.ones(24, 25)}, r"\(rank 25, more than the"),
        ({"diff_b": torch.ones(23)}, r"diff_b \(got \[23\], expected \[24\]\)"),
        ({"lora_A__weight": torch.ones(3, 24)}, r"given a second time: .*lora_down\.weight"),
        ({"dora_scale": torch.ones(24)}, r"of a method other than LoRA: .*\.dora_scale \(DoRA\)"),
        ({"hada_w1_a": torch.ones(24)}, r"\(LoHa\)"),
        ({"lokr_w1": torch.ones(24)}, r"\(LoKr\)"),
        ({"lora_mid__weight": torch.ones(24)}, r"\(LoCon\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tmp_path: Path, base: Tensors, changes: dict[str, Tensor | None], problem: str
) -> None:
    """Halves of pairs, shapes and ranks that disagree, odd alphas, other methods: the key is in the error."""
    file = save(tmp_path / "x.safetensors", one(base, **changes))
    with pytest.raises(BadCheckpoint, match=rf"^LoRA x\.safetensors.*{problem}"):
        read_lora(file, "transformer", shapes(base))


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.7.self_attn.q.lora_down.weight", "diffusion_model.blocks.0.self_attn.q",
        "diffusion_model.blocks.0.self_attn.q.lora_down.bias", "lora_unet_blocks_0_self_attn_z.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text_encoder.shared.lora_A.weight",
        "blocks.0.self_attn.norm_q.diff_b", "blocks.0.self_attn.q.diff_m",
    ],
)  # fmt: skip
def test_a_key_that_matches_nothing_is_named(tmp_path: Path, base: Tensors, key: str) -> None:
    """A block too many, no role, the text encoder's, a bias where there is none: none is left out in silence."""
    file = save(tmp_path / "x.safetensors", {**one(base), key: torch.ones(3, 24)})
    with pytest.raises(BadCheckpoint) as refused:
        read_lora(file, "transformer", shapes(base))
    assert str(refused.value) == (
        f"LoRA x.safetensors does not fit the model: 1 tensor is without a match in the model: {key}"
    )


def test_many_unmatched_keys_are_counted(tmp_path: Path, base: Tensors) -> None:
    """A file for another family: ten keys by name, the others by number."""
    file = save(tmp_path / "x.safetensors", {f"double_blocks.{i}.lora_A.weight": torch.ones(1) for i in range(25)})
    with pytest.raises(BadCheckpoint, match=r"25 tensors are without a match in the model: .* and 15 more$"):
        read_lora(file, "transformer", shapes(base))


def test_an_empty_file_or_one_of_another_kind_is_refused(tmp_path: Path, base: Tensors) -> None:
    """No tensors; a .pt file."""
    with pytest.raises(BadCheckpoint, match="has no tensors"):
        read_lora(save(tmp_path / "x.safetensors", {}), "transformer", shapes(base))
    with pytest.raises(BadCheckpoint, match=r"is not a \.safetensors file"):
        read_lora(tmp_path / "x.pt", "transformer", shapes(base))


def test_values_that_are_not_finite_are_refused_while_merging(tmp_path: Path, base: Tensors) -> None:
    """NaN in half of a pair, infinity in a difference: the file and the key are named, and nothing is bound."""
    checkpoint = save(tmp_path / "base.safetensors", base)
    up = torch.ones(24, 3, dtype=torch.bfloat16)
    up[5, 1] = float("nan")
    for key, value in (("lora_up__weight", up), ("diff_b", torch.full((24,), float("inf")))):
        lora = Lora(file=str(save(tmp_path / "x.safetensors", one(base, **{key: value}))), strength=0.5)
        module = build("transformer")
        with pytest.raises(BadCheckpoint) as refused:
            load_weights(module, a_component("transformer", checkpoint, loras=[lora]), dtype=lambda n: torch.float32)
        name = f"diffusion_model.blocks.0.self_attn.q.{key.replace('__', '.')}"
        assert str(refused.value) == f"LoRA x.safetensors: {name} has values that are not finite (NaN or infinity)"
        assert all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {}}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"transformer_2.lora_alpha": 6}, 1.0),
        ({}, 1.0),
    ],
)
def test_pefts_alpha_is_in_the_metadata(
    tmp_path: Path, base: Tensors, metadata: dict[str, object], scale: float
) -> None:
    """Diffusers writes PEFT's configuration beside the tensors: its alpha counts for modules that have none, and
    for whichever expert a file with one prefix is given."""
    text = json.dumps(metadata)
    file = save(tmp_path / "x.safetensors", pairs(base, FORMATS["diffusers"]), lora_adapter_metadata=text)
    for component in ("transformer", "transformer_2"):
        deltas = read_lora(file, component, shapes(base))
        assert [delta.scale for delta in deltas] == pytest.approx([scale] * len(TARGETS))


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [('{"transformer.use_dora": true}', "uses use_dora"), ('{"alpha_pattern": {"to_q": 3}}', "uses alpha_pattern"),
     ("[", "broken lora_adapter_metadata"), ('{"a": ' + "[" * 100_000, "broken lora_adapter_metadata"),
     ('{"lora_alpha": 1e300}', "lora_adapter_metadata scales by"),
     ('{"lora_alpha": "x"}', "broken lora_adapter_metadata")],
)  # fmt: skip
def test_metadata_that_would_change_the_result_is_refused(
    tmp_path: Path, base: Tensors, metadata: str, problem: str
) -> None:
    """What we would get wrong, or cannot read."""
    file = save(tmp_path / "x.safetensors", pairs(base, FORMATS["diffusers"]), lora_adapter_metadata=metadata)
    with pytest.raises(BadCheckpoint, match=problem):
        read_lora(file, "transformer", shapes(base))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_alpha_may_have_any_dtype(tmp_path: Path, base: Tensors, dtype: torch.dtype) -> None:
    """One number, as a scalar or a vector of one."""
    for shape in ((), (1,)):
        file = save(tmp_path / "x.safetensors", one(base, alpha=torch.full(shape, 6, dtype=dtype)))
        (delta,) = read_lora(file, "transformer", shapes(base))
        assert delta.scale == 2.0


def test_an_alpha_of_a_terabyte_is_not_read(tmp_path: Path, base: Tensors) -> None:
    """A file that is a hole: the shape is wrong, which its header says."""
    stored = {"lora_down.weight": (3, 24), "lora_up.weight": (24, 3), "alpha": (1 << 38,)}
    write_hole(
        tmp_path / "x.safetensors",
        {f"blocks.0.self_attn.q.{key}": shape for key, shape in stored.items()},
        "F32",
    )
    with pytest.raises(BadCheckpoint, match=r"alpha must be one number, got F32 \[274877906944\]"):
        read_lora(tmp_path / "x.safetensors", "transformer", shapes(base))


def test_a_delta_names_the_bytes(tmp_path: Path, base: Tensors) -> None:
    """What is read of a file before weights are: where pairs and differences are, with our names, without values."""
    diff = torch.zeros(base["proj_out.bias"].shape)
    file = save(tmp_path / "x.safetensors", {**one(base), "head.head.diff_b": diff})
    pair_of, difference = read_lora(file, "transformer", shapes(base))
    assert isinstance(pair_of, Delta)
    assert isinstance(difference.diff, TensorEntry)
    assert [pair_of.target, difference.target] == ["blocks.0.attn1.to_q.weight", "proj_out.bias"]
    entries = list(itertools.chain((pair_of.down, pair_of.up), (difference.diff,)))
    assert [entry.size for entry in entries if entry] == [3 * 24 * 4, 24 * 3 * 4, diff.nbytes]
