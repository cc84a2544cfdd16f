"""How a stage comes by its weights: from memory that is there already, else from disk into memory that will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from hotreload.placement import Placement, bind, lay_out
from hotreload.weights import load_weights
from ipc.messages import Start
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

    On a CPU the module's tensors are views of shared memory: of what the supervisor holds, or of what is read here and
    handed to it. On a GPU they are read into memory of this process. Raises `BadCheckpoint`.
    """

    def progress(done: int, total: int) -> None:
        links.loading(name, done, total)

    source = component(start, name)
    if device != "cpu":
        return load_weights(module, source, device=device, dtype=dtype, aliases=aliases, progress=progress)
    aliases = aliases or {}
    shapes = {n: (dtype(n), tuple(t.shape)) for n, t in module.state_dict().items() if n not in aliases}
    if (placed := links.placed.get(name)) is not None:
        placement = Placement.attach(*placed)
        if placement.table != lay_out(shapes):
            raise ValueError(f"placed {name}: its tensors are not those of this model in this dtype")
        bind(module, placement.tensors, aliases)
        placement.close()
        return placed[0].content
    room: list[Placement] = []

    def allocate(tensor: str, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        # Only now: by the first call the files are known to fit the model.
        if not room:
            room.append(Placement.create(name, shapes))
        return room[0].tensors[tensor]

    content = load_weights(
        module, source, device=device, dtype=dtype, aliases=aliases, progress=progress, allocate=allocate
    )
    (placement,) = room
    links.place(placement.seal(name, content), placement.fd)
    placement.close()
    return content
