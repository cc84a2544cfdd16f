"""Sizes that are reckoned from the architecture, against the modules themselves."""

from __future__ import annotations

import re

import pytest

from engine.models import list_models, load_model
from engine.weight_sizes import (
    component_bytes,
    text_encoder_bytes,
    transformer_bytes,
    vae_bytes,
    vae_parameters,
)
from ipc.tensors import dtype_of
from stages.models.blueprint import build

CROSS = re.compile(r"\.attn2\.(to_k|to_v|norm_k|add_k_proj|add_v_proj|norm_added_k)\.")
"""What makes the keys and values of a request, and is not needed after that."""


def placed(model: str, component: str, dtype: str) -> dict[str, int]:
    """Tensor -> its bytes, as a stage binds it."""
    network = build(component, load_model(model))
    kind = network.dtype(dtype_of(dtype))
    return {name: tensor.numel() * kind(name).itemsize for name, tensor in network.tensors().items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", list_models())
def test_every_component_has_the_bytes_of_its_module(name: str, dtype: str) -> None:
    model = load_model(name)
    found = component_bytes(model, dtype)
    assert tuple(found) == model.components
    assert found == {component: sum(placed(name, component, dtype).values()) for component in model.components}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", list_models())
def test_the_parts_of_a_transformer(name: str, dtype: str) -> None:
    """Every block has the same bytes that steps read, and the same that only the keys and values of a request need."""
    found = transformer_bytes(load_model(name).transformer, dtype)
    tensors = placed(name, "transformer", dtype)
    for number in range(found.layers):
        block = {name: size for name, size in tensors.items() if name.startswith(f"blocks.{number}.")}
        assert found.cross == sum(size for name, size in block.items() if CROSS.search(name))
        assert found.block == sum(size for name, size in block.items() if not CROSS.search(name))
    embedder = {name: size for name, size in tensors.items() if name.startswith("condition_embedder.")}
    assert found.embedder == sum(embedder.values())
    assert found.rest == sum(size for n, size in tensors.items() if not n.startswith("blocks.") and n not in embedder)


@pytest.mark.parametrize("name", ["wan-demo", "wan2.1-t2v-14b"])
def test_the_parts_of_a_text_encoder(name: str) -> None:
    found, tensors = (
        text_encoder_bytes(load_model(name).text_encoder, "bfloat16"),
        placed(name, "text_encoder", "bfloat16"),
    )
    blocks = [sum(size for n, size in tensors.items() if f".block.{i}." in n) for i in range(found.layers)]
    assert blocks == [found.block] * found.layers
    assert found.embedding == tensors["shared.weight"]
    assert found.total == sum(tensors.values())


def test_a_block_of_the_14b_has_what_was_measured_to_travel() -> None:
    """598 MB, of 702 of the whole block: docs/results/offload-h100.txt has 23.92 GB for 40 of them."""
    found = transformer_bytes(load_model("wan2.1-t2v-14b").transformer, "bfloat16")
    assert round(found.block / 1e6) == 598 and round(found.cross / 1e6) == 105


def test_a_vae_is_float32() -> None:
    config = load_model("wan2.2-ti2v-5b").vae
    assert vae_bytes(config) == 4 * vae_parameters(config) == sum(placed("wan2.2-ti2v-5b", "vae", "bfloat16").values())
