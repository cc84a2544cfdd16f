"""Torch tensors in and out of shared memory. The only module of `ipc` that imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ipc.layout import DTYPE_BYTES
from ipc.state import StateSlot, StateTensor
from ipc.tensor_queue import Slot, TensorQueue


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which headers know a dtype, such as "bfloat16"; ValueError for one that does not cross processes."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"got dtype {name}, expected one of {', '.join(DTYPE_BYTES)}")
    return name


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `dtype_name`."""
    if name not in DTYPE_BYTES:
        raise ValueError(f"got dtype {name!r}, expected one of {', '.join(DTYPE_BYTES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def view_tensor(dtype: str, shape: tuple[int, ...], view: memoryview) -> torch.Tensor:
    """A CPU tensor over these bytes: no copy. It keeps the memory mapped; what is written there shows in it."""
    return torch.frombuffer(view, dtype=dtype_of(dtype)).reshape(shape)


def put_tensor(queue: TensorQueue, task: str, sequence: int, tensor: torch.Tensor, timeout: float) -> None:
    """Copy a tensor, of any device and strides, into the queue. Does nothing if the queue already holds that key."""
    if queue.holds(task, sequence):
        return
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    with queue.put(task, sequence, dtype, shape, timeout) as view:
        view_tensor(dtype, shape, view).copy_(tensor.detach())


def slot_tensor(slot: Slot) -> torch.Tensor:
    """The taken tensor itself: a view of shared memory, no copy. Do not write to it, or use it after the release."""
    return view_tensor(slot.dtype, slot.shape, slot.view)


def commit_tensors(slot: StateSlot, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """`StateSlot.commit` of tensors of any device and strides."""
    slot.commit(step, {name: _state_tensor(tensor) for name, tensor in tensors.items()})


def load_tensors(slot: StateSlot) -> tuple[int, dict[str, torch.Tensor]] | None:
    """`StateSlot.load` as copies that stay what they are whatever is committed later."""
    if (loaded := slot.load()) is None:
        return None
    step, tensors = loaded
    return step, {name: view_tensor(*tensor).clone() for name, tensor in tensors.items()}


def _state_tensor(tensor: torch.Tensor) -> StateTensor:
    host = tensor.detach().cpu().contiguous()
    return dtype_name(tensor.dtype), tuple(tensor.shape), host.reshape(-1).view(torch.uint8).numpy().data
