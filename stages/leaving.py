"""A tensor that leaves a device while it computes the next one."""

from __future__ import annotations

import contextlib
import functools
import time
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ipc.messages.status import Copied
from ipc.tensor_queue import TensorQueue
from ipc.tensors import put_tensor


class Leaving:
    """Called, by any thread, it puts a tensor into a queue: on a GPU on a stream for that alone, when what makes the
    tensor is computed, whatever else was asked to be computed since.

    tensor: of any dtype, shape and device; it must not be written to any more. Raises what `put_tensor` does.
    """

    def __init__(self, queue: TensorQueue, task: str, sequence: int, tensor: Tensor, timeout: float) -> None:
        """To be made by the thread that asked for the tensor to be computed."""
        self._queue, self._task, self._sequence, self._timeout = queue, task, sequence, timeout
        self._tensor = tensor
        self._computed = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def __call__(self) -> Copied | None:
        """Return when it is there; what was copied, None if it was there already. Times are of the monotonic clock."""
        if self._queue.holds(self._task, self._sequence):
            return None
        begin = time.monotonic()
        with torch.inference_mode(), self._aside():
            put_tensor(self._queue, self._task, self._sequence, self._tensor, self._timeout)
        end = time.monotonic()
        return Copied(begin=begin, end=end, seconds=end - begin, bytes=self._tensor.nbytes)

    def _aside(self) -> AbstractContextManager[object]:
        if self._computed is None:
            return contextlib.nullcontext()
        stream = _stream_out_of(self._tensor.device)
        stream.wait_event(self._computed)
        return torch.cuda.stream(stream)


@functools.cache
def _stream_out_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
