"""Checkpoints of full-size models that take no disk: real headers in front of a hole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from engine.models import CONFIGS
from engine.params import ModelParams
from ipc.messages.check import CheckAsked
from stages.models.blueprint import Blueprint, build

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def networks(model: ModelParams) -> dict[str, Blueprint]:
    """What a model's checkpoint must fit, by component."""
    asked = CheckAsked(
        wanted=[], components=[], transformer=model.transformer, vae=model.vae, text_encoder=model.text_encoder,
        image_encoder=model.image_encoder,
    )  # fmt: skip
    return {name: build(name, asked) for name in model.components}


def unused_block(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """CLIP's last block, which a checkpoint has and no model runs."""
    blocks = {key: shape for key, shape in shapes.items() if ".layers." in key}
    last = max(int(key.split(".layers.")[1].split(".")[0]) for key in blocks)
    mark = f".layers.{last}."
    return {k.replace(mark, f".layers.{last + 1}."): shape for k, shape in blocks.items() if mark in k}


def write_hole(path: Path, shapes: Mapping[str, Iterable[int]], dtype: str = "BF16") -> None:
    """A safetensors file with these tensors, all zero."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


def write_checkpoint(directory: Path, model: ModelParams, only: Iterable[str] | None = None) -> Path:
    """A Diffusers directory of a model; `only` some of its components."""
    for name, network in networks(model).items():
        if only is None or name in only:
            stem = "model" if name.endswith("encoder") else "diffusion_pytorch_model"
            shapes = {key: tuple(tensor.shape) for key, tensor in network.tensors().items()}
            if name == "image_encoder":
                shapes |= unused_block(shapes)
            write_hole(directory / name / f"{stem}.safetensors", shapes)
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "tokenizer" / "tokenizer.json").write_bytes((CONFIGS / "demo/tokenizer/tokenizer.json").read_bytes())
    return directory
