"""GPU memory through NVIDIA's cuda-bindings."""

from __future__ import annotations

import ctypes
import weakref
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np

from mae_deploy.errors import import_optional
from mae_deploy.images.read import Array
from mae_deploy.runtime.cuda.driver import CudaError
from mae_deploy.runtime.cuda.memory import DISABLE_TIMING, NON_BLOCKING, Event, Memory, Stream


class _Driver:
    """The functions of cuda-bindings, which return a status and values, as functions that return the values or
    raise.
    """

    def __init__(self) -> None:
        self.module = import_optional("cuda.bindings.driver", extra="trt-bindings")

    def call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self.module, name)(*arguments)
        if status != 0:
            _, text = self.module.cuGetErrorString(status)
            raise CudaError(
                f"CUDA failed: {name}: {text.decode(errors='replace') if text else 'unknown error'} (error"
                f" {int(status)})"
            )
        return values[0] if values else None


class _BindingsActive:
    def __init__(self, driver: _Driver, context: Any) -> None:
        self._driver, self._context = driver, context

    def __enter__(self) -> None:
        self._driver.call("cuCtxPushCurrent", self._context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.call("cuCtxPopCurrent")


class _BindingsStream(Stream):
    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self.handle = int(driver.call("cuStreamCreate", NON_BLOCKING))

    def wait(self, event: _BindingsEvent) -> None:
        self._driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        self._driver.call("cuStreamSynchronize", self.handle)


class _BindingsEvent(Event):
    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self.handle = int(driver.call("cuEventCreate", DISABLE_TIMING))

    def record(self, stream: _BindingsStream) -> None:
        self._driver.call("cuEventRecord", self.handle, stream.handle)


class BindingsMemory(Memory):
    """See `Memory`."""

    backend = "cuda-bindings"

    def __init__(self, index: int) -> None:
        self._driver = _Driver()
        self._driver.call("cuInit", 0)
        device = self._driver.call("cuDeviceGet", index)
        self._active = _BindingsActive(self._driver, self._driver.call("cuDevicePrimaryCtxRetain", device))
        self._given: dict[tuple[str, int], None] = {}
        """How each thing is given back, in the order in which they were made."""
        self._give_back = weakref.finalize(
            self, _give_back_to_bindings, self._active, self._driver.module, device, self._given
        )

    def active(self) -> AbstractContextManager[None]:
        return self._active

    def allocate(self, nbytes: int) -> int:
        return self._keep("cuMemFree", int(self._driver.call("cuMemAlloc", max(nbytes, 1))))

    def free(self, pointer: int) -> None:
        del self._given["cuMemFree", pointer]
        self._driver.call("cuMemFree", pointer)

    def pinned(self, nbytes: int) -> Array:
        nbytes = max(nbytes, 1)
        address = self._keep("cuMemFreeHost", int(self._driver.call("cuMemHostAlloc", nbytes, 0)))
        return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))

    def stream(self) -> Stream:
        stream = _BindingsStream(self._driver)
        self._keep("cuStreamDestroy", stream.handle)
        return stream

    def event(self) -> Event:
        event = _BindingsEvent(self._driver)
        self._keep("cuEventDestroy", event.handle)
        return event

    def copy_in(self, pointer: int, array: Array, stream: _BindingsStream) -> None:
        self._driver.call("cuMemcpyHtoDAsync", pointer, array.ctypes.data, array.nbytes, stream.handle)

    def copy_out(self, array: Array, pointer: int, stream: _BindingsStream) -> None:
        self._driver.call("cuMemcpyDtoHAsync", array.ctypes.data, pointer, array.nbytes, stream.handle)

    def copy_device(self, to: int, source: int, nbytes: int, stream: _BindingsStream) -> None:
        self._driver.call("cuMemcpyDtoDAsync", to, source, nbytes, stream.handle)

    def close(self) -> None:
        self._give_back()

    def _keep(self, give_back: str, handle: int) -> int:
        self._given[give_back, handle] = None
        return handle


def _give_back_to_bindings(
    active: _BindingsActive, driver: Any, device: Any, given: dict[tuple[str, int], None]
) -> None:
    with active:
        for give_back, handle in reversed(given):
            getattr(driver, give_back)(
                handle
            )  # fails only after a failure on the GPU, which was reported where it happened
    driver.cuDevicePrimaryCtxRelease(device)
