"""Which files of a directory are a model's weights: found by looking, in any of three layouts (docs/checkpoints.md).

    diffusers   transformer/diffusion_pytorch_model.safetensors, text_encoder/..., tokenizer/tokenizer.json
    original    the Wan repositories: diffusion_pytorch_model-*.safetensors, models_t5_*.pth, Wan2.1_VAE.pth, google/...
    comfyui     single files, told apart by the tensors they name: diffusion_models/*.safetensors, vae/..., or flat

Only headers are read here, without torch, so that the supervisor can check a directory before it starts a process.
Every error is a `BadCheckpoint` that names files relative to the directory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from hotreload import comfyui
from hotreload.comfyui import Suits
from hotreload.shards import weight_files
from hotreload.shown import listed, shown
from hotreload.tables import check_archive, component_table, label_of, safetensors_only
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Component, Naming

Layout = Literal["diffusers", "original", "comfyui"]
DESCRIPTIONS: dict[Layout, str] = {
    "diffusers": "a Diffusers repository",
    "original": "a Wan repository",
    "comfyui": "ComfyUI files",
}
TOKENIZERS = ("tokenizer/tokenizer.json", "google/umt5-xxl/tokenizer.json", "tokenizer.json")
TOKENIZER_SOURCE = "https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B/resolve/main/google/umt5-xxl/tokenizer.json"
DIT_STEM = "diffusion_pytorch_model"
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""Directories of a Wan2.2-A14B repository."""
ORIGINAL_FILES = {
    "text_encoder": ("models_t5_*.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
    "image_encoder": ("models_clip_*.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
    "vae": ("Wan2.*_VAE.pth", "Wan2.1_VAE.pth (or Wan2.2_VAE.pth)"),
}
"""The pattern, and the name for errors."""
ORIGINAL_SIGNS = (
    *EXPERTS.values(), "models_t5_*", "models_clip_*", "Wan2.*_VAE.pth", f"{DIT_STEM}*.safetensors*",
)  # fmt: skip

Finder = Callable[[Path, str, tuple[str, ...], Suits | None], tuple[list[Path], Naming]]
"""(directory, component, all components of the model, which files are of the model) -> the component's files, and whose
names they use."""


class Checkpoint(NamedTuple):
    """A directory with all that a model needs."""

    layout: Layout
    tokenizer: Path
    components: dict[str, Component]


def open_checkpoint(directory: Path, components: tuple[str, ...], suits: Suits | None = None) -> Checkpoint:
    """Find `components` and the tokenizer in `directory`, and check that their files are whole. Reads no weights.

    `suits` tells, of several single files that could be a component, which is of the model.
    """
    directory = directory.absolute()
    layout = find_layout(directory)
    opened = {name: find_component(directory, layout, name, components, suits) for name in components}
    return Checkpoint(layout, find_tokenizer(directory), opened)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Files and directories that cannot be read are `BadCheckpoint`."""
    try:
        yield
    except OSError as error:
        name = shown(Path(error.filename).name) if isinstance(error.filename, str) else "a file"
        raise BadCheckpoint(f"the checkpoint cannot be read: {name}: {error.strerror}") from error


@reading()
def find_layout(directory: Path) -> Layout:
    """Which of the layouts a directory has."""
    if not directory.is_dir():
        raise BadCheckpoint("the checkpoint is not a directory")
    if not is_utf8(directory):
        raise BadCheckpoint("the path of the checkpoint is not UTF-8, as paths must be here; rename its directory")
    folders = ("transformer", "text_encoder")
    if (directory / "model_index.json").is_file() or any((directory / folder).is_dir() for folder in folders):
        return "diffusers"
    if any(True for sign in ORIGINAL_SIGNS for _ in directory.glob(sign)):
        return "original"
    if comfyui.list_files(directory):
        return "comfyui"
    raise BadCheckpoint(
        "the checkpoint is a directory without weights; expected a Diffusers repository (transformer/, text_encoder/, "
        f"vae/), a Wan repository ({DIT_STEM}*.safetensors, models_t5_*.pth, Wan2.1_VAE.pth), or ComfyUI files "
        "(diffusion_models/, text_encoders/, vae/)"
    )


@reading()
def find_component(
    directory: Path, layout: Layout, name: str, components: tuple[str, ...], suits: Suits | None = None
) -> Component:
    """One component, its files whole. Which files are a transformer's depends on all `components` of the model."""
    try:
        files, naming = FINDERS[layout](directory, name, components, suits)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{error} (the checkpoint looks like {DESCRIPTIONS[layout]})") from error
    for file in files:
        if not is_utf8(file):
            raise BadCheckpoint(f"{name}: the file name {file.name!r} is not UTF-8, as names must be here; rename it")
    component = Component(name=name, files=[str(file) for file in files], naming=naming)
    check_files(component)
    return component


def is_utf8(path: Path) -> bool:
    """It can be sent to a stage. Linux takes any bytes for a name, and Python has those that are no text as surrogates,
    which no message carries."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@reading()
def find_tokenizer(directory: Path) -> Path:
    """tokenizer.json of UMT5, wherever one of the layouts has it."""
    for name in TOKENIZERS:
        if (directory / name).is_file():
            return directory / name
    raise BadCheckpoint(f"the checkpoint lacks {TOKENIZERS[0]}: download {TOKENIZER_SOURCE} (17 MB) and put it there")


def check_files(component: Component) -> None:
    """Check that a component's files are whole, as far as that shows without reading weights or using torch."""
    component_table(safetensors_only(component))
    for file in map(Path, component.files):
        if file.suffix != ".safetensors":
            check_archive(file, label_of(component, file))


def _find_diffusers(
    directory: Path, name: str, components: tuple[str, ...], suits: Suits | None
) -> tuple[list[Path], Naming]:
    second = any((directory / "transformer_2").glob("*.safetensors"))
    if name == "transformer" and "transformer_2" not in components and second:
        raise BadCheckpoint(
            "the checkpoint has two experts, transformer/ and transformer_2/, but the model has one transformer; "
            "choose a Wan2.2-A14B model with --model"
        )
    return weight_files(directory, name, "model" if name.endswith("encoder") else DIT_STEM), "diffusers"


def _find_original(
    directory: Path, name: str, components: tuple[str, ...], suits: Suits | None
) -> tuple[list[Path], Naming]:
    return _original_files(directory, name, components), "original"


def _original_files(directory: Path, name: str, components: tuple[str, ...]) -> list[Path]:
    if name in ORIGINAL_FILES:
        pattern, wanted = ORIGINAL_FILES[name]
        files = sorted(directory.glob(pattern))
        if not files:
            raise BadCheckpoint(f"the checkpoint lacks {wanted}, the {name}")
        if len(files) > 1:
            raise BadCheckpoint(f"several files could be the {name}: {listed(shown(f.name) for f in files)}; leave one")
        return files
    experts = [folder for folder in EXPERTS.values() if (directory / folder).is_dir()]
    if "transformer_2" in components:
        if not experts:
            raise BadCheckpoint(
                f"the checkpoint lacks {EXPERTS[name]}/: the model has two experts, and the checkpoint one transformer "
                "or none; choose another model with --model"
            )
        return weight_files(directory, EXPERTS[name], DIT_STEM)
    if experts:
        raise BadCheckpoint(
            f"the checkpoint has experts ({', '.join(f'{folder}/' for folder in experts)}), but the model has one "
            "transformer; choose a Wan2.2-A14B model with --model"
        )
    return weight_files(directory, "", DIT_STEM)


FINDERS: dict[Layout, Finder] = {
    "diffusers": _find_diffusers,
    "original": _find_original,
    "comfyui": comfyui.find,
}
