"""Examines a checkpoint for `engine check`: `python -m stages.check`, a `CheckAsked` on stdin, `ComponentChecked`s on
stdout, both JSON.

Networks are built on the meta device and files are known by their headers, so nothing is loaded. It is a process of its
own because this needs torch, and because a hostile file may end it.
"""

from __future__ import annotations

import collections
import math
import sys

import msgspec

from hotreload.pth import read_pth
from hotreload.safetensors_file import TensorEntry
from hotreload.tables import component_table, other_family
from hotreload.weights import mismatches
from ipc.errors import BadCheckpoint
from ipc.messages.check import CheckAsked, ComponentChecked
from ipc.messages.weights import Component
from stages.models.blueprint import Blueprint, build


def check(name: str, found: Component | None, network: Blueprint) -> ComponentChecked:
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
