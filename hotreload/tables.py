"""The tensors of a component under our names, from the headers of its files. Without torch.

A `.pth` file is an archive with a pickle: its table needs torch (`hotreload/pth.py`); that it is whole can be told
without.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import NamedTuple

from hotreload.archive import check_directory
from hotreload.files import is_descriptor, regular_file
from hotreload.names import stored_name, to_ours
from hotreload.safetensors_file import TensorEntry, read_header
from hotreload.shown import listed, shown
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Component, Naming

PthReader = Callable[[Path, str], list[TensorEntry]]
"""(file, its name for errors) -> its tensors, under the names they have there: `hotreload.pth.read_pth`."""
ARCHIVE_ERRORS = (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error, OverflowError)
"""What zipfile raises for a damaged archive."""
MAX_PICKLE = 64 << 20
"""Bytes of what torch reads whole of a `.pth` file: all but the storages. Wan's largest has less than 0.1 MB."""
_STORAGE = re.compile(r"[^/]+/data/[0-9]+")
_BLOCK = re.compile(r"blocks\.([0-9]{1,4})\.")


class TransformerTraits(NamedTuple):
    """What tells one Wan DiT from another."""

    dim: int
    layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    """Times the volume of a patch, (1, 2, 2) in every Wan model, its head has rows."""
    image_attention: bool


class VaeTraits(NamedTuple):
    """What tells one Wan VAE from another."""

    family: str
    """Wan2.1, or Wan2.2 with its stages of residual blocks."""
    base_dim: int
    z_dim: int


def label_of(component: Component, file: Path) -> str:
    """How errors name a component's file: without the directories it is in."""
    return f"{component.name}: {'the memory' if is_descriptor(file) else shown(file.name)}"


def component_table(component: Component, read_pth: PthReader | None = None) -> dict[str, TensorEntry]:
    """Every tensor that the model needs or that no one knows, by our name. Raises `BadCheckpoint`.

    `read_pth`: needed for components in `.pth` files.
    """
    entries: list[TensorEntry] = []
    for file in map(Path, component.files):
        label = label_of(component, file)
        if file.suffix != ".safetensors" and not is_descriptor(file):
            assert read_pth is not None, "the tensors of a .pth file cannot be listed without torch"
            entries += read_pth(file, label)
        else:
            entries += read_header(file, label).entries
    refuse_fp8(component, entries)
    return to_ours(component.name, component.naming, entries)


def safetensors_only(component: Component) -> Component:
    """The component as far as its tensors can be listed without torch."""
    files = [file for file in component.files if file.endswith(".safetensors")]
    return Component(name=component.name, files=files, naming=component.naming, loras=component.loras)


def refuse_fp8(component: Component, entries: list[TensorEntry]) -> None:
    """Raise `BadCheckpoint` for scaled fp8 weights, which mean nothing without their scales."""
    for entry in entries:
        if entry.dtype.startswith("F8_"):
            raise BadCheckpoint(
                f"{label_of(component, entry.file)} holds {entry.dtype} weights (fp8), which are not supported; "
                "use the bf16 or fp16 file of the same model"
            )


def check_archive(path: Path, label: str) -> None:
    """Check that a `.pth` file is an archive that torch can have written, and that its end is there."""
    try:
        with regular_file(path) as file:
            check_directory(file)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
    except OSError as error:
        raise BadCheckpoint(f"{label} cannot be read: {error.strerror}") from error
    except ARCHIVE_ERRORS as error:
        raise BadCheckpoint(
            f"{label} is cut short, damaged, or of PyTorch before 1.6, which wrote no zip archives: {error}; "
            "download it again"
        ) from error
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise BadCheckpoint(f"{label} is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise BadCheckpoint(
                f"{label} is compressed ({shown(member.filename)}), as torch.save never does; save it again with torch"
            )
        if member.file_size > MAX_PICKLE and not _STORAGE.fullmatch(member.filename):
            raise BadCheckpoint(
                f"{label}: {shown(member.filename)} has {member.file_size} bytes, expected at most {MAX_PICKLE}; "
                "save only the tensors, with torch"
            )


def transformer_traits(table: Mapping[str, TensorEntry], naming: Naming = "diffusers") -> TransformerTraits:
    """What kind of DiT a table describes. Raises `BadCheckpoint` if it is none; `naming` is whose names that uses."""
    try:
        dim, in_channels = table["patch_embedding.weight"].shape[:2]
        patch = table["patch_embedding.weight"].shape[2:]
        ffn_dim = table["blocks.0.ffn.net.0.proj.weight"].shape[0]
        rows = table["proj_out.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        what = stored_name("transformer", naming, error.args[0]) if isinstance(error, KeyError) else "patch_embedding"
        raise BadCheckpoint(f"the transformer is not a Wan DiT: {what} is missing or misshaped") from error
    layers = 1 + max(int(match[1]) for name in table if (match := _BLOCK.match(name)))
    image = "blocks.0.attn2.add_k_proj.weight" in table
    return TransformerTraits(dim, layers, ffn_dim, in_channels, rows // max(math.prod(patch), 1), image)


def vae_traits(table: Mapping[str, TensorEntry]) -> VaeTraits:
    """What kind of VAE a table describes. Raises `BadCheckpoint` if it is none."""
    try:
        base_dim, z_dim = table["encoder.conv_in.weight"].shape[0], table["post_quant_conv.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise BadCheckpoint(f"the vae is not a Wan VAE: {error} is missing or misshaped") from error
    return VaeTraits(vae_family(table) or "unknown", base_dim, z_dim)


def vae_family(names: Container[str]) -> str | None:
    """Wan2.1 or Wan2.2, by the names of a VAE's tensors (ours); None for neither."""
    marks = {"Wan2.1": "encoder.down_blocks.0.conv1.weight", "Wan2.2": "encoder.down_blocks.0.resnets.0.conv1.weight"}
    return next((family for family, mark in marks.items() if mark in names), None)


def other_family(expected: Container[str], found: Container[str]) -> str:
    """What to say of the VAE of the other family, by the names of the tensors (ours); empty if it is not that."""
    needed, got = vae_family(expected), vae_family(found)
    return "" if needed is None or got in (None, needed) else f"this is the {got} VAE, the model needs the {needed} VAE"


def describe(kinds: Mapping[str, list[str]]) -> str:
    """What is wrong with which tensors, the first of each kind by name; empty if nothing is."""
    return "; ".join(_named(names, kind) for kind, names in kinds.items() if names)


def _named(names: list[str], what: str) -> str:
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {listed(names)}"
