"""Weights in memory that outlives the process that read them, and modules whose tensors are views of it.

The stage that reads a component from disk places it in a memfd: a table of tensors, then their bytes in the dtype that
the stage computes in. The supervisor keeps the descriptor. A process that comes after maps it and binds its module to
it: no file is read, no byte is copied, and every process on the machine shares the one copy.

On a GPU, `hotreload/device_placement.py` does the same.

Memory layout: one page multiple with the table (length, then MessagePack), then each tensor aligned to `ALIGNMENT`,
but for those of a run, which are one right behind the other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeAlias

import msgspec
import torch
import xxhash
from torch import Tensor, nn

from ipc.layout import tensor_bytes
from ipc.memory import PAGE_BYTES, SharedMemory, round_up
from ipc.messages.weights import WeightVersion
from ipc.tensors import dtype_name, dtype_of

ALIGNMENT = 64
"""Bytes; a cache line, and more than any kernel asks for."""
HASH_BYTES = 64 << 20
"""Hashed at a time."""


Shapes: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> its dtype and shape."""
Runs: TypeAlias = Sequence[Sequence[str]]
"""Names of tensors of one dtype that lie one right behind the other, so that one view covers them all."""


class PlacedTensor(NamedTuple):
    """Where one tensor is, from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Table(msgspec.Struct, frozen=True):
    """What is in front of the data."""

    tensors: list[PlacedTensor]
    size: int
    """Bytes of data, gaps included."""

    @property
    def data_offset(self) -> int:
        return round_up(8 + len(msgspec.msgpack.encode(self)), PAGE_BYTES)


class Placement:
    """One component's tensors in shared memory.

    `create` makes it, to be filled through `tensors` and then completed with `seal`; `attach` maps a sealed one.

    Resource handling: owns one descriptor until `close`. The memory stays mapped as long as a tensor refers to it.
    Error handling: OSError when the memory is not there; ValueError for memory that is not what its version says.
    """

    def __init__(self, fd: int, table: Table, mapping: PinnableMap) -> None:
        """Take over `fd`; use `create` or `attach`."""
        self._fd = fd
        self._mapping = mapping
        self.table = table
        self._data = memoryview(mapping)[table.data_offset :]
        self.flat = flat_tensor(self._data)
        """All data, uint8."""
        self.tensors: dict[str, Tensor] = {t.name: view_placed(self.flat, t) for t in table.tensors}
        """By name: views of the memory."""

    @classmethod
    def create(cls, name: str, tensors: Shapes, runs: Runs = ()) -> Self:
        """Room for these tensors, zero."""
        table = lay_out(tensors, runs)
        with SharedMemory.create(name, table.data_offset + table.size, more_seals=True) as memory:
            fd = fcntl.fcntl(memory.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        mapping = PinnableMap(fd, table.data_offset + table.size, flags=mmap.MAP_SHARED)
        header = msgspec.msgpack.encode(table)
        mapping[: 8 + len(header)] = len(header).to_bytes(8, "little") + header
        return cls(fd, table, mapping)

    @classmethod
    def attach(cls, version: WeightVersion, fd: int, tensors: Shapes, runs: Runs = (), *, pinned: bool = False) -> Self:
        """Map what another process placed. The descriptor is duplicated. What is written to the tensors stays here;
        with `pinned`, which is for a GPU to copy from (`pin`), nothing may be written."""
        if (got := os.fstat(fd).st_size) != version.bytes:
            raise ValueError(f"placed {version.component}: got {got} bytes, expected {version.bytes}")
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            if pinned:
                mapping = PinnableMap(own, version.bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
                mapping.pin(read_only=True)
            else:
                # Not populated: that would copy every page, as for one who is about to write.
                mapping = PinnableMap(own, version.bytes, flags=mmap.MAP_PRIVATE)
            length = int.from_bytes(mapping[:8], "little")
            try:
                table = msgspec.msgpack.decode(mapping[8 : 8 + min(length, version.bytes)], type=Table)
            except msgspec.DecodeError as error:
                raise ValueError(f"placed {version.component}: there is no table of tensors in it: {error}") from error
            if table != lay_out(tensors, runs):
                raise ValueError(f"placed {version.component}: its tensors are not those of this model in this dtype")
            placement = cls(own, table, mapping)
        except BaseException:
            os.close(own)
            raise
        if (found := placement.fingerprint()) != version.fingerprint:
            placement.close()
            raise ValueError(f"placed {version.component}: its bytes hash to {found}, not to {version.fingerprint}")
        return placement

    @property
    def fd(self) -> int:
        """The descriptor, to be passed to another process; stays owned by this object."""
        return self._fd

    def seal(self, component: str, content: str) -> WeightVersion:
        """Let nobody write any more but who has it mapped now; what the supervisor keeps beside the descriptor."""
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        return WeightVersion(
            component=component, content=content, fingerprint=self.fingerprint(), bytes=len(self._mapping)
        )

    def pin(self) -> None:
        """Lock the pages of a placement that was created here, so that a GPU copies from them by itself."""
        self._mapping.pin(read_only=False)

    @property
    def unlocked(self) -> str:
        """Why its pages could not be locked; empty if they are, or were not to be."""
        return self._mapping.unlocked

    def fingerprint(self) -> str:
        """xxh3-128 of all data, gaps included, in hex."""
        total = xxhash.xxh3_128()
        for first in range(0, len(self._data), HASH_BYTES):
            total.update(self._data[first : first + HASH_BYTES])
        return total.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PinnableMap(mmap.mmap):
    """A mapping that a GPU may be told of, and is told to forget before it goes."""

    unlocked = ""
    """Why its pages could not be locked; empty if they are, or were not to be."""
    _address = 0
    _device = 0

    def pin(self, *, read_only: bool) -> None:
        """Page-lock it for all CUDA devices of this process; 4 GiB take 0.2 s. It is tried once: where it cannot be,
        `unlocked` says why, and a copy from it is slower, and waited for."""
        address, device = flat_tensor(memoryview(self)).data_ptr(), torch.cuda.current_device()
        flags = PORTABLE | (READ_ONLY if read_only else 0)
        # The runtime keeps the error of a failed call for its thread, and torch raises it there after the next kernel.
        with ThreadPoolExecutor(1, thread_name_prefix="page-lock") as apart:
            code = apart.submit(_register, address, len(self), flags, device).result()
        if code:
            self.unlocked = f"CUDA error {code}"
        else:
            self._address, self._device = address, device

    def __del__(self) -> None:
        if self._address:
            with torch.cuda.device(self._device):  # this may be any thread
                _cudart().cudaHostUnregister(self._address)


def _register(address: int, size: int, flags: int, device: int) -> int:
    """The runtime's error, 0 for none."""
    torch.cuda.set_device(device)  # else a context is made on the first one
    return int(_cudart().cudaHostRegister(address, size, flags))


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


PORTABLE, READ_ONLY = 0x01, 0x08
"""Flags of cudaHostRegister."""
F_SEAL_FUTURE_WRITE = 0x0010
"""Linux 5.1; not in `fcntl` before Python 3.13."""


def lay_out(tensors: Shapes, runs: Runs = ()) -> Table:
    """One tensor after another, by name; those of a run together, where its first one has its place."""
    behind = {name: (run[0], number) for run in runs for number, name in enumerate(run)}
    assert all(tensors[name][0] == tensors[run[0]][0] for run in runs for name in run), "a run is of one dtype"
    placed, offset = [], 0
    for name in sorted(tensors, key=lambda name: behind.get(name, (name, 0))):
        dtype, shape = tensors[name]
        if behind.get(name, (name, 0))[1] == 0:
            offset = round_up(offset, ALIGNMENT)
        placed.append(PlacedTensor(name, dtype_name(dtype), shape, offset))
        offset += tensor_bytes(dtype_name(dtype), shape)
    return Table(placed, max(round_up(offset, ALIGNMENT), 1))


class Slots:
    """Where a module keeps its parameters and buffers, to make them tensors of one version or another. They are looked
    for once: to find them takes longer than to bind them."""

    def __init__(self, module: nn.Module, aliases: Mapping[str, str]) -> None:
        """`aliases` maps second names in the module to first ones."""
        module.eval().requires_grad_(False)
        self._slots: list[Slot] = []
        for path, owner in module.named_modules(remove_duplicate=False):
            own = [(leaf, t, True) for leaf, t in owner.named_parameters(recurse=False, remove_duplicate=False)]
            own += [(leaf, t, False) for leaf, t in owner.named_buffers(recurse=False, remove_duplicate=False)]
            for leaf, tensor, is_parameter in own:
                name = f"{path}.{leaf}" if path else leaf
                self._slots.append(Slot(owner, leaf, aliases.get(name, name), tensor.shape, is_parameter))
        self._names = {slot.name for slot in self._slots}

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Make every parameter and buffer the tensor of its name, without a copy. Names must be exactly those of the
        module, and shapes."""
        strangers = self._names ^ tensors.keys()
        assert not strangers, f"tensors of the module or of its weights that the other has not: {sorted(strangers)}"
        for owner, leaf, name, shape, is_parameter in self._slots:
            tensor = tensors[name]
            assert tensor.shape == shape, f"{name}: got {tuple(tensor.shape)}, expected {tuple(shape)}"
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


class Slot(NamedTuple):
    """One parameter or buffer of a module."""

    owner: nn.Module
    leaf: str
    name: str
    """Of the tensor that it is to be."""
    shape: torch.Size
    is_parameter: bool


def rebind(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make these parameters and buffers of a module other tensors of the same shapes, without a copy."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        before = getattr(owner, leaf)
        assert before.shape == tensor.shape, f"{name}: got {tuple(tensor.shape)}, expected {tuple(before.shape)}"
        is_parameter = isinstance(before, nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def flat_tensor(data: memoryview) -> Tensor:
    """The bytes as a uint8 tensor, without a copy. If they are read-only, so must the tensor be: torch cannot know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8)


def view_placed(data: Tensor, tensor: PlacedTensor) -> Tensor:
    """A placed tensor as a view of the data, flat uint8."""
    size = tensor_bytes(tensor.dtype, tensor.shape)
    return data[tensor.offset : tensor.offset + size].view(dtype_of(tensor.dtype)).view(tensor.shape)


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors [n_i, ...] that lie one right behind the other, as one view [sum of n_i, ...]; None if they do not."""
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        if not same or not _share_storage(tensor, first) or tensor.storage_offset() != end:
            return None
        end += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _share_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
