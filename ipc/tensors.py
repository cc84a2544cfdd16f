"""Torch tensors in and out of shared memory. The only module of `ipc` that imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from ipc.device_memory import DeviceView
from ipc.layout import DTYPE_BYTES
from ipc.payload import Room
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


def view_tensor(dtype: str, shape: tuple[int, ...], view: Room) -> torch.Tensor:
    """A tensor over these bytes, where they are: no copy. It keeps the memory mapped; what is written there shows in
    it."""
    if isinstance(view, DeviceView):
        return torch.as_tensor(view, device=f"cuda:{view.device}").view(dtype_of(dtype)).reshape(shape)
    return torch.frombuffer(view, dtype=dtype_of(dtype)).reshape(shape)


@contextlib.contextmanager
def room_tensor(
    queue: TensorQueue, task: str, sequence: int, dtype: torch.dtype, shape: tuple[int, ...], timeout: float
) -> Iterator[torch.Tensor]:
    """`TensorQueue.put` as a tensor to compute into: what is in it when the block is left is handed over, without a
    copy. Work queued on a GPU's current stream is waited for."""
    name = dtype_name(dtype)
    with queue.put(task, sequence, name, shape, timeout) as view:
        target = view_tensor(name, shape, view)
        yield target
        if target.is_cuda:
            torch.cuda.current_stream(target.device).synchronize()


def put_tensor(queue: TensorQueue, task: str, sequence: int, tensor: torch.Tensor, timeout: float) -> None:
    """Copy a tensor, of any device and strides, into the queue. Does nothing if the queue already holds that key."""
    if queue.holds(task, sequence):
        return
    with room_tensor(queue, task, sequence, tensor.dtype, tuple(tensor.shape), timeout) as room:
        room.copy_(tensor.detach())


def slot_tensor(slot: Slot) -> torch.Tensor:
    """The taken tensor itself: a view of shared memory or of GPU memory, no copy. Do not write to it, or use it after
    the release; work on a GPU that reads it must be done by then."""
    return view_tensor(slot.dtype, slot.shape, slot.view)


def commit_tensors(slot: StateSlot, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """`StateSlot.commit` of tensors of any device and strides."""
    on_gpu = slot.device is not None
    slot.commit(step, {name: _state_tensor(tensor, on_gpu) for name, tensor in tensors.items()})


def load_tensors(slot: StateSlot) -> tuple[int, dict[str, torch.Tensor]] | None:
    """`StateSlot.load` as copies that stay what they are whatever is committed later."""
    if (loaded := slot.load()) is None:
        return None
    step, tensors = loaded
    return step, {name: view_tensor(*tensor).clone() for name, tensor in tensors.items()}


def _state_tensor(tensor: torch.Tensor, on_gpu: bool) -> StateTensor:
    """Its bytes where they are, if that is where they are wanted; else in host memory."""
    source = tensor.detach() if on_gpu else tensor.detach().cpu()
    raw = source.contiguous().reshape(-1).view(torch.uint8)
    view = DeviceView(raw, raw.get_device(), raw.data_ptr(), raw.numel()) if raw.is_cuda else raw.numpy().data
    return dtype_name(tensor.dtype), tuple(tensor.shape), view
