"""Tiny networks with all the tensors of real ones, and writers of checkpoints in the three layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hotreload.names import to_original
from ipc.architecture import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VaeConfig
from ipc.messages.weights import Component, Lora, Naming
from stages.models import text_encoder
from stages.models.image_encoder import ImageEncoder
from stages.models.transformer import WanTransformer
from stages.models.vae import WanVae

Tensors = dict[str, Tensor]

ALL = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae")
CLIP_WHOLE = ("visual.post_norm.weight", "visual.head", "textual.model.embeddings.word_embeddings.weight", "log_scale")
"""Some of the tensors that a CLIP file has and the image encoder does not."""


def transformer_config(**changes: Any) -> TransformerConfig:
    tiny: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "text_dim": 16,
        "freq_dim": 16, "in_channels": 4, "out_channels": 4, "text_len": 8,
    }  # fmt: skip
    return TransformerConfig(**(tiny | changes))


def build(component: str, *, residual: bool = False, image_dim: int | None = None) -> nn.Module:
    """A network on the meta device."""
    with torch.device("meta"):
        match component:
            case "text_encoder":
                config = TextEncoderConfig(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
                return text_encoder.build(config)
            case "image_encoder":
                return ImageEncoder(
                    ImageEncoderConfig(
                        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=28
                    )
                )
            case "vae" if residual:
                return WanVae(VaeConfig(base_dim=8, decoder_base_dim=16, z_dim=4, latents_mean=(0.0,) * 4,
                              latents_std=(1.0,) * 4, is_residual=True, patch_size=2))  # fmt: skip
            case "vae":
                return WanVae(VaeConfig(base_dim=8, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4))
            case _:
                return WanTransformer(transformer_config(image_dim=image_dim))


def random_tensors(module: nn.Module, seed: int = 1) -> Tensors:
    """float32 values for all tensors of a module, once each."""
    generator = torch.Generator().manual_seed(seed)
    names = {name: t for name, t in module.state_dict().items() if name not in text_encoder.ALIASES}
    return {name: torch.randn(t.shape, generator=generator) for name, t in names.items()}


def networks(names: tuple[str, ...], *, residual: bool = False, image_dim: int | None = None) -> dict[str, Tensors]:
    """Components -> their tensors."""
    built = {name: build(name, residual=residual, image_dim=image_dim) for name in names}
    return {name: random_tensors(module, seed) for seed, (name, module) in enumerate(built.items())}


def originals(component: str, tensors: Mapping[str, Tensor], *, residual: bool = False) -> Tensors:
    """The tensors as the Wan repositories store them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {
        name: torch.cat([tensors[part].flatten() for part in parts]).view(shape)
        for name, shape, parts in to_original(component, shapes, residual=residual).values()
    }


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt", **metadata}
    )
    return path


def save_shards(
    directory: Path, stem: str, tensors: Mapping[str, Tensor], count: int = 3, suffix: str = ""
) -> list[Path]:
    """Shards and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-{i + 1:05}-of-{count:05}{suffix}.safetensors" for i in range(count)]
    weight_map = {tensor: names[i % count] for i, tensor in enumerate(tensors)}
    for name in names:
        save(directory / name, {tensor: tensors[tensor] for tensor, file in weight_map.items() if file == name})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return [directory / name for name in names]


def write_tokenizer(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def with_unused(component: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """As Diffusers and transformers (before 5) save it: with what of CLIP no one uses."""
    if component != "image_encoder":
        return dict(tensors)
    last = {n.replace("layers.0.", "layers.2."): t.clone() for n, t in tensors.items() if ".layers.0." in n}
    unused = ("vision_model.post_layernorm.weight", "visual_projection.weight", "text_model.final_layer_norm.bias")
    ids = {"vision_model.embeddings.position_ids": torch.arange(5)}
    return {**tensors, **last, **{name: torch.ones(2) for name in unused}, **ids}


def write_diffusers(directory: Path, content: Mapping[str, Tensors]) -> Path:
    for component, tensors in content.items():
        stem = "model" if component.endswith("encoder") else "diffusion_pytorch_model"
        save(directory / component / f"{stem}.safetensors", with_unused(component, tensors))
    write_tokenizer(directory / "tokenizer" / "tokenizer.json")
    return directory


def write_original(directory: Path, content: Mapping[str, Tensors], *, residual: bool = False) -> Path:
    files = {
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "vae": "Wan2.2_VAE.pth" if residual else "Wan2.1_VAE.pth",
    }
    for component, tensors in content.items():
        if component in files:
            directory.mkdir(parents=True, exist_ok=True)
            stored = originals(component, tensors, residual=residual)
            if component == "image_encoder":
                last = {n.replace("former.0.", "former.2."): t for n, t in stored.items() if "former.0." in n}
                stored |= last | {name: torch.ones(2) for name in CLIP_WHOLE}
            torch.save(stored, directory / files[component])
        else:
            expert = "high_noise_model" if component == "transformer" else "low_noise_model"
            save_shards(
                directory / (expert if "transformer_2" in content else ""),
                "diffusion_pytorch_model",
                originals(component, tensors),
            )
    write_tokenizer(directory / "google" / "umt5-xxl" / "tokenizer.json")
    return directory


def write_comfyui(
    directory: Path, content: Mapping[str, Tensors], *, residual: bool = False, prefix: str = "", flat: bool = False
) -> Path:
    two = "transformer_2" in content
    files = {
        "text_encoder": "text_encoders/umt5_xxl_fp16.safetensors",
        "image_encoder": "clip_vision/clip_vision_h.safetensors",
        "vae": "vae/wan_2.1_vae.safetensors",
        "transformer": f"diffusion_models/wan_{'high_noise_' if two else ''}14B_fp16.safetensors",
        "transformer_2": "diffusion_models/wan_low_noise_14B_fp16.safetensors",
    }
    for component, tensors in content.items():
        stored = with_unused(component, tensors)
        if component == "text_encoder":
            stored["spiece_model"] = torch.zeros(7, dtype=torch.uint8)
        elif component != "image_encoder":
            stored = originals(component, tensors, residual=residual)
        if component.startswith("transformer"):
            stored = {prefix + name: tensor for name, tensor in stored.items()}
        file = Path(files[component])
        save(directory / (file.name if flat else file), stored)
    write_tokenizer(directory / "tokenizer.json")
    return directory


def a_component(name: str, *files: Path, naming: Naming = "diffusers", loras: list[Lora] | None = None) -> Component:
    return Component(name=name, files=[str(file) for file in files], naming=naming, loras=loras or [])
