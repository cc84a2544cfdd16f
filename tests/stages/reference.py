"""Diffusers' and transformers' objects over the weights of a checkpoint and the noise levels of a request: what the
stages are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from engine.params import ModelParams
from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from stages.models.text_encoder import ALIASES
from stages.solvers import Schedule


def make_scheduler(schedule: Schedule, dtype: torch.dtype = torch.float32) -> Any:
    """Diffusers' scheduler for this solver, which has these sigmas and timesteps whatever it is asked for: its own grid
    of UniPC is not the original's (since 0.37)."""
    base: Any
    settings: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    match schedule.solver:
        case "unipc":
            base = UniPCMultistepScheduler
        case "dpm++":
            base = DPMSolverMultistepScheduler
        case "euler":
            base, settings = FlowMatchEulerDiscreteScheduler, {}

    class OnGrid(base):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            assert num_inference_steps == schedule.steps
            self.sigmas = torch.tensor(schedule.sigmas, dtype=dtype)
            # Whole numbers, in a dtype that Euler takes too.
            self.timesteps = torch.tensor(schedule.timesteps, dtype=dtype)

    return OnGrid(**settings)


def make_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer file in transformers' class, which pads and truncates as the original's."""
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **names)


def make_components(checkpoint: Path, model: ModelParams) -> dict[str, Any]:
    """The arguments of Diffusers' pipelines but the scheduler, by name, with the weights of the checkpoint."""
    makers: dict[str, Any] = {
        "text_encoder": lambda: make_text_encoder(model.text_encoder),
        "image_encoder": lambda: make_image_encoder(model.image_encoder),
        "transformer": lambda: make_transformer(model.transformer),
        "transformer_2": lambda: make_transformer(model.transformer),
        "vae": lambda: make_vae(model.vae),
    }
    parts: dict[str, Any] = {name: load(makers[name](), checkpoint / name) for name in model.components}
    if model.image_encoder is not None:
        size = model.image_encoder.image_size
        parts["image_processor"] = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    return parts | {"tokenizer": make_tokenizer(checkpoint / "tokenizer" / "tokenizer.json")}


def load(module: nn.Module, directory: Path) -> nn.Module:
    state = {k: v.float() for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    expected = module.state_dict().keys()
    state |= {alias: state[name] for alias, name in ALIASES.items() if alias in expected}
    module.load_state_dict(state, strict=True)
    return module.eval().requires_grad_(False)


def make_transformer(config: TransformerConfig) -> WanTransformer3DModel:
    numbers = {name: getattr(config, name) for name in config.__struct_fields__ if name != "text_len"}
    added = config.dim if config.image_dim is not None else None
    return WanTransformer3DModel(**numbers, added_kv_proj_dim=added)


def make_vae(config: VaeConfig) -> AutoencoderKLWan:
    numbers: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))  # lists, not tuples
    patch, downsample = numbers.pop("patch_size"), numbers.pop("temporal_downsample")
    channels = 3 * patch**2
    return AutoencoderKLWan(
        **numbers,
        temperal_downsample=downsample,
        patch_size=patch if patch > 1 else None,
        in_channels=channels,
        out_channels=channels,
        scale_factor_temporal=config.temporal_stride,
        scale_factor_spatial=config.spatial_stride,
    )


def make_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    numbers = {name: getattr(config, name) for name in config.__struct_fields__}
    return UMT5EncoderModel(UMT5Config(**numbers, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()


def make_image_encoder(config: ImageEncoderConfig | None) -> CLIPVisionModel:
    assert config is not None
    return CLIPVisionModel(CLIPVisionConfig(**msgspec.to_builtins(config), hidden_act="gelu"))
