"""Bind a component's weights to a module that was built on the meta device.

Nothing is read before the whole table of tensors is known to fit: exactly the module's keys, each with its shape and a
floating dtype. Files are read with `read`, not mapped: a file that is cut while it is read is an error here, where a
mapping would kill the process with SIGBUS. Peak memory: the module, and `READ_AHEAD` tensors as they are on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from hotreload.checkpoint import TensorEntry, content_hash, tensor_table
from ipc.errors import BadCheckpoint

READ_AHEAD = 16
"""Tensors read and hashed at once; reading and SHA-256 both run without the GIL."""
NAMED = 10
"""Tensors of a kind that an error names; it counts the others."""
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_weights(
    module: nn.Module,
    directory: Path,
    component: str,
    *,
    device: str = "cpu",
    dtype: Callable[[str], torch.dtype],
    aliases: Mapping[str, str] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> str:
    """Load a component's `directory` into `module` (on meta); return the content hash of what was read.

    `dtype` gives the dtype each tensor is cast to. `aliases` maps second names of a tensor, in the module
    or in the checkpoint, to its first. `beat` is called as tensors arrive. Raises `BadCheckpoint` and leaves the module
    on meta if the checkpoint does not fit it.
    """
    aliases = aliases or {}
    table = _renamed(tensor_table(directory, component), aliases)
    expected = module.state_dict()
    verify(component, {name: tensor for name, tensor in expected.items() if name not in aliases}, table)
    state: dict[str, Tensor] = {}
    digests: list[tuple[TensorEntry, bytes]] = []
    for entry, raw, digest in _read_all(component, [table[name] for name in sorted(table)]):
        state[entry.name] = raw.to(device=device, dtype=dtype(entry.name))
        digests.append((entry, digest))
        beat()
    state |= {alias: state[name] for alias, name in aliases.items() if alias in expected}
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    unbound = [name for name, tensor in tensors if tensor.is_meta]
    assert not unbound, f"tensors of the module that are not in its state dict: {unbound}"
    return content_hash(digests)


def verify(component: str, expected: Mapping[str, Tensor], table: Mapping[str, TensorEntry]) -> None:
    """Raise `BadCheckpoint` naming every missing, extra, misshaped or non-floating tensor, the first ones by name."""
    missing = sorted(expected.keys() - table.keys())
    extra = sorted(table.keys() - expected.keys())
    both = sorted(expected.keys() & table.keys())
    shapes = [
        f"{name} (got {list(table[name].shape)}, expected {list(expected[name].shape)})"
        for name in both
        if table[name].shape != tuple(expected[name].shape)
    ]
    dtypes = [f"{name} ({table[name].dtype})" for name in both if table[name].dtype not in FLOATING]
    kinds = {"missing": missing, "not of this model": extra, "of another shape": shapes, "not floating-point": dtypes}
    if problems := [_named(names, kind) for kind, names in kinds.items() if names]:
        raise BadCheckpoint(f"{component} does not fit the model: {'; '.join(problems)}")


def _renamed(table: dict[str, TensorEntry], aliases: Mapping[str, str]) -> dict[str, TensorEntry]:
    for alias, name in aliases.items():
        if (entry := table.pop(alias, None)) is not None:
            table.setdefault(name, entry._replace(name=name))
    return table


def _named(names: list[str], what: str) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}: {', '.join(names[:NAMED])}{more}"


def _read_all(component: str, entries: list[TensorEntry]) -> Iterable[tuple[TensorEntry, Tensor, bytes]]:
    """Yield (entry, tensor as on disk, SHA-256 of its bytes) in order, reading `READ_AHEAD` at a time."""
    with ThreadPoolExecutor(min(READ_AHEAD, os.cpu_count() or 1)) as pool:
        for first in range(0, len(entries), READ_AHEAD):
            batch = entries[first : first + READ_AHEAD]
            for entry, (raw, digest) in zip(batch, pool.map(lambda e: _read(component, e), batch), strict=True):
                yield entry, raw, digest


def _read(component: str, entry: TensorEntry) -> tuple[Tensor, bytes]:
    data = torch.empty(entry.size, dtype=torch.uint8)
    view = memoryview(data.numpy().data)
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            done = 0
            while done < entry.size:
                count = file.readinto(view[done:])
                if not count:
                    raise BadCheckpoint(f"{component}/{entry.file.name} was cut short while it was read")
                done += count
    except OSError as error:
        raise BadCheckpoint(f"{component}/{entry.file.name} cannot be read: {error.strerror}") from error
    return data.view(FLOATING[entry.dtype]).view(entry.shape), hashlib.sha256(view).digest()
