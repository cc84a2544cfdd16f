"""Memory on a GPU that several processes map, behind a file descriptor.

Made with `cuMemCreate` and exported as a POSIX descriptor (CUDA driver API, "Virtual Memory Management"): it lives as
long as anybody holds the descriptor or has it mapped, whatever becomes of the process that made it, and the holder
needs no CUDA context. A new process maps it in milliseconds.

The one module of `ipc` that calls the CUDA driver, through `cuda-bindings`. It needs no torch, but shares torch's (the
primary) context and its default stream.
"""

from __future__ import annotations

import fcntl
import functools
import os
import weakref
from types import TracebackType
from typing import Any, Self

from ipc.memory import round_up


class DeviceMemoryError(OSError):
    """A call of the CUDA driver failed: no driver, no memory, or no support for memory behind descriptors."""


class DeviceView:
    """`nbytes` bytes of a mapping, as a one-dimensional array that torch takes without a copy.

    It stands where host memory has a `memoryview`, as far as queues and state slots need one: slices, assignment to a
    slice (which is done when it returns), `nbytes`. Keeps the mapping.
    """

    c_contiguous = True

    def __init__(self, owner: object, device: int, pointer: int, nbytes: int) -> None:
        self.owner = owner
        self.device = device
        self.pointer = pointer
        self.nbytes = nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.pointer, False), "version": 3}

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, part: slice) -> DeviceView:
        start, stop, step = part.indices(self.nbytes)
        assert step == 1, "bytes of a device are taken one after another"
        return DeviceView(self.owner, self.device, self.pointer + start, max(0, stop - start))

    def __setitem__(self, part: slice, source: memoryview | DeviceView) -> None:
        """Copy bytes in, after all work on the default stream, and wait for that."""
        target = self[part]
        if target.nbytes != source.nbytes:
            raise ValueError(f"device memory: got {source.nbytes} bytes for {target.nbytes}")
        driver = _driver()
        if isinstance(source, DeviceView):
            _call(driver.cuMemcpyDtoD, target.pointer, source.pointer, source.nbytes)
        else:
            _call(driver.cuMemcpyHtoD, target.pointer, source.cast("B"), source.nbytes)
        _call(driver.cuStreamSynchronize, 0)

    def cast(self, format: str) -> DeviceView:
        """As of a memoryview; these are bytes already."""
        assert format == "B", f"got {format!r}, expected bytes"
        return self

    def tobytes(self) -> bytes:
        """A copy in host memory."""
        target = bytearray(self.nbytes)
        _call(_driver().cuMemcpyDtoH, target, self.pointer, self.nbytes)
        return bytes(target)


class DeviceMemory:
    """`size` bytes on GPU number `device`, mapped here.

    Resource handling: owns one descriptor until `close`. The mapping goes when the last view or tensor made from `view`
    does. `attach` duplicates the descriptor it is given; the caller still owns that one.
    Error handling: `DeviceMemoryError` from the driver, with what it says.
    """

    def __init__(self, fd: int, device: int, size: int, pointer: int) -> None:
        """Take over `fd`; use `create` or `attach`."""
        self._fd = fd
        self.device = device
        self.size = size
        self._view = DeviceView(_Mapping(device, pointer, _mapped_bytes(device, size)), device, pointer, size)

    @classmethod
    def create(cls, device: int, size: int) -> Self:
        """Allocate `size` zero bytes."""
        if size <= 0:
            raise ValueError(f"device memory: got size {size}, expected at least 1 byte")
        driver = _driver()
        _use(device)
        mapped = _mapped_bytes(device, size)
        handle = _call(driver.cuMemCreate, mapped, _properties(device), 0)
        try:
            pointer = _map(device, handle, mapped)
            memory = cls(int(_call(driver.cuMemExportToShareableHandle, handle, _fd_type(), 0)), device, size, pointer)
        finally:
            _call(driver.cuMemRelease, handle)  # the descriptor and the mapping keep the memory
        _call(driver.cuMemsetD8, memory.view.pointer, 0, size)
        _call(driver.cuStreamSynchronize, 0)
        return memory

    @classmethod
    def attach(cls, fd: int, device: int, size: int) -> Self:
        """Map memory of `size` bytes that another process made on this device."""
        driver = _driver()
        _use(device)
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            handle = _call(driver.cuMemImportFromShareableHandle, own, _fd_type())
            try:
                return cls(own, device, size, _map(device, handle, _mapped_bytes(device, size)))
            finally:
                _call(driver.cuMemRelease, handle)
        except BaseException:
            os.close(own)
            raise

    @property
    def fd(self) -> int:
        """The descriptor, to be passed to another process; stays owned by this object."""
        return self._fd

    @property
    def view(self) -> DeviceView:
        """All bytes."""
        return self._view

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._view = DeviceView(None, self.device, 0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Mapping:
    """An address range; unmapped when nothing refers to it any more, or by the end of the process."""

    def __init__(self, device: int, pointer: int, size: int) -> None:
        weakref.finalize(self, _unmap, device, pointer, size).atexit = False


def _unmap(device: int, pointer: int, size: int) -> None:
    driver = _driver()
    _use(device)
    _call(driver.cuCtxSynchronize)  # nothing that runs may still use it
    _call(driver.cuMemUnmap, pointer, size)
    _call(driver.cuMemAddressFree, pointer, size)


def _map(device: int, handle: Any, size: int) -> int:
    """The address where the memory of this handle is now readable and writable."""
    driver = _driver()
    pointer = _call(driver.cuMemAddressReserve, size, 0, 0, 0)
    try:
        _call(driver.cuMemMap, pointer, size, 0, handle, 0)
        access = driver.CUmemAccessDesc()
        access.location = _properties(device).location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        _call(driver.cuMemSetAccess, pointer, size, [access], 1)
    except BaseException:
        driver.cuMemUnmap(pointer, size)
        driver.cuMemAddressFree(pointer, size)
        raise
    return int(pointer)


def _mapped_bytes(device: int, size: int) -> int:
    """What is allocated for `size` bytes: whole pages of the device, 2 MiB each."""
    return round_up(size, _granularity(device))


@functools.cache
def _granularity(device: int) -> int:
    driver = _driver()
    kind = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(_call(driver.cuMemGetAllocationGranularity, _properties(device), kind))


def _properties(device: int) -> Any:
    """Of memory on this device that can be exported as a descriptor."""
    driver = _driver()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = _fd_type()
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = device
    properties.location = location
    return properties


def _fd_type() -> Any:
    return _driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


@functools.cache
def _driver() -> Any:
    """The bindings, with the driver initialised."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceMemoryError("the package cuda-bindings is not installed: pip install 'wan-engine[gpu]'") from error
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # libcuda is not there
        raise DeviceMemoryError(f"no CUDA driver: {error}") from error
    _check(driver, driver.cuInit, status)
    return driver


@functools.cache
def _primary_context(device: int) -> Any:
    """The context that torch uses too; kept until the process ends."""
    driver = _driver()
    return _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, device))


def _use(device: int) -> None:
    """Make the device's context that of this thread."""
    _call(_driver().cuCtxSetCurrent, _primary_context(device))


def _call(function: Any, *arguments: Any) -> Any:
    """A driver call; its result, if it has one."""
    status, *results = function(*arguments)
    _check(_driver(), function, status)
    return results[0] if results else None


def _check(driver: Any, function: Any, status: Any) -> None:
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        text = name.decode() if isinstance(name, bytes) else str(status)
        raise DeviceMemoryError(f"{function.__name__}: {text}")
