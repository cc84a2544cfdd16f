"""Writes and reads `wan-demo` as a Diffusers checkpoint directory in float16."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file

from ipc.architecture import TextEncoderConfig, TransformerConfig, VaeConfig
from tools import checkpoint_documents as documents
from tools.demo_networks import Architecture, Networks, build
from tools.demo_training import save_module

WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOW_SHIFT = 3.0


def export(networks: Networks, folder: Path, *, only_transformer: bool = False) -> None:
    """Write every component, or the transformer alone for a revision that shares the others."""
    _check_range(networks)
    save_module(networks.transformer, folder / "transformer" / WEIGHTS, torch.float16)
    _write_json(folder / "transformer" / "config.json", documents.transformer(networks.transformer.config))
    if only_transformer:
        return
    save_module(networks.vae, folder / "vae" / WEIGHTS, torch.float16)
    _write_json(folder / "vae" / "config.json", documents.vae(networks.vae.config))
    save_module(networks.text_encoder, folder / "text_encoder" / "model.safetensors", torch.float16)
    text = json.loads(networks.text_encoder.config.to_json_string(use_diff=True))
    _write_json(folder / "text_encoder" / "config.json", text | {"dtype": "float16"})
    _write_json(folder / "scheduler" / "scheduler_config.json", documents.scheduler(FLOW_SHIFT))
    _write_json(folder / "model_index.json", MODEL_INDEX)


def load(folder: Path, architecture: Architecture, transformer_folder: Path | None = None) -> Networks:
    """Read a checkpoint directory into float32 networks; `transformer_folder` holds another revision's transformer."""
    networks = build(architecture)
    for name, module, file in (
        ("vae", networks.vae, WEIGHTS),
        ("text_encoder", networks.text_encoder, "model.safetensors"),
        ("transformer", networks.transformer, WEIGHTS),
    ):
        root = transformer_folder if name == "transformer" and transformer_folder else folder
        tensors = load_file(root / name / file)
        parameters = dict(module.named_parameters())
        if tensors.keys() != parameters.keys():
            raise ValueError(f"{root / name / file} does not fit: {sorted(tensors.keys() ^ parameters.keys())[:4]}")
        with torch.no_grad():
            for key, tensor in tensors.items():
                parameters[key].copy_(tensor)
    return networks


def architecture_of(folder: Path) -> Architecture:
    """The numbers in a checkpoint's `config.json` files."""
    documents = {
        name: json.loads((folder / name / "config.json").read_text()) for name in ("text_encoder", "transformer", "vae")
    }
    transformer = _known(TransformerConfig, documents["transformer"])
    vae = documents["vae"] | {"temporal_downsample": documents["vae"]["temperal_downsample"]}
    return Architecture(
        text_encoder=_known(TextEncoderConfig, documents["text_encoder"]),
        transformer=transformer,
        vae=_known(VaeConfig, vae),
    )


MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": documents.DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "boundary_ratio": None,
    "expand_timesteps": False,
}


def _check_range(networks: Networks) -> None:
    """Refuse weights that float16 cannot hold."""
    for module in (networks.transformer, networks.vae, networks.text_encoder):
        for name, parameter in module.named_parameters():
            peak = float(parameter.detach().abs().max())
            if not peak < torch.finfo(torch.float16).max:
                raise ValueError(f"{name} reaches {peak}, which float16 cannot hold")


def _known(kind: type[msgspec.Struct], document: dict[str, object]) -> msgspec.Struct:
    """The fields of `kind` in a document, where null means the default."""
    given = {key: value for key in kind.__struct_fields__ if (value := document.get(key)) is not None}
    return msgspec.convert(given, kind, strict=False)


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
