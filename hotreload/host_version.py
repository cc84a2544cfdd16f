"""A version of weights in host memory as a process that copies from it has it: mapped, and page-locked for a GPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch

from hotreload.placement import Placement, Runs, Shapes
from ipc.freeing import apart
from ipc.messages.weights import WeightVersion


class HostVersion:
    """A placement that is there, or will be. The one copy in host memory is shared by all processes."""

    def __init__(self, placement: Future[Placement]) -> None:
        self._placement = placement

    @classmethod
    def of(cls, placement: Placement) -> HostVersion:
        future: Future[Placement] = Future()
        future.set_result(placement)
        return cls(future)

    @classmethod
    def mapping(
        cls, version: WeightVersion, fd: int, shapes: Shapes, runs: Runs, device: int, unlocked: Callable[[str], None]
    ) -> HostVersion:
        """Map it, check it and page-lock it for a GPU, in a thread: seconds for 28 GB. The descriptor is duplicated.
        `unlocked` is told there why its pages could not be locked, if they could not."""
        future: Future[Placement] = Future()
        own = os.dup(fd)

        def attach() -> None:
            try:
                torch.cuda.set_device(device)  # else a context is made on the first one
                placement = Placement.attach(version, own, shapes, runs, pinned=True)
                placement.close()
            except Exception as error:
                future.set_exception(error)
                return
            finally:
                os.close(own)
            future.set_result(placement)
            if placement.unlocked:
                unlocked(placement.unlocked)

        threading.Thread(target=attach, name="map-weights", daemon=True).start()
        return cls(future)

    def let_go(self) -> None:
        """Unmap it when nobody uses its tensors any more; in a thread, as that takes seconds for 28 GB, too."""
        held = [self._placement]
        self._placement = Future()  # nobody asks any more
        apart(held.clear, "unmap-weights")

    def placement(self) -> Placement:
        """Waits until it is mapped. Raises OSError, or ValueError for memory that is not what its version says."""
        return self._placement.result()
