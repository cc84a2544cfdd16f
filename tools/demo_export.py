"""Writes and reads `wan-demo` as a Diffusers checkpoint directory in float16."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file

from ipc.architecture import TextEncoderConfig, TransformerConfig, VaeConfig
from tools.demo_networks import Architecture, Networks, build
from tools.demo_training import save_module

DIFFUSERS_VERSION = "0.42.1"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOW_SHIFT = 3.0


def export(networks: Networks, folder: Path, *, only_transformer: bool = False) -> None:
    """Write every component, or the transformer alone for a revision that shares the others."""
    _check_range(networks)
    save_module(networks.transformer, folder / "transformer" / WEIGHTS, torch.float16)
    _write_json(folder / "transformer" / "config.json", transformer_document(networks.transformer.config))
    if only_transformer:
        return
    save_module(networks.vae, folder / "vae" / WEIGHTS, torch.float16)
    _write_json(folder / "vae" / "config.json", vae_document(networks.vae.config))
    save_module(networks.text_encoder, folder / "text_encoder" / "model.safetensors", torch.float16)
    text = json.loads(networks.text_encoder.config.to_json_string(use_diff=True))
    _write_json(folder / "text_encoder" / "config.json", text | {"dtype": "float16"})
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
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


def transformer_document(config: TransformerConfig) -> dict[str, object]:
    """`config.json` of Diffusers' WanTransformer3DModel."""
    values = msgspec.to_builtins(config)
    del values["text_len"]
    return {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": DIFFUSERS_VERSION, **values, "image_dim": None,
        "added_kv_proj_dim": None, "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip


def vae_document(config: VaeConfig) -> dict[str, object]:
    """`config.json` of Diffusers' AutoencoderKLWan."""
    values = msgspec.to_builtins(config)
    values["temperal_downsample"] = values.pop("temporal_downsample")
    return {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": DIFFUSERS_VERSION, **values, "attn_scales": [],
        "dropout": 0.0,
    }  # fmt: skip


SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", "_diffusers_version": DIFFUSERS_VERSION, "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001, "disable_corrector": [], "dynamic_thresholding_ratio": 0.995, "final_sigmas_type": "zero",
    "flow_shift": FLOW_SHIFT, "lower_order_final": True, "num_train_timesteps": 1000, "predict_x0": True,
    "prediction_type": "flow_prediction", "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "solver_order": 2,
    "solver_p": None, "solver_type": "bh2", "steps_offset": 0, "thresholding": False, "timestep_spacing": "linspace",
    "trained_betas": None, "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}  # fmt: skip
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
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
    return msgspec.convert(
        {key: document[key] for key in kind.__struct_fields__ if key in document}, kind, strict=False
    )


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
