"""Writes a checkpoint with random weights, of any known model, in any of the layouts that people have.

    python -m tools.make_checkpoint wan2.1-t2v-1.3b /data/random --layout original --dtype bfloat16
    python -m tools.make_checkpoint wan2.2-t2v-a14b /tmp/tiny --layout comfyui --shrink
    python -m tools.make_checkpoint wan-demo /tmp/demo --layout comfyui --from configs/demo

The same model and seed give the same values in every layout and size of shard. `--shrink` makes a tiny model of the
same structure and writes its parameters beside the directory, as DIR.yaml. An engine serves it only where that file has
taken the place of configs/models/MODEL.yaml; do that in a clone of its own, with the engine started from there:

    cp /tmp/tiny.yaml configs/models/wan2.2-t2v-a14b.yaml
    python -m engine serve --model wan2.2-t2v-a14b --checkpoint /tmp/tiny

`--from` takes the weights of a Diffusers directory instead. The tokenizer is the demo model's: every model's vocabulary
has its ids.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from engine.models import CONFIGS, list_models, load_model
from engine.params import ModelParams
from hotreload.names import to_original
from tools import checkpoint_documents as documents
from tools.checkpoint_files import DTYPES, FileTensor, write_json, write_pth, write_safetensors, write_sharded
from tools.random_weights import RandomWeights

Layout = Literal["diffusers", "original", "comfyui"]
Shape = tuple[int, ...]

SHARD_BYTES: dict[Layout, int] = {"diffusers": 5_000_000_000, "original": 9_900_000_000, "comfyui": 1 << 62}
"""Of the public repositories; ComfyUI's files are single."""
TOKENIZER = CONFIGS / "demo" / "tokenizer"
PREFIX = "model.diffusion_model."
"""Of the transformer's names in some of ComfyUI's files."""
COMFYUI_NAMES = {
    "wan2.1-t2v-1.3b": "wan2.1_t2v_1.3B", "wan2.1-t2v-14b": "wan2.1_t2v_14B", "wan2.2-ti2v-5b": "wan2.2_ti2v_5B",
    "wan2.1-i2v-14b-480p": "wan2.1_i2v_480p_14B", "wan2.1-i2v-14b-720p": "wan2.1_i2v_720p_14B",
    "wan2.2-t2v-a14b": "wan2.2_t2v_{noise}_noise_14B", "wan2.2-i2v-a14b": "wan2.2_i2v_{noise}_noise_14B",
}  # fmt: skip
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Source(NamedTuple):
    """Where values come from: the tensors of each component by their Diffusers names, and their values."""

    tables: Mapping[str, Mapping[str, Shape]]
    stretches: Callable[[str, str, torch.dtype], Iterable[Tensor]]
    """(component, name, dtype) -> the values in row-major order, as flat tensors."""


class Plan(NamedTuple):
    """What is written, and how."""

    model: ModelParams
    source: Source
    dtypes: Mapping[str, torch.dtype]
    """Of the components to write."""
    shard_bytes: int
    prefix: str
    """Of the transformer's names in ComfyUI's layout."""
    twins: bool
    """The second expert's files are the first one's, linked."""

    def tensors(self, component: str) -> list[FileTensor]:
        """A component's tensors by their Diffusers names."""
        return [self._tensor(component, n, s, (n,)) for n, s in self.source.tables[component].items()]

    def originals(self, component: str) -> list[FileTensor]:
        """A component's tensors by the names of the Wan repositories."""
        table = {n: s for n, s in self.source.tables[component].items() if "post_layernorm" not in n}
        originals = to_original(component, table, residual=self.model.vae.is_residual)
        return [self._tensor(component, *original) for original in originals.values()]

    def _tensor(self, component: str, name: str, shape: Shape, parts: tuple[str, ...]) -> FileTensor:
        dtype, stretches = self.dtypes[component], self.source.stretches

        def values() -> Iterator[Tensor]:
            for part in parts:
                yield from stretches(component, part, dtype)

        return FileTensor(name, shape, dtype, values)


def make_checkpoint(
    model: ModelParams,
    directory: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    only: tuple[str, ...] | None = None,
    shard_bytes: int | None = None,
    source: Source | None = None,
    prefix: str = "",
    twins: bool = False,
) -> None:
    """Write the components of `only` (None: all) into `directory`, in `dtype` (None: those of the public files)."""
    components = model.components if only is None else only
    unknown = [name for name in components if name not in model.components]
    if unknown:
        raise ValueError(f"{model.name} has no {', '.join(unknown)}; its components: {', '.join(model.components)}")
    plan = Plan(
        model=model,
        source=source or random_source(model, seed),
        dtypes={name: dtype or usual_dtype(model, layout, name) for name in components},
        shard_bytes=shard_bytes or SHARD_BYTES[layout],
        prefix=prefix,
        twins=twins,
    )
    write = {"diffusers": write_diffusers, "original": write_original, "comfyui": write_comfyui}
    write[layout](plan, directory)


def usual_dtype(model: ModelParams, layout: Layout, component: str) -> torch.dtype:
    """What the public files of this layout have."""
    if layout == "comfyui":
        return torch.bfloat16
    half = component == "text_encoder" and (layout == "original" or model.family == "wan2.2")
    return torch.bfloat16 if half else torch.float32


def random_source(model: ModelParams, seed: int = 0) -> Source:
    """Random weights of the model's networks."""
    weights = RandomWeights(seed)
    tables = {component: table_of(model, component) for component in model.components}
    return Source(tables, lambda c, name, dtype: weights.stretches(c, name, tables[c][name], dtype))


def directory_source(directory: Path, components: Iterable[str]) -> Source:
    """The weights in a Diffusers directory."""
    files: dict[tuple[str, str], Any] = {}
    for component in components:
        for path in sorted((directory / component).glob("*.safetensors")):
            opened = safe_open(path, framework="pt")
            files |= {(component, name): opened for name in opened.keys()}  # noqa: SIM118
    tables: dict[str, dict[str, Shape]] = {component: {} for component in components}
    for (component, name), file in files.items():
        tables[component][name] = tuple(file.get_slice(name).get_shape())
    return Source(tables, lambda c, name, dtype: [files[c, name].get_tensor(name).to(dtype).flatten()])


def table_of(model: ModelParams, component: str) -> dict[str, Shape]:
    """A network's tensors by their Diffusers names; one that has two names, by the first."""
    with torch.device("meta"):
        state = network(model, component).state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    base = "vision_model." if component == "image_encoder" else ""
    return {base + name: tuple(tensor.shape) for name, tensor in state.items() if first[id(tensor)] == name}


def network(model: ModelParams, component: str) -> nn.Module:
    """The module whose tensors a component has."""
    from stages.models.text_encoder import build
    from stages.models.transformer import WanTransformer
    from stages.models.vae import WanVae

    match component:
        case "text_encoder":
            return build(model.text_encoder)
        case "vae":
            return WanVae(model.vae)
        case "image_encoder":
            from transformers import CLIPVisionConfig, CLIPVisionModel

            assert model.image_encoder is not None, f"{model.name} has no image encoder"
            return CLIPVisionModel(CLIPVisionConfig(**msgspec.to_builtins(model.image_encoder)))
    return WanTransformer(model.transformer)


def write_diffusers(plan: Plan, directory: Path) -> None:
    """model_index.json, and a directory with config.json and shards per component."""
    model = plan.model
    configs = {
        "text_encoder": documents.text_encoder(model.text_encoder), "vae": documents.vae(model.vae),
        "transformer": documents.transformer(model.transformer),
        "transformer_2": documents.transformer(model.transformer),
    }  # fmt: skip
    if model.image_encoder is not None:
        configs["image_encoder"] = documents.image_encoder(model.image_encoder)
        processor = documents.image_processor(model.image_encoder)
        write_json(directory / "image_processor" / "preprocessor_config.json", processor)
    write_json(directory / "model_index.json", documents.model_index(model))
    write_json(directory / "scheduler" / "scheduler_config.json", documents.scheduler(model.defaults.flow_shift))
    shutil.copytree(TOKENIZER, directory / "tokenizer", dirs_exist_ok=True)
    for component in plan.dtypes:
        folder = directory / component
        write_json(folder / "config.json", configs[component])
        if component == "transformer_2" and plan.twins:
            link_files(directory / "transformer", folder)
            continue
        stem = "model" if component.endswith("encoder") else "diffusion_pytorch_model"
        write_sharded(folder, stem, plan.tensors(component), plan.shard_bytes)


def write_original(plan: Plan, directory: Path) -> None:
    """The Wan repositories: shards and config.json of the transformer, the other networks as `.pth`."""
    version = "2.2" if plan.model.vae.is_residual else "2.1"
    pickled = {
        "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "umt5-xxl-enc-bf16"),
        "vae": (f"Wan{version}_VAE.pth", "wanx_vae"),
        "image_encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "clip"),
    }
    two = plan.model.boundary is not None
    folders = {"transformer": "high_noise_model" if two else ".", "transformer_2": "low_noise_model"}
    shutil.copytree(TOKENIZER, directory / "google" / "umt5-xxl", dirs_exist_ok=True)
    for component in plan.dtypes:
        if component in pickled:
            file, root = pickled[component]
            extra = clip_text_tower(plan) if component == "image_encoder" else []
            write_pth(directory / file, root, plan.originals(component) + extra)
            continue
        folder = directory / folders[component]
        write_json(folder / "config.json", documents.original_config(plan.model))
        if component == "transformer_2" and plan.twins:
            link_files(directory / folders["transformer"], folder)
        else:
            write_sharded(folder, "diffusion_pytorch_model", plan.originals(component), plan.shard_bytes)


def clip_text_tower(plan: Plan) -> list[FileTensor]:
    """Tensors of the CLIP file that no video model reads: scale, head, last norm and (a part of) the text tower."""
    assert plan.model.image_encoder is not None
    width = plan.model.image_encoder.hidden_size
    shapes: dict[str, Shape] = {
        "log_scale": (), "visual.head": (width, 16), "visual.post_norm.weight": (width,),
        "textual.token_embedding.weight": (32, width), "textual.norm.bias": (width,),
    }  # fmt: skip
    tensors = {name: torch.ones(shape, dtype=plan.dtypes["image_encoder"]) for name, shape in shapes.items()}
    return [FileTensor(n, tuple(t.shape), t.dtype, functools.partial(list, [t])) for n, t in tensors.items()]


def write_comfyui(plan: Plan, directory: Path) -> None:
    """A single file per network, in the folders that ComfyUI looks into; the tokenizer beside them."""
    model = plan.model
    stem = COMFYUI_NAMES.get(model.name, model.name + "_{noise}_noise" * (model.boundary is not None))
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER / "tokenizer.json", directory)
    for component, dtype in plan.dtypes.items():
        short = SHORT[dtype]
        match component:
            case "text_encoder":
                pieces = FileTensor("spiece_model", (64,), torch.uint8, lambda: [torch.arange(64, dtype=torch.uint8)])
                write_safetensors(
                    directory / "text_encoders" / f"umt5_xxl_{short}.safetensors", [*plan.tensors(component), pieces]
                )
            case "vae":
                name = "wan2.2_vae" if model.vae.is_residual else "wan_2.1_vae"
                write_safetensors(directory / "vae" / f"{name}.safetensors", plan.originals(component))
            case "image_encoder":
                file = directory / "clip_vision" / "clip_vision_h.safetensors"
                write_safetensors(file, plan.tensors(component))
            case _:
                noise = "low" if component == "transformer_2" else "high"
                file = directory / "diffusion_models" / f"{stem.format(noise=noise)}_{short}.safetensors"
                if component == "transformer_2" and plan.twins:
                    os.link(file.with_name(file.name.replace("low", "high")), file)
                    continue
                tensors = [t._replace(name=plan.prefix + t.name) for t in plan.originals(component)]
                write_safetensors(file, tensors)


def link_files(source: Path, target: Path) -> None:
    """Hard links in `target` to the weights (and the index) in `source`."""
    for file in source.glob("diffusion_pytorch_model*"):
        os.link(file, target / file.name)


def shrink(model: ModelParams) -> ModelParams:
    """A tiny model of the same structure: as many kinds of tensors under the same names, fewer blocks, small widths."""
    replace = msgspec.structs.replace
    image_encoder = model.image_encoder
    if image_encoder is not None:
        image_encoder = replace(
            image_encoder,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=56,
        )
    transformer = replace(
        model.transformer, num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=96, text_dim=32,
        freq_dim=32, image_dim=None if image_encoder is None else image_encoder.hidden_size,
    )  # fmt: skip
    vae = replace(model.vae, base_dim=8, decoder_base_dim=None if model.vae.decoder_base_dim is None else 16)
    text_encoder = replace(model.text_encoder, vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return replace(
        model, transformer=transformer, vae=vae, text_encoder=text_encoder, image_encoder=image_encoder,
        defaults=replace(model.defaults, height=64, width=96, num_frames=9, steps=4),
        limits=replace(model.limits, max_pixels=128 * 96, max_frames=17),
    )  # fmt: skip


def write_params(model: ModelParams, path: Path) -> None:
    """A model's YAML, as in `configs/models/`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(msgspec.to_builtins(model), allow_unicode=True, sort_keys=False))


def bytes_below(directory: Path) -> int:
    """Of the files of a directory, each counted once however many names it has."""
    files = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum({status.st_ino: status.st_size for status in files}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list_models())
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layout", choices=get_args(Layout), default="diffusers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="[as the public files]")
    parser.add_argument("--shrink", action="store_true", help="a tiny model of the same structure")
    parser.add_argument("--shard-bytes", type=int, help="most bytes of a shard [as the public files]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="components to write, with commas between [all]")
    parser.add_argument("--prefix", action="store_true", help=f"ComfyUI: transformer names start with {PREFIX}")
    parser.add_argument("--twins", action="store_true", help="link the second expert's files to the first one's")
    parser.add_argument("--from", dest="source", type=Path, help="a Diffusers directory to take the weights from")
    args = parser.parse_args()
    model = shrink(load_model(args.model)) if args.shrink else load_model(args.model)
    only = tuple(args.only.split(",")) if args.only else None
    began = time.perf_counter()
    make_checkpoint(
        model, args.directory, args.layout, dtype=DTYPES[args.dtype] if args.dtype else None, seed=args.seed, only=only,
        shard_bytes=args.shard_bytes, prefix=PREFIX if args.prefix else "", twins=args.twins,
        source=directory_source(args.source, only or model.components) if args.source else None,
    )  # fmt: skip
    if args.shrink:
        write_params(model, args.directory.with_name(args.directory.name + ".yaml"))
    seconds, size = time.perf_counter() - began, bytes_below(args.directory) / 1e9
    print(
        f"{args.directory}: {model.name}, {args.layout}, {size:.2f} GB in {seconds:.1f} s ({size / seconds:.2f} GB/s)"
    )


if __name__ == "__main__":
    main()
