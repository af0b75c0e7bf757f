"""GPU memory, streams and events behind one small interface, through pycuda or cuda-bindings.

Both use the primary context of the GPU, which other libraries in the process share, and push it on the calling thread for as long as a block needs it:
a context of one's own, as pycuda.autoinit makes, breaks beside PyTorch and in threads (https://github.com/inducer/pycuda/issues/285).
"""

from __future__ import annotations

import ctypes
import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from mae_deploy.errors import ConfigError, MissingDependency, import_optional
from mae_deploy.images.preprocess import Array
from mae_deploy.runtime.cuda.driver import CudaError, pop_context, require_gpu

if TYPE_CHECKING:
    from typing_extensions import Self

BACKENDS = ("pycuda", "cuda-bindings")

_NON_BLOCKING = 1
"""Streams that do not wait for the default stream: what another thread does there would break the capture of a CUDA graph."""
_DISABLE_TIMING = 2


class Event(ABC):
    """A point in a stream's work."""

    @abstractmethod
    def record(self, stream: Any) -> None:
        """Let the event happen when all that is on the stream now is done."""


class Stream(ABC):
    """Work that the GPU does in order, beside that of other streams."""

    handle: int
    """The driver's `CUstream`."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Let what comes after wait for an event; one that was never recorded has happened."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that is on the stream is done."""


class Memory(ABC):
    """What one GPU's primary context gives out, and takes back when this is closed or forgotten; a context manager that closes it.

    Every method but `close` is called inside `with memory.active():`.
    """

    backend: str

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Make the context current on the calling thread for as long as the block runs; blocks nest.

        Raises:
            CudaError: in place of whatever the package raises inside the block.
        """

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """The address of new memory on the GPU, aligned to 256 bytes."""

    @abstractmethod
    def free(self, pointer: int) -> None:
        """Give back what `allocate` gave."""

    @abstractmethod
    def pinned(self, nbytes: int) -> Array:
        """Bytes on the host, uint8 `(nbytes,)`, that the GPU copies from and to by itself; they are gone when the memory is closed."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream, which does not wait for the default stream."""

    @abstractmethod
    def event(self) -> Event:
        """A new event."""

    @abstractmethod
    def copy_in(self, pointer: int, array: Array, stream: Any) -> None:
        """Put a copy from pinned memory to the GPU on the stream."""

    @abstractmethod
    def copy_out(self, array: Array, pointer: int, stream: Any) -> None:
        """Put a copy from the GPU to pinned memory on the stream."""

    @abstractmethod
    def copy_device(self, to: int, source: int, nbytes: int, stream: Any) -> None:
        """Put a copy within the GPU on the stream."""

    @abstractmethod
    def close(self) -> None:
        """Give back everything, then the context, from any thread; nothing may run any more. Closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_memory(backend: str = "auto", index: int = 0) -> Memory:
    """The memory of a GPU.

    Args:
        backend: one of `BACKENDS`, or auto: pycuda where it can be imported, else cuda-bindings.

    Raises:
        ConfigError: an unknown backend.
        MissingDependency: no such GPU, or the package is absent.
    """
    kinds: dict[str, type[Memory]] = {"pycuda": _PycudaMemory, "cuda-bindings": _BindingsMemory}
    if backend not in ("auto", *kinds):
        raise ConfigError(f"unknown CUDA backend '{backend}'", hint=f"known: auto, {', '.join(kinds)}")
    require_gpu(index)
    absent = []
    for kind in kinds.values() if backend == "auto" else [kinds[backend]]:
        try:
            return kind(index)  # type: ignore[call-arg]
        except MissingDependency as error:
            absent.append(str(error))
    raise MissingDependency("; ".join(absent), hint="pip install 'mae-deploy[trt]'")


# --- pycuda ----------------------------------------------------------------------------------------------------------


class _PycudaActive:
    def __init__(self, driver: Any, context: Any) -> None:
        self._push, self._pop, self._error = context.push, driver.Context.pop, driver.Error

    def __enter__(self) -> None:
        self._push()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pop()
        if isinstance(error, self._error):
            raise CudaError(f"CUDA failed: {' '.join(str(error).split())}") from error


class _PycudaStream(Stream):
    def __init__(self, driver: Any) -> None:
        self.inner = driver.Stream(_NON_BLOCKING)
        self.handle = int(self.inner.handle)

    def wait(self, event: _PycudaEvent) -> None:
        self.inner.wait_for_event(event.inner)

    def synchronize(self) -> None:
        self.inner.synchronize()


class _PycudaEvent(Event):
    def __init__(self, driver: Any) -> None:
        self.inner = driver.Event(_DISABLE_TIMING)

    def record(self, stream: _PycudaStream) -> None:
        self.inner.record(stream.inner)


class _PycudaMemory(Memory):
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
        self._give_back = weakref.finalize(self, _give_back_to_pycuda, self._active, context, self._made, self._pinned, self._allocations)

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


def _give_back_to_pycuda(active: _PycudaActive, context: Any, made: list[Any], pinned: list[Any], allocations: dict[int, Any]) -> None:
    # pycuda frees what belongs to a context only where that is current, or in the thread that made it.
    with active:
        for stream_or_event in made:
            del stream_or_event.inner
        for allocation in (*pinned, *allocations.values()):
            allocation.free()
    # pycuda gives a primary context back only where it is current, forgets it then, and leaves it on the driver's stack: so it is taken off first.
    context.push()
    pop_context()
    context.detach()


# --- cuda-bindings ---------------------------------------------------------------------------------------------------


class _Driver:
    """The functions of cuda-bindings, which return a status and values, as functions that return the values or raise."""

    def __init__(self) -> None:
        self.module = import_optional("cuda.bindings.driver", extra="trt")

    def call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self.module, name)(*arguments)
        if status != 0:
            _, text = self.module.cuGetErrorString(status)
            raise CudaError(f"CUDA failed: {name}: {text.decode(errors='replace') if text else 'unknown error'} (error {int(status)})")
        return values[0] if values else None


class _BindingsActive:
    def __init__(self, driver: _Driver, context: Any) -> None:
        self._driver, self._context = driver, context

    def __enter__(self) -> None:
        self._driver.call("cuCtxPushCurrent", self._context)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._driver.call("cuCtxPopCurrent")


class _BindingsStream(Stream):
    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self.handle = int(driver.call("cuStreamCreate", _NON_BLOCKING))

    def wait(self, event: _BindingsEvent) -> None:
        self._driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        self._driver.call("cuStreamSynchronize", self.handle)


class _BindingsEvent(Event):
    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self.handle = int(driver.call("cuEventCreate", _DISABLE_TIMING))

    def record(self, stream: _BindingsStream) -> None:
        self._driver.call("cuEventRecord", self.handle, stream.handle)


class _BindingsMemory(Memory):
    backend = "cuda-bindings"

    def __init__(self, index: int) -> None:
        self._driver = _Driver()
        self._driver.call("cuInit", 0)
        device = self._driver.call("cuDeviceGet", index)
        self._active = _BindingsActive(self._driver, self._driver.call("cuDevicePrimaryCtxRetain", device))
        self._given: dict[tuple[str, int], None] = {}
        """How each thing is given back, in the order in which they were made."""
        self._give_back = weakref.finalize(self, _give_back_to_bindings, self._active, self._driver.module, device, self._given)

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


def _give_back_to_bindings(active: _BindingsActive, driver: Any, device: Any, given: dict[tuple[str, int], None]) -> None:
    with active:
        for give_back, handle in reversed(given):
            getattr(driver, give_back)(handle)  # fails only after a failure on the GPU, which was reported where it happened
    driver.cuDevicePrimaryCtxRelease(device)
