"""How a stage comes by its weights: from memory that is there already, else from disk into memory that will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hotreload.device_placement import DevicePlacement
from hotreload.placement import Placement, Shapes, bind, lay_out
from hotreload.weights import load_weights
from ipc.errors import OutOfMemory
from ipc.messages import Start, WeightVersion
from stages.stage import Links, component


def load(
    module: nn.Module,
    start: Start,
    links: Links,
    name: str,
    *,
    device: str,
    dtype: Callable[[str], torch.dtype],
    aliases: Mapping[str, str] | None = None,
) -> str:
    """Bind `module` (on meta) to the weights of component `name`; return their content hash.

    The module's tensors are views of memory that outlives this process: of what the supervisor holds, or of what is
    read here and handed to it. Only where the GPU has no such memory (`start.outliving`) are they this process's own.
    Raises `BadCheckpoint`, and `OutOfMemory` if there is no room for them.
    """

    def progress(done: int, total: int) -> None:
        links.loading(name, done, total)

    source, aliases = component(start, name), aliases or {}
    if not start.outliving:
        return load_weights(module, source, device=device, dtype=dtype, aliases=aliases, progress=progress)
    shapes = {n: (dtype(n), tuple(t.shape)) for n, t in module.state_dict().items() if n not in aliases}
    if (placed := links.placed.get(name)) is not None:
        placement = attach(*placed, shapes)
        bind(module, placement.tensors, aliases)
        placement.close()
        return placed[0].content
    room: list[Placement | DevicePlacement] = []

    def allocate(tensor: str, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        # Only now: by the first call the files are known to fit the model.
        if not room:
            room.append(create(name, device, shapes))
        return room[0].tensors[tensor]

    content = load_weights(
        module, source, device=device, dtype=dtype, aliases=aliases, progress=progress, allocate=allocate
    )
    (placement,) = room
    links.place(placement.seal(name, content), placement.fd)
    placement.close()
    return content


def attach(version: WeightVersion, fd: int, shapes: Shapes) -> Placement | DevicePlacement:
    """What was placed, wherever that is."""
    kind = Placement if version.device is None else DevicePlacement
    return kind.attach(version, fd, shapes)


def create(name: str, device: str, shapes: Shapes) -> Placement | DevicePlacement:
    """Room for the weights of a component on a device. Raises `OutOfMemory`."""
    where = torch.device(device)
    try:
        if where.type == "cpu":
            return Placement.create(name, shapes)
        return DevicePlacement.create(where.index or 0, shapes)
    except OSError as error:
        size = lay_out(shapes).size / 2**30
        raise OutOfMemory(
            f"there is no room on {device} for the {size:.1f} GiB of {name}; free memory there, or take a smaller model"
        ) from error
