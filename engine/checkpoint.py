"""The operator's weights for a model: found, of the right model, with their LoRAs, before any process is started."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec

from engine.models import checkpoint_directory, existing_directory, known_models
from engine.params import ModelParams, SystemParams
from engine.roots import check_weights_root
from hotreload.checkpoint import Checkpoint, find_component, find_layout, open_checkpoint
from hotreload.comfyui import transformers
from hotreload.described import check_config
from hotreload.files import path_of_descriptor
from hotreload.given import check_given
from hotreload.lora_options import attach_loras, parse_lora
from hotreload.shown import shown
from hotreload.tables import (
    TransformerTraits,
    VaeTraits,
    component_table,
    safetensors_only,
    transformer_traits,
    vae_family,
    vae_traits,
)
from ipc.channel import MAX_MESSAGE_BYTES
from ipc.errors import BadCheckpoint, BadConfig
from ipc.messages.status import MergedLora
from ipc.messages.weights import Component

EXPERTS = ("transformer", "transformer_2")

MAX_PATHS_BYTES = MAX_MESSAGE_BYTES * 3 // 4
"""Of all files, in `Start`; the rest of it takes a few KiB."""


def open_model(model: ModelParams, params: SystemParams) -> Checkpoint:
    """All that `model` needs, from the operator's directory or what ships. Reads headers, no weights.

    Raises `BadCheckpoint` for what is missing, damaged or of another model, and says which one, and for a LoRA that
    does not fit; `BadConfig` for a directory that is not there or a `lora` that is not FILE:STRENGTH.
    """
    directory = checkpoint_directory(model, params.checkpoint)
    try:
        checkpoint = open_checkpoint(directory, model.components, functools.partial(suits, model))
    except BadCheckpoint as error:
        names = identify(directory)
        if not names or model.name in names:
            raise
        raise BadCheckpoint(f"{error}; {advice(names)}") from error
    if params.checkpoint is not None:  # what ships is where it is
        _check_root(directory, checkpoint.components.values(), params)
        check_weights_root("tokenizer", checkpoint.tokenizer, params.checkpoint_root)
    checkpoint = checkpoint._replace(components=_checked(checkpoint.components, model, params, directory))
    check_paths(checkpoint.components.values(), str(checkpoint.tokenizer))
    return checkpoint


def open_components(
    model: ModelParams, params: SystemParams, directory: Path, names: Collection[str]
) -> dict[str, Component]:
    """Some components of a model, by name, from a directory that need not hold the others; with the operator's LoRAs
    merged into the transformers. Raises as `open_model`, and `BadConfig` for a name that the model does not have."""
    if unknown := sorted(set(names) - set(model.components)):
        raise BadConfig(f"{model.name} has no {unknown[0]}; its components are {', '.join(model.components)}")
    directory = existing_directory(directory)
    layout = find_layout(directory)
    suitable = functools.partial(suits, model)
    found = {name: find_component(directory, layout, name, model.components, suitable) for name in names}
    _check_root(directory, found.values(), params)
    components = _checked(found, model, params, directory)
    check_paths(components.values())
    return components


def open_all_components(model: ModelParams, params: SystemParams, directory: Path) -> dict[str, Component]:
    """`open_components` for all of the model; `BadCheckpoint` says which there are, if some are."""
    try:
        return open_components(model, params, directory, model.components)
    except BadCheckpoint as error:
        there = [name for name in model.components if _can_be_opened(model, params, directory, name)]
        if not there or len(there) == len(model.components):
            raise
        only = " ".join(f"--component {name}" for name in there)
        raise BadCheckpoint(f"{error}; to change only what is there: {only}") from error


def _can_be_opened(model: ModelParams, params: SystemParams, directory: Path, name: str) -> bool:
    try:
        open_components(model, params, directory, [name])
    except (BadCheckpoint, BadConfig):
        return False
    return True


def given_component(model: ModelParams, params: SystemParams, name: str, fd: int) -> Component:
    """A component that a program gives in memory (`hotreload/given.py`), with Diffusers' names of its tensors; its file
    is this process's descriptor. Raises as `open_components`."""
    if name not in model.components:
        raise BadConfig(f"{model.name} has no {shown(name)}; its components are {', '.join(model.components)}")
    check_given(fd)
    component = Component(name=name, files=[path_of_descriptor(fd)])
    return _checked({name: component}, model, params, Path("the given weights"))[name]


def _checked(
    components: dict[str, Component], model: ModelParams, params: SystemParams, directory: Path
) -> dict[str, Component]:
    """Components whose headers are those of the model, with the operator's LoRAs."""
    for name in EXPERTS:
        if name in components:
            check_transformer(components[name], model, directory)
            check_config(components[name], model.transformer)
    if "vae" in components:
        check_vae(components["vae"], model)
    if not any(name in components for name in EXPERTS):
        return components
    for file in (file for option in params.lora for file in parse_lora(option).files):
        check_weights_root("LoRA", os.path.expanduser(file), params.checkpoint_root)
    return attach_loras(components, params.lora, [name for name in EXPERTS if name in model.components])


def _check_root(directory: Path, components: Iterable[Component], params: SystemParams) -> None:
    """`BadConfig` if the directory, or a file that a link in it leads to, is outside the operator's root."""
    check_weights_root("checkpoint", directory, params.checkpoint_root)
    for file in (file for component in components for file in component.files):
        check_weights_root("file", file, params.checkpoint_root)


def check_paths(components: Collection[Component], tokenizer: str = "") -> None:
    """`BadCheckpoint` for more files than one message names: a stage hears of all of them in its first."""
    components = list(components)
    size = len(msgspec.msgpack.encode(components)) + len(tokenizer)
    if size > MAX_PATHS_BYTES:
        count = sum(len(component.files) + len(component.loras) for component in components)
        raise BadCheckpoint(
            f"the checkpoint and its LoRAs have {count:,} files, whose paths take {size:,} bytes; expected at most "
            f"{MAX_PATHS_BYTES:,}: merge shards into larger ones, or move the files to a shorter path"
        )


def check_transformer(component: Component, model: ModelParams, directory: Path) -> None:
    """`BadCheckpoint` if a DiT's header shows another model, with the names of those it could be."""
    found, expected = transformer_traits(component_table(component), component.naming), traits_of(model)
    if found == expected:
        return
    what = f"the {component.name} is not that of {model.name}: {differences(found, expected)}"
    raise BadCheckpoint(f"{what}; {advice(identify(directory))}")


def check_vae(component: Component, model: ModelParams) -> None:
    """`BadCheckpoint` if a VAE's header shows the other family. (The header of a `.pth` file is read by its stage.)"""
    if component != safetensors_only(component):
        return
    needed, found = family_of(model), vae_family(component_table(component))
    if found not in (None, needed):
        raise BadCheckpoint(
            f"the vae is not that of {model.name}: this is the {found} VAE, the model needs the {needed} VAE"
        )


def suits(model: ModelParams, component: Component) -> bool:
    """The header of a component shows the shapes of this model's, as far as that tells files apart."""
    try:
        table = component_table(component)
        match component.name:
            case "transformer" | "transformer_2":
                return transformer_traits(table) == traits_of(model)
            case "vae":
                return vae_traits(table) == VaeTraits(family_of(model), model.vae.base_dim, model.vae.z_dim)
            case "text_encoder":
                return table["encoder.final_layer_norm.weight"].shape == (model.text_encoder.d_model,)
    except (BadCheckpoint, KeyError):
        return False
    return True


def identify(directory: Path) -> list[str]:
    """The known models that the DiT in a directory, or what is there of a pair of experts, could be of."""
    models, _ = known_models()
    for experts in (EXPERTS[:1], EXPERTS):
        found = {_traits(component) for component in find_components(directory, experts).values()}
        two = len(experts) == 2
        names = [m.name for m in models if {traits_of(m)} == found and (m.boundary is not None) == two]
        if names:
            return names
    return []


def possible(directory: Path) -> list[str]:
    """The known models that any one of the single files in a directory could be the DiT of."""
    models, _ = known_models()
    found = {_traits(component) for component in transformers(directory)}
    return [model.name for model in models if traits_of(model) in found]


def find_components(directory: Path, wanted: tuple[str, ...]) -> dict[str, Component]:
    """Those of the components of a model that are there and whole."""
    found: dict[str, Component] = {}
    with contextlib.suppress(BadCheckpoint):
        layout = find_layout(directory)
        for name in wanted:
            with contextlib.suppress(BadCheckpoint, OSError):
                found[name] = find_component(directory, layout, name, wanted)
    return found


def traits_of(model: ModelParams) -> TransformerTraits:
    """What the header of a model's DiT must show."""
    t = model.transformer
    return TransformerTraits(t.dim, t.num_layers, t.ffn_dim, t.in_channels, t.out_channels, t.image_dim is not None)


def family_of(model: ModelParams) -> str:
    """Of its VAE."""
    return "Wan2.2" if model.vae.is_residual else "Wan2.1"


def differences(found: TransformerTraits, expected: TransformerTraits) -> str:
    """Each trait that is not as expected."""
    pairs = zip(TransformerTraits._fields, found, expected, strict=True)
    return ", ".join(f"{name} is {got}, expected {wanted}" for name, got, wanted in pairs if got != wanted)


def advice(names: list[str]) -> str:
    """What to do with a checkpoint of the models of these names."""
    if not names:
        return "it is of none of the known models: see `engine models`"
    return f"this is {' or '.join(names)}: serve it with --model {' or --model '.join(names)}"


def file_bytes(component: Component) -> int:
    """On disk."""
    return sum(os.stat(file).st_size for file in component.files)


def merged_loras(checkpoint: Checkpoint) -> list[MergedLora]:
    """The LoRAs that are merged into the weights."""
    return [
        MergedLora(component=component.name, file=os.path.basename(lora.file), strength=lora.strength)
        for component in checkpoint.components.values()
        for lora in component.loras
    ]


def lora_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the metadata of results says about the LoRAs, if there are any."""
    loras = merged_loras(checkpoint)
    return {"lora": msgspec.to_builtins(loras)} if loras else {}


def _traits(component: Component) -> TransformerTraits | None:
    """None for something else than a Wan DiT."""
    with contextlib.suppress(BadCheckpoint):
        return transformer_traits(component_table(component))
    return None
