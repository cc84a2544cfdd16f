"""`python -m ipc.cuda_devices`: a short-lived process that prints the UUID of each GPU that CUDA shows it, a line each.

Only the driver knows which those are and how it numbers them: CUDA_VISIBLE_DEVICES takes indices, UUIDs, beginnings of
UUIDs and MIG instances, ends at the first that there is not, and counts in the order of CUDA_DEVICE_ORDER, which need
not be that of the management library. No context is made, and no memory of a GPU is taken.
"""

from __future__ import annotations

import ctypes
import sys
import uuid
from typing import Any

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""

LIBRARY = "libcuda.so.1"


def uuids(driver: Any) -> list[str]:
    """Of cuda:0, cuda:1, ... as the management library writes them, without their prefix GPU- or MIG-. OSError says
    what the driver does not do."""
    if (status := driver.cuInit(0)) == NO_DEVICE:
        return []
    _check(driver, "cuInit", status)
    count = ctypes.c_int()
    _check(driver, "cuDeviceGetCount", driver.cuDeviceGetCount(ctypes.byref(count)))
    return [_uuid(driver, number) for number in range(count.value)]


def _uuid(driver: Any, number: int) -> str:
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    _check(driver, "cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), number))
    # The second version: of a MIG instance its own UUID, not that of the GPU it is on (CUDA 11.4).
    _check(driver, "cuDeviceGetUuid", driver.cuDeviceGetUuid_v2(ctypes.byref(raw), device))
    return str(uuid.UUID(bytes=bytes(raw)))


def _check(driver: Any, function: str, status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        raise OSError(f"{function}: {name.value.decode() if name.value else status}")


def main() -> int:
    try:
        print("\n".join(uuids(ctypes.CDLL(LIBRARY))))
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
