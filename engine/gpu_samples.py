"""One GPU as NVML, the driver's management library, sees it. Needs no CUDA context."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import msgspec
import pynvml

from engine.cuda import management_handle

T = TypeVar("T")


class GpuSample(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU at a moment. Bytes, unless it says otherwise; None: this driver does not say."""

    total: int | None = None
    """Without what the driver keeps."""
    ours: int | None = None
    """Used by this engine's processes, and by the memory that outlives them."""
    others: int | None = None
    """Used by other processes."""
    free: int | None = None
    utilisation: float | None = None
    """Share of the last sample period in which a kernel ran, 0 to 1."""
    pcie_rx: float | None = None
    """Bytes per second to the device."""
    pcie_tx: float | None = None
    """Bytes per second from the device."""


class Gpu:
    """Device `index` as CUDA counts.

    Resource handling: holds NVML open until `close`. Error handling: `pynvml.NVMLError` or ValueError from the
    constructor if there is no driver, or no such device; after that, what cannot be told is None.
    """

    def __init__(self, index: int) -> None:
        pynvml.nvmlInit()
        try:
            self._handle = management_handle(f"cuda:{index}")
        except (pynvml.NVMLError, ValueError):
            pynvml.nvmlShutdown()
            raise
        self._counted: tuple[float, tuple[int, int]] | None = None
        """When, and the bytes that had come and gone over PCIe by then."""

    def sample(self, pids: Collection[int], accounted: int | None, now: float) -> GpuSample:
        """`pids`: this engine's; `accounted`: what it knows to have, for where the driver does not tell whose memory is
        whose, as in a container with process numbers of its own."""
        memory = _asked(lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2))
        total, free, used = (int(memory.total - memory.reserved), int(memory.free), int(memory.used)) if memory else (
            None, None, None
        )  # fmt: skip
        others = None if used is None else others_of(used, self._listed(), pids, accounted)
        rates = _asked(lambda: pynvml.nvmlDeviceGetUtilizationRates(self._handle))
        rx, tx = self._pcie(now)
        return GpuSample(
            total=total, ours=None if used is None or others is None else used - others, others=others, free=free,
            utilisation=None if rates is None else rates.gpu / 100, pcie_rx=rx, pcie_tx=tx,
        )  # fmt: skip

    def close(self) -> None:
        pynvml.nvmlShutdown()

    def _listed(self) -> dict[int, int | None]:
        """Process -> what the driver says that it has; None: the driver does not say."""
        asks = (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
        processes = [process for ask in asks for process in _asked(functools.partial(ask, self._handle)) or []]
        return {process.pid: process.usedGpuMemory for process in processes}

    def _pcie(self, now: float) -> tuple[float | None, float | None]:
        """Bytes per second to and from the device since the last sample. From the counters: asking for the rate itself
        blocks for 20 ms."""
        before, fields = self._counted, (pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES)
        values = _asked(lambda: pynvml.nvmlDeviceGetFieldValues(self._handle, list(fields)))
        self._counted = None
        if values is None or any(value.nvmlReturn != pynvml.NVML_SUCCESS for value in values):
            return None, None
        rx, tx = (_number(value) for value in values)
        self._counted = now, (rx, tx)
        if before is None or now <= before[0] or rx < before[1][0] or tx < before[1][1]:  # the counters wrap
            return None, None
        return (rx - before[1][0]) / (now - before[0]), (tx - before[1][1]) / (now - before[0])


def others_of(used: int, listed: Mapping[int, int | None], pids: Collection[int], accounted: int | None) -> int | None:
    """What other processes have of the `used` bytes; None: that cannot be told. What no process in the list has is
    ours: it outlives the one that made it, as weights do."""
    theirs = [amount for pid, amount in listed.items() if pid not in pids]
    known = [amount for amount in theirs if amount is not None]
    if listed.keys() & set(pids) and len(known) == len(theirs):
        return min(used, sum(known))
    return None if accounted is None else max(0, used - accounted)


def _asked(ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _number(value: Any) -> int:
    """Of a field, whatever C type it came in."""
    kinds = {
        pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal", pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal", pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    }  # fmt: skip
    return int(getattr(value.value, kinds.get(value.valueType, "dVal")))
