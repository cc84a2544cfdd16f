"""Original names and ours, both ways, against the lists of the Wan repositories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.models import list_models, load_model
from hotreload.names import original_name, our_name, to_original, to_ours
from hotreload.safetensors_file import TensorEntry
from hotreload.tables import transformer_traits
from ipc.errors import BadCheckpoint
from stages.models.transformer import WanTransformer
from stages.models.vae import WanVae
from tests.hotreload.tiny import build

FACTS = json.loads((Path(__file__).parent / "original_names.json").read_text())
BARE = ("modulation", "emb_pos")
"""Parameters that are no module's."""


def entries(shapes: dict[str, tuple[int, ...]]) -> list[TensorEntry]:
    """One byte per number, one after another."""
    found, offset = [], 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        found.append(TensorEntry(name, "U8", shape, Path("x.pth"), offset, size))
        offset += size
    return found


@pytest.mark.parametrize(
    ("facts", "component", "residual"),
    [("transformer", "transformer", False), ("vae21", "vae", False), ("vae22", "vae", True)],
)
def test_each_known_name_is_translated_both_ways(facts: str, component: str, residual: bool) -> None:
    """Every module of the lists, with weight, bias or gamma: ours is Diffusers' name, and the original comes back."""
    for original, ours in FACTS[facts].items():
        for leaf in ("",) if original.endswith(BARE) else (".weight", ".bias", ".gamma"):
            assert our_name(component, original + leaf) == ours + leaf
            assert original_name(component, ours + leaf, residual=residual) == original + leaf


@pytest.mark.parametrize("name", [name for name in list_models() if name != "wan-demo"])
def test_all_tensors_of_the_models_have_an_original_name(name: str) -> None:
    """Each official model at full size, on the meta device: as many original names as its repository has tensors, and
    from them our names again."""
    model = load_model(name)
    with torch.device("meta"):
        networks = {"transformer": WanTransformer(model.transformer), "vae": WanVae(model.vae)}
    kind = name.replace("-480p", "").replace("-720p", "")
    counts = {
        "transformer": FACTS["tensors"][kind],
        "vae": FACTS["tensors"]["vae22" if model.vae.is_residual else "vae21"],
    }
    for component, network in networks.items():
        names = list(network.state_dict())
        found = [original_name(component, ours, residual=model.vae.is_residual) for ours in names]
        assert None not in found
        assert len(set(found)) == len(names) == counts[component]
        assert [our_name(component, original) for original in found if original] == names


@pytest.mark.parametrize("component", ["text_encoder", "image_encoder", "transformer", "vae"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_component_comes_back_from_the_original_form(component: str, residual: bool) -> None:
    """Stored as the original does and read again: the same names, shapes and bytes."""
    network = build(component, residual=residual, image_dim=16)
    shapes = {n: tuple(t.shape) for n, t in network.state_dict().items() if n != "encoder.embed_tokens.weight"}
    stored = to_original(component, shapes, residual=residual)
    table = to_ours(
        component, "original", with_last_block(component, entries({o.name: o.shape for o in stored.values()}))
    )
    assert {name: entry.shape for name, entry in table.items()} == shapes
    for original in stored.values():
        parts = [table[part] for part in original.parts]
        assert [part.offset for part in parts[1:]] == [part.offset + part.size for part in parts[:-1]]
        assert sum(part.size for part in parts) == torch.Size(original.shape).numel()


def with_last_block(component: str, stored: list[TensorEntry]) -> list[TensorEntry]:
    last = [
        e._replace(name=e.name.replace("former.0.", "former.9.")) for e in stored if "visual.transformer.0." in e.name
    ]
    return [*stored, *last] if component == "image_encoder" else stored


def test_names_of_the_text_encoder_and_of_clip() -> None:
    """Pairs quoted from the two programs."""
    umt5 = {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
        "blocks.23.attn.o.weight": "encoder.block.23.layer.0.SelfAttention.o.weight",
        "blocks.3.pos_embedding.embedding.weight": (
            "encoder.block.3.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        "blocks.3.ffn.gate.0.weight": "encoder.block.3.layer.1.DenseReluDense.wi_0.weight",
        "blocks.3.ffn.fc1.weight": "encoder.block.3.layer.1.DenseReluDense.wi_1.weight",
        "blocks.3.ffn.fc2.weight": "encoder.block.3.layer.1.DenseReluDense.wo.weight",
    }
    clip = {
        "visual.cls_embedding": "vision_model.embeddings.class_embedding",
        "visual.pos_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.pre_norm.bias": "vision_model.pre_layrnorm.bias",
        "visual.transformer.7.mlp.2.bias": "vision_model.encoder.layers.7.mlp.fc2.bias",
        "visual.transformer.7.attn.proj.weight": "vision_model.encoder.layers.7.self_attn.out_proj.weight",
    }
    assert {name: our_name("text_encoder", name) for name in umt5} == umt5
    assert {name: our_name("image_encoder", name) for name in clip} == clip
    assert original_name("image_encoder", "vision_model.encoder.layers.7.self_attn.k_proj.bias") == (
        "visual.transformer.7.attn.to_qkv.bias"
    )


def test_clip_is_read_as_our_encoder_needs_it() -> None:
    """q, k and v are thirds of one tensor; leading ones go; the last block, the head and the text half are left out."""
    stored = entries(
        {
            "visual.cls_embedding": (1, 1, 4), "visual.pos_embedding": (1, 5, 4),
            "visual.transformer.0.attn.to_qkv.weight": (12, 4), "visual.transformer.0.attn.to_qkv.bias": (12,),
            "visual.transformer.1.attn.to_qkv.weight": (12, 4), "visual.transformer.1.norm1.weight": (4,),
            "visual.post_norm.weight": (4,), "visual.head": (4, 4), "textual.head.0.weight": (4,), "log_scale": (),
        }
    )  # fmt: skip
    table = to_ours("image_encoder", "original", stored)
    attention = "vision_model.encoder.layers.0.self_attn"
    assert {name: (e.shape, e.offset) for name, e in table.items()} == {
        "vision_model.embeddings.class_embedding": ((4,), 0),
        "vision_model.embeddings.position_embedding.weight": ((5, 4), 4),
        f"{attention}.q_proj.weight": ((4, 4), 24),
        f"{attention}.k_proj.weight": ((4, 4), 40),
        f"{attention}.v_proj.weight": ((4, 4), 56),
        f"{attention}.q_proj.bias": ((4,), 72),
        f"{attention}.k_proj.bias": ((4,), 76),
        f"{attention}.v_proj.bias": ((4,), 80),
    }


def test_clip_of_a_newer_transformers_is_known() -> None:
    """Saved without `vision_model.` in front: the same names."""
    stored = entries({"embeddings.class_embedding": (4,), "encoder.layers.0.mlp.fc1.bias": (4,),
                      "encoder.layers.1.mlp.fc1.bias": (4,), "post_layernorm.bias": (4,)})  # fmt: skip
    assert list(to_ours("image_encoder", "diffusers", stored)) == [
        "vision_model.embeddings.class_embedding",
        "vision_model.encoder.layers.0.mlp.fc1.bias",
    ]


def test_unknown_names_stay_and_prefixes_go() -> None:
    """A name that no rule knows is kept for the error message; ComfyUI's prefix is taken off."""
    stored = entries({"model.diffusion_model.head.head.bias": (4,), "model.diffusion_model.blocks.0.new.weight": (1,)})
    assert list(to_ours("transformer_2", "original", stored)) == ["proj_out.bias", "blocks.0.new.weight"]
    assert our_name("vae", "encoder.middle.1.to_qkv.gate") is None


def test_two_tensors_of_one_name_are_refused() -> None:
    """With and without the prefix: two values for one tensor."""
    stored = entries({"head.head.bias": (4,), "model.diffusion_model.head.head.bias": (4,)})
    with pytest.raises(BadCheckpoint, match=r"head\.head\.bias' is in both"):
        to_ours("transformer", "original", stored)


def test_what_the_originals_lack_cannot_be_translated() -> None:
    """A tensor that no Wan repository has: a fault of whoever writes one."""
    with pytest.raises(ValueError, match=r"no tensor 'blocks\.0\.gate'"):
        to_original("transformer", {"blocks.0.gate": (1,)})


def test_a_block_number_of_thousands_of_digits_is_no_block(tmp_path: Path) -> None:
    """Nor one in the digits of another script: such tensors are not of the model, and nothing else fails."""
    for number in ("9" * 250, "9" * 5000, "٣"):
        names = (f"vision_model.encoder.layers.{number}.x", "vision_model.encoder.layers.1.x", "vision_model.y")
        given = [TensorEntry(name, "F32", (1,), tmp_path, 0, 4) for name in names]
        assert set(to_ours("image_encoder", "diffusers", given)) == {names[0], names[2]}
        shapes = {"patch_embedding.weight": (8, 4, 1, 2, 2), "blocks.0.ffn.net.0.proj.weight": (9, 9),
                  "proj_out.weight": (16, 8), f"blocks.{number}.x": (1,)}  # fmt: skip
        table = {name: TensorEntry(name, "F32", shape, tmp_path, 0, 4) for name, shape in shapes.items()}
        assert transformer_traits(table).layers == 1
