"""Examines a checkpoint for `engine check`: `python -m stages.check`, a `CheckAsked` on stdin, `ComponentChecked`s on
stdout, both JSON.

Networks are built on the meta device and files are known by their headers, so nothing is loaded. It is a process of its
own because this needs torch, and because a hostile file may end it.
"""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
from torch import Tensor, nn

from hotreload.pth import read_pth
from hotreload.safetensors_file import TensorEntry
from hotreload.tables import component_table, other_family
from hotreload.weights import mismatches
from ipc.errors import BadCheckpoint
from ipc.messages import CheckAsked, Component, ComponentChecked
from stages.models.blank import blank


class Network(NamedTuple):
    """One component as its stage builds it, on the meta device."""

    module: nn.Module
    stays_float32: Callable[[str], bool]
    """Of a tensor's name: it is kept in float32 whatever dtype the engine computes in."""
    aliases: Mapping[str, str]
    """Second names of tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """By first name."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in self.aliases}


def build(name: str, asked: CheckAsked) -> Network:
    """The network of a component; what only it needs is imported here."""
    with blank():
        match name:
            case "text_encoder":
                from stages.models import text_encoder

                return Network(text_encoder.build(asked.text_encoder), lambda key: False, text_encoder.ALIASES)
            case "image_encoder":
                from stages.models import image_encoder

                assert asked.image_encoder is not None, "the model has an image encoder"
                return Network(image_encoder.ImageEncoder(asked.image_encoder), lambda key: False, {})
            case "transformer" | "transformer_2":
                from stages.models.transformer import WanTransformer, keeps_float32

                return Network(WanTransformer(asked.transformer), keeps_float32, {})
            case "vae":
                from stages.models.vae import WanVae

                return Network(WanVae(asked.vae), lambda key: True, {})
    raise ValueError(f"there is no component {name!r}")


def check(name: str, found: Component | None, network: Network) -> ComponentChecked:
    """Compare the files of a component, if there are any, with its network."""
    tensors = network.tensors()
    table: dict[str, TensorEntry] = {}
    wrong: dict[str, list[str]] = {}
    unreadable = ""
    if found is not None:
        try:
            table = {network.aliases.get(n, n): e for n, e in component_table(found, read_pth).items()}
            wrong = {what: names for what, names in mismatches(found, tensors, table).items() if names}
            unreadable = other_family(tensors, table)
        except BadCheckpoint as error:
            unreadable = str(error)
    return ComponentChecked(
        name=name,
        dtypes=dict(collections.Counter(entry.dtype for entry in table.values())),
        parameters=sum(math.prod(entry.shape) for entry in table.values()),
        wrong=wrong,
        unreadable=unreadable,
        bytes_bfloat16=sum(t.numel() * (4 if network.stays_float32(n) else 2) for n, t in tensors.items()),
        bytes_float32=sum(4 * t.numel() for t in tensors.values()),
    )


def main() -> None:
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=CheckAsked)
    found = {component.name: component for component in asked.components}
    checked = [check(name, found.get(name), build(name, asked)) for name in asked.wanted]
    sys.stdout.buffer.write(msgspec.json.encode(checked))


if __name__ == "__main__":
    main()
