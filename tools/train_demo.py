"""Train `wan-demo` from nothing: procedural clips, then the VAE, then transformer and text encoder, then revision 2.

    python -m tools.train_demo --work build/demo --stage vae
    python -m tools.train_demo --work build/demo --stage dit
    python -m tools.train_demo --work build/demo --stage style
    python -m tools.train_demo --work build/demo --stage export --out configs/demo

Each stage reads what earlier ones wrote to `--work` and writes float32 safetensors there; `--resume` trains on from the
stage's own. `--minutes` shortens a stage's phases in proportion: their learning rates then fall over
the time that is left. The recipe (`tools/demo_recipe.py`) and the seed reproduce the model, up to the GPU's order of
additions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from random import Random

import torch

from tools.demo_export import export
from tools.demo_networks import Networks, build, vae_config
from tools.demo_recipe import RECIPES, Recipe
from tools.demo_sampling import contact_sheet
from tools.demo_tokenizer import make_tokenizer, write_tokenizer
from tools.demo_training import Schedule, load_module, save_module
from tools.demo_transformer_training import train_transformer
from tools.demo_vae_training import make_pool, measure_statistics, reconstruct, train_vae, validate_vae

STAGES = ("vae", "dit", "style", "export")


def main() -> None:
    """Run one stage."""
    options = parse_options()
    torch.manual_seed(options.seed)
    if torch.device(options.device).type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    recipe = RECIPES[options.recipe]
    {"vae": vae_stage, "dit": dit_stage, "style": style_stage, "export": export_stage}[options.stage](options, recipe)
    print(f"{options.stage}: done in {time.monotonic() - started:.0f} s", flush=True)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints between stages")
    parser.add_argument("--out", type=Path, default=Path("configs/demo"), help="where export writes")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="time limit of the stage's training, shared by its phases")
    parser.add_argument("--phases", type=int, nargs="*", help="VAE phases to run, from 0 (default: all)")
    parser.add_argument("--resume", action="store_true", help="go on from this stage's own checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def vae_stage(options: argparse.Namespace, recipe: Recipe) -> None:
    """Train the VAE on both styles, measure latent statistics, print reconstruction quality."""
    networks = build(recipe.architecture).to(options.device)
    if options.resume:
        load_module(networks.vae, options.work / "vae.safetensors")
    generator = torch.Generator(options.device).manual_seed(options.seed)
    chosen = range(len(recipe.vae)) if options.phases is None else options.phases
    phases = [recipe.vae[number] for number in chosen]
    schedules = shorten([phase.schedule for phase in phases], options.minutes)
    for phase, schedule in zip(phases, schedules, strict=True):
        train_vae(networks.vae, dataclasses.replace(phase, schedule=schedule), generator)
        save_module(networks.vae, options.work / "vae.safetensors")
    mean, std = measure_statistics(networks.vae, recipe.statistics_clips, generator)
    held_out = torch.Generator(options.device).manual_seed(options.seed + 1)
    figures = validate_vae(networks.vae, recipe.validation_clips, held_out)
    print(json.dumps(figures), flush=True)
    frames = make_pool(12, held_out, held_out=True).frames
    pairs = torch.stack((frames, reconstruct(networks.vae, frames)), dim=1).flatten(0, 1)
    contact_sheet(pairs, ["drawn", "decoded"] * len(frames), options.work / "vae.png")
    document = {"latents_mean": mean, "latents_std": std, "figures": figures}
    (options.work / "vae.json").write_text(json.dumps(document, indent=2) + "\n")


def dit_stage(options: argparse.Namespace, recipe: Recipe) -> None:
    """Train transformer and text encoder together on the latents of the first style."""
    networks = load_networks(options, recipe)
    tokenizer = make_tokenizer(seed=options.seed)
    write_tokenizer(tokenizer, options.work / "tokenizer")
    if options.resume:
        load_module(networks.transformer, options.work / "transformer.safetensors")
        load_module(networks.text_encoder, options.work / "text_encoder.safetensors")
    (schedule,) = shorten([recipe.transformer.schedule], options.minutes)
    phase = dataclasses.replace(recipe.transformer, schedule=schedule)
    train_transformer(networks, tokenizer, phase, recipe.text_tokens, options.seed, Random(options.seed))
    save_module(networks.transformer, options.work / "transformer.safetensors")
    save_module(networks.text_encoder, options.work / "text_encoder.safetensors")


def style_stage(options: argparse.Namespace, recipe: Recipe) -> None:
    """Fine-tune the transformer on the second style: revision 2. The other networks stay as they are."""
    networks = load_networks(options, recipe)
    load_module(networks.text_encoder, options.work / "text_encoder.safetensors")
    name = "transformer-2" if options.resume else "transformer"
    load_module(networks.transformer, options.work / f"{name}.safetensors")
    (schedule,) = shorten([recipe.style.schedule], options.minutes)
    phase = dataclasses.replace(recipe.style, schedule=schedule)
    tokenizer = make_tokenizer(seed=options.seed)
    train_transformer(networks, tokenizer, phase, recipe.text_tokens, options.seed + 2, Random(options.seed + 2))
    save_module(networks.transformer, options.work / "transformer-2.safetensors")


def export_stage(options: argparse.Namespace, recipe: Recipe) -> None:
    """Write the Diffusers layout in float16."""
    networks = load_networks(dataclasses_namespace(options, device="cpu"), recipe)
    load_module(networks.text_encoder, options.work / "text_encoder.safetensors")
    write_tokenizer(make_tokenizer(seed=options.seed), options.out / "tokenizer")
    for name, folder in (("transformer", options.out), ("transformer-2", options.out / "revision-2")):
        load_module(networks.transformer, options.work / f"{name}.safetensors")
        export(networks, folder, only_transformer=name != "transformer")


def load_networks(options: argparse.Namespace, recipe: Recipe) -> Networks:
    """Networks with the trained VAE and its statistics; the rest freshly initialised."""
    statistics = json.loads((options.work / "vae.json").read_text())
    numbers = {name: getattr(recipe.architecture.vae, name) for name in ("base_dim", "dim_mult", "num_res_blocks")}
    vae = vae_config(tuple(statistics["latents_mean"]), tuple(statistics["latents_std"]), **numbers)
    networks = build(dataclasses.replace(recipe.architecture, vae=vae))
    load_module(networks.vae, options.work / "vae.safetensors")
    return networks.to(options.device)


def shorten(schedules: list[Schedule], minutes: float | None) -> list[Schedule]:
    """Scale time limits so that they add up to `minutes`."""
    if minutes is None:
        return schedules
    factor = minutes * 60 / sum(schedule.seconds for schedule in schedules)
    return [dataclasses.replace(schedule, seconds=schedule.seconds * factor) for schedule in schedules]


def dataclasses_namespace(options: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """A copy of the options with some replaced."""
    return argparse.Namespace(**{**vars(options), **changes})


if __name__ == "__main__":
    main()
