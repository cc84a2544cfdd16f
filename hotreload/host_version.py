"""A version of weights in host memory as a process that copies from it has it: mapped, and page-locked for a GPU."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future

from hotreload.placement import Placement, Runs, Shapes
from ipc.messages import WeightVersion


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
    def mapping(cls, version: WeightVersion, fd: int, shapes: Shapes, runs: Runs) -> HostVersion:
        """Map, check and page-lock it in a thread: seconds for 28 GB. The descriptor is duplicated."""
        future: Future[Placement] = Future()
        own = os.dup(fd)

        def attach() -> None:
            try:
                placement = Placement.attach(version, own, shapes, runs, pinned=True)
                placement.close()
                future.set_result(placement)
            except Exception as error:
                future.set_exception(error)
            finally:
                os.close(own)

        threading.Thread(target=attach, name="map-weights", daemon=True).start()
        return cls(future)

    def placement(self) -> Placement:
        """Waits until it is mapped. Raises OSError, or ValueError for memory that is not what its version says."""
        return self._placement.result()
