"""Bind a component's weights to a module that was built on the meta device.

Nothing is read before the whole table of tensors is known to fit: exactly the module's keys, each with its shape and a
floating dtype. The bytes then stream through a few buffers (`hotreload/reading.py`) and are cast where the weights are
to be; a tensor that keeps its dtype is read right into its memory, and none is ever held twice. Host memory beyond the
weights: 80 MiB, and the LoRA pairs of one tensor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from hotreload.content import content_hash, tensor_digest
from hotreload.dtypes import TORCH_DTYPES
from hotreload.merging import Merge, additions_of
from hotreload.names import stored_name
from hotreload.pth import read_pth
from hotreload.reading import Files, Piece, Read, pieces_of, read_ahead
from hotreload.safetensors_file import FLOATING, ITEM_SIZES, TensorEntry
from hotreload.shown import shown
from hotreload.tables import component_table, describe, other_family, vae_family
from ipc.errors import BadCheckpoint
from ipc.messages.weights import Component

Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
"""(name, shape, dtype) -> memory for a tensor, contiguous, on the device of all others."""


def load_weights(
    module: nn.Module,
    component: Component,
    *,
    device: str = "cpu",
    dtype: Callable[[str], torch.dtype],
    aliases: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    allocate: Allocate | None = None,
) -> str:
    """Load a component's files into `module` (on meta), its LoRA files merged; return the content hash of all that.

    `dtype` gives the dtype each tensor is cast to. `aliases` maps second names of a tensor, in the module or in the
    checkpoint, to its first. `progress` hears of the bytes read and of all there are. `allocate`: where the weights are
    to live; None: in memory of the process, or of its GPU. Raises `BadCheckpoint` and leaves the module on meta if the
    checkpoint does not fit it.
    """
    aliases = aliases or {}
    table = _without_aliases(component_table(component, read_pth), aliases)
    expected = module.state_dict()
    verify(component, {name: tensor for name, tensor in expected.items() if name not in aliases}, table)
    loading = _Loading(component, table, torch.device(device), dtype, allocate)
    state = loading.run(progress)
    state |= {alias: state[name] for alias, name in aliases.items() if alias in expected}
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    unbound = [name for name, tensor in tensors if tensor.is_meta]
    assert not unbound, f"tensors of the module that are not in its state dict: {unbound}"
    return loading.content_hash()


def verify(component: Component, expected: Mapping[str, Tensor], table: Mapping[str, TensorEntry]) -> None:
    """Raise `BadCheckpoint` naming every missing, extra, misshaped or non-floating tensor, the first ones by name; of a
    VAE of the other family, it is enough to say so."""
    if problems := other_family(expected, table) or describe(mismatches(component, expected, table)):
        raise BadCheckpoint(f"{component.name} does not fit the model: {problems}")


def mismatches(
    component: Component, expected: Mapping[str, Tensor], table: Mapping[str, TensorEntry]
) -> dict[str, list[str]]:
    """What is wrong -> with which tensors, all of them, by the names they have in the component's files."""
    in_model, in_file = (
        functools.partial(stored_name, component.name, component.naming, residual=vae_family(names) == "Wan2.2")
        for names in (expected, table)
    )
    missing, extra = sorted(expected.keys() - table.keys()), sorted(table.keys() - expected.keys())
    both = {name: shown(in_file(name)) for name in sorted(expected.keys() & table.keys())}
    shapes = [
        f"{text} (got {list(table[name].shape)}, expected {list(expected[name].shape)})"
        for name, text in both.items()
        if table[name].shape != tuple(expected[name].shape)
    ]
    dtypes = [f"{text} ({table[name].dtype})" for name, text in both.items() if table[name].dtype not in FLOATING]
    return {
        "missing": [shown(in_model(name)) for name in missing],
        "not of this model": [shown(in_file(name)) for name in extra],
        "of another shape": shapes,
        "not floating-point": dtypes,
    }


class _Loading:
    """One run through the files of a component: its tensors, and the digests of what they were made from."""

    def __init__(
        self,
        component: Component,
        table: Mapping[str, TensorEntry],
        device: torch.device,
        dtype: Callable[[str], torch.dtype],
        allocate: Allocate | None,
    ) -> None:
        self._component, self._table, self._device = component, table, device
        self._additions = additions_of(component, {name: entry.shape for name, entry in table.items()})
        self._allocate = allocate or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        self._dtype = dtype
        self._state: dict[str, Tensor] = {}
        self._chunks: dict[str, list[bytes]] = {name: [] for name in table}
        self._merge: Merge | None = None
        self._added: dict[str, bytes] = {}

    @torch.no_grad()
    def run(self, progress: Callable[[int, int], None]) -> dict[str, Tensor]:
        """Read everything; return the tensors by name."""
        total, done = sum(entry.size for entry in self._table.values()), 0
        for name in sorted(self._table):
            if not self._table[name].size:
                self._destination(self._table[name])
        pieces = pieces_of(self._table.values())
        with (
            Files(self._component.name) as files,
            closing(read_ahead(files, pieces, self._place, self._device)) as reads,
        ):
            for read in reads:
                self._take(read, files)
                done += read.piece.size
                progress(done, total)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._state

    def content_hash(self) -> str:
        digests = {name: tensor_digest(self._table[name], chunks) for name, chunks in self._chunks.items()}
        return content_hash(digests, self._added)

    def _destination(self, entry: TensorEntry) -> Tensor:
        if (tensor := self._state.get(entry.name)) is None:
            tensor = self._allocate(entry.name, entry.shape, self._dtype(entry.name))
            self._state[entry.name] = tensor
        return tensor

    def _place(self, piece: Piece) -> memoryview | None:
        """The piece's own memory, if its bytes can go there as they are."""
        tensor = self._destination(piece.entry)
        same = tensor.dtype == TORCH_DTYPES[piece.entry.dtype] and piece.entry.name not in self._additions
        if self._device.type != "cpu" or not same:
            return None
        flat = tensor.view(-1).view(torch.uint8).numpy()
        return memoryview(flat.data)[piece.start : piece.start + piece.size]

    def _take(self, read: Read, files: Files) -> None:
        """Note the digest, and bring what is in a buffer to where it belongs."""
        (entry, start, size), buffer, digest = read
        self._chunks[entry.name].append(digest)
        if buffer is None:
            return
        raw = buffer.tensor(size, TORCH_DTYPES[entry.dtype])
        first = start // ITEM_SIZES[entry.dtype]
        target = self._state[entry.name].view(-1)[first : first + len(raw)]
        if entry.name not in self._additions:
            target.copy_(raw)
            return
        if start == 0:
            self._merge = Merge(self._additions[entry.name], files, self._device)
        assert self._merge is not None
        value = raw.to(torch.float32, copy=True)
        self._merge.add(value, first)
        target.copy_(value)
        if start + size == entry.size:
            self._added[entry.name] = self._merge.digest()
            self._merge = None


def _without_aliases(table: dict[str, TensorEntry], aliases: Mapping[str, str]) -> dict[str, TensorEntry]:
    for alias, name in aliases.items():
        if (entry := table.pop(alias, None)) is not None:
            table.setdefault(name, entry._replace(name=name))
    return table
