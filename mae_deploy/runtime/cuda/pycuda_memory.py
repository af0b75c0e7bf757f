"""GPU memory through pycuda."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np

from mae_deploy.errors import import_optional
from mae_deploy.images.read import Array
from mae_deploy.runtime.cuda.driver import CudaError, pop_context
from mae_deploy.runtime.cuda.memory import DISABLE_TIMING, NON_BLOCKING, Event, Memory, Stream


class _PycudaActive:
    def __init__(self, driver: Any, context: Any) -> None:
        self._push, self._pop, self._error = context.push, driver.Context.pop, driver.Error

    def __enter__(self) -> None:
        self._push()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pop()
        if isinstance(error, self._error):
            raise CudaError(f"CUDA failed: {' '.join(str(error).split())}") from error


class _PycudaStream(Stream):
    def __init__(self, driver: Any) -> None:
        self.inner = driver.Stream(NON_BLOCKING)
        self.handle = int(self.inner.handle)

    def wait(self, event: _PycudaEvent) -> None:
        self.inner.wait_for_event(event.inner)

    def synchronize(self) -> None:
        self.inner.synchronize()


class _PycudaEvent(Event):
    def __init__(self, driver: Any) -> None:
        self.inner = driver.Event(DISABLE_TIMING)

    def record(self, stream: _PycudaStream) -> None:
        self.inner.record(stream.inner)


class PycudaMemory(Memory):
    """See `Memory`."""

    backend = "pycuda"

    def __init__(self, index: int) -> None:
        self._driver = import_optional("pycuda.driver", extra="trt")
        self._driver.init()
        context = self._driver.Device(index).retain_primary_context()
        self._active = _PycudaActive(self._driver, context)
        self._made: list[Any] = []
        self._pinned: list[Any] = []
        self._allocations: dict[int, Any] = {}
        # Before the interpreter ends, too: pycuda cannot clean up after that.
        self._give_back = weakref.finalize(
            self, _give_back_to_pycuda, self._active, context, self._made, self._pinned, self._allocations
        )

    def active(self) -> AbstractContextManager[None]:
        return self._active

    def allocate(self, nbytes: int) -> int:
        allocation = self._driver.mem_alloc(max(nbytes, 1))
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, pointer: int) -> None:
        self._allocations.pop(pointer).free()

    def pinned(self, nbytes: int) -> Array:
        array: Array = self._driver.pagelocked_empty(max(nbytes, 1), np.uint8)
        self._pinned.append(array.base)
        return array

    def stream(self) -> Stream:
        stream = _PycudaStream(self._driver)
        self._made.append(stream)
        return stream

    def event(self) -> Event:
        event = _PycudaEvent(self._driver)
        self._made.append(event)
        return event

    def copy_in(self, pointer: int, array: Array, stream: _PycudaStream) -> None:
        self._driver.memcpy_htod_async(pointer, array, stream.inner)

    def copy_out(self, array: Array, pointer: int, stream: _PycudaStream) -> None:
        self._driver.memcpy_dtoh_async(array, pointer, stream.inner)

    def copy_device(self, to: int, source: int, nbytes: int, stream: _PycudaStream) -> None:
        self._driver.memcpy_dtod_async(to, source, nbytes, stream.inner)

    def close(self) -> None:
        self._give_back()


def _give_back_to_pycuda(
    active: _PycudaActive, context: Any, made: list[Any], pinned: list[Any], allocations: dict[int, Any]
) -> None:
    # pycuda frees what belongs to a context only where that is current, or in the thread that made it.
    with active:
        for stream_or_event in made:
            del stream_or_event.inner
        for allocation in (*pinned, *allocations.values()):
            allocation.free()
    # pycuda gives a primary context back only where it is current, forgets it then, and leaves it on the driver's
    # stack: so it is taken off first.
    context.push()
    pop_context()
    context.detach()
