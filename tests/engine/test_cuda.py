"""Which GPUs the engine counts, and how it numbers them: with what the driver answers on machines with GPUs."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from engine import SystemParams, cuda
from engine.cuda import management_handle, visible_devices
from engine.devices import resolve_devices
from ipc.cuda_devices import uuids
from ipc.errors import BadConfig

FIRST, SECOND, SLICE = (f"{number}0000000-1111-2222-3333-444444444444" for number in (1, 2, 3))


class Driver:
    """CUDA's driver of a machine with these GPUs, in the order in which it shows them."""

    def __init__(self, *visible: str, broken: int = 0) -> None:
        self.visible, self.broken = visible, broken

    def cuInit(self, flags: int) -> int:
        return self.broken or (0 if self.visible else 100)

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.visible)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetUuid_v2(self, raw: Any, device: Any) -> int:
        raw._obj[:] = bytes.fromhex(self.visible[device.value].replace("-", ""))
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Driver]]:
    """Value of CUDA_VISIBLE_DEVICES -> what the driver answers in that environment. NVML has two GPUs in each."""
    answers: dict[str, Driver] = {}
    library: Any = types.ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.nvmlInit = library.nvmlShutdown = lambda: None
    library.nvmlDeviceGetCount = lambda: 2
    known = {f"GPU-{FIRST}": "handle 0", f"GPU-{SECOND}": "handle 1", f"MIG-{SLICE}": "slice"}

    def handle(name: str) -> str:
        if name not in known:
            raise library.NVMLError
        return known[name]

    library.nvmlDeviceGetHandleByUUID = handle
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(cuda, "ask_driver", lambda: uuids(answers[cuda.os.environ.get("CUDA_VISIBLE_DEVICES", "all")]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda._visible.cache_clear()
    yield answers
    cuda._visible.cache_clear()


def test_what_is_hidden_is_not_counted(machine: dict[str, Driver], monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA_VISIBLE_DEVICES="" the engine computes on the CPU, and a GPU that is asked for is refused with the
    reason; without it, on the first GPU. A change of the environment is noticed."""
    machine["all"], machine[""], machine["1"] = Driver(FIRST, SECOND), Driver(), Driver(SECOND)
    assert resolve_devices(SystemParams()) == ("cuda:0", ("cuda:0",))
    assert resolve_devices(SystemParams(device="cuda:1")) == ("cuda:1", ("cuda:1",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_devices(SystemParams()) == ("cpu", ("cpu",))
    with pytest.raises(BadConfig, match="CUDA shows 0 devices with CUDA_VISIBLE_DEVICES=''; cpu always works"):
        resolve_devices(SystemParams(device="cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert resolve_devices(SystemParams()) == ("cuda:0", ("cuda:0",))
    with pytest.raises(BadConfig, match="device is 'cuda:1', but CUDA shows 1 devices"):
        resolve_devices(SystemParams(dit_devices=("cuda:0", "cuda:1")))


def test_the_management_library_is_asked_for_the_same_gpu(
    machine: dict[str, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order and the form in which GPUs are named: the handle is that of the UUID which CUDA tells; of a
    MIG instance, too. A number that CUDA does not show has none."""
    machine["1,0"], machine["MIG"] = Driver(SECOND, FIRST), Driver(SLICE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [management_handle(device) for device in ("cuda", "cuda:0", "cuda:1")] == ["handle 1"] * 2 + ["handle 0"]
    with pytest.raises(ValueError, match=r"no cuda:2: CUDA shows 2 devices"):
        management_handle("cuda:2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG")
    assert management_handle("cuda:0") == "slice"


def test_a_driver_that_does_not_work(machine: dict[str, Driver], caplog: pytest.LogCaptureFixture) -> None:
    """It is as none, and the log says what is wrong, once."""
    machine["all"] = Driver(broken=803)
    assert visible_devices() == visible_devices() == ()
    assert [record.getMessage() for record in caplog.records] == [
        "there is a GPU, but CUDA does not work, and nothing is computed on it: cuInit: "
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
    ]


def test_the_process_that_asks_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without the driver's library: the process of its own ends with the name of what it did not find."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(OSError, match=r"libcuda\.so\.1: cannot open shared object file"):
            cuda.ask_driver()
    else:
        assert all(len(name) == len(FIRST) for name in cuda.ask_driver())
