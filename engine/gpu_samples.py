"""One GPU as NVML, the driver's management library, sees it. Needs no CUDA context."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import pynvml

from engine.cuda import management_handle

T = TypeVar("T")


class GpuSample(NamedTuple):
    """Bytes and rates of one moment, as in `engine.monitor.Sample`; None: this driver does not say."""

    total: int | None = None
    ours: int | None = None
    others: int | None = None
    free: int | None = None
    utilisation: float | None = None
    pcie_rx: float | None = None
    pcie_tx: float | None = None


class Gpu:
    """Device `index` as CUDA counts.

    Resource handling: holds NVML open until `close`. Error handling: `pynvml.NVMLError` from the constructor if there
    is no driver, ValueError if there is no such device; after that, what cannot be told is None.
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
        others = None if used is None else self._others(used, pids, accounted)
        rates = _asked(lambda: pynvml.nvmlDeviceGetUtilizationRates(self._handle))
        rx, tx = self._pcie(now)
        return GpuSample(
            total=total, ours=None if used is None or others is None else used - others, others=others, free=free,
            utilisation=None if rates is None else rates.gpu / 100, pcie_rx=rx, pcie_tx=tx,
        )  # fmt: skip

    def close(self) -> None:
        pynvml.nvmlShutdown()

    def _others(self, used: int, pids: Collection[int], accounted: int | None) -> int | None:
        """What is not in the list of any process outlives the process that made it, as our weights do: it is ours."""
        listed = [
            process
            for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
            for process in _asked(lambda ask=ask: ask(self._handle)) or []  # type: ignore[misc]
        ]
        memory = {process.pid: process.usedGpuMemory for process in listed}
        if memory.keys() & set(pids) and None not in memory.values():
            return min(used, int(sum(amount for pid, amount in memory.items() if pid not in pids)))
        return None if accounted is None else max(0, used - accounted)

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
