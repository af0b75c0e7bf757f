"""The stub driver: how it is compiled, and its memory behind the runtime's interface."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import byref, c_char_p, c_long, c_size_t, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.images.read import Array
from mae_deploy.runtime.cuda.driver import CudaError
from mae_deploy.runtime.cuda.memory import Event, Memory, Stream

SOURCE = Path(__file__).with_name("libcuda_stub.c")
NAME = "libcuda.so.1"


def compile_stub(folder: Path, *, soname: str | None = None) -> Path:
    """The library in a folder, or a skipped test. With NVIDIA's own name inside, a process that has loaded it finds no
    other driver.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc to compile the stub of the CUDA driver with")
    library = folder / NAME
    named = [f"-Wl,-soname,{soname}"] if soname else []
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, *named, "-lpthread", "-ldl"], check=True)
    return library


def load_stub(library: Path) -> ctypes.CDLL:
    """The library with one GPU, and nothing of what was done with it before."""
    driver = ctypes.CDLL(str(library))
    driver.stub_calls.restype = c_char_p
    driver.stub_limit.argtypes = (c_long,)
    driver.stub_configure(0, 1)
    driver.stub_limit(1 << 30)
    driver.stub_forget_calls()
    return driver


def calls(driver: ctypes.CDLL) -> list[str]:
    """What was asked of the driver since the last time, of what it notes."""
    found: list[str] = driver.stub_calls().decode().split()
    driver.stub_forget_calls()
    return found


class StubMemory(Memory):
    """The stub's memory, through ctypes: both packages that the runtime knows look for NVIDIA's driver by its own
    name.
    """

    backend = "stub"

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        self._context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), 0)
        self._undo: list[tuple[str, Any]] = []
        self._is_open = True

    def active(self) -> AbstractContextManager[None]:
        return self._active()

    @contextmanager
    def _active(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def allocate(self, nbytes: int) -> int:
        pointer = c_ulonglong()
        self._call("cuMemAlloc_v2", byref(pointer), c_size_t(nbytes))
        self._undo.append(("cuMemFree_v2", pointer))
        return pointer.value

    def free(self, pointer: int) -> None:
        raise AssertionError("the engine frees nothing before it is closed")

    def pinned(self, nbytes: int) -> Array:
        pointer = c_void_p()
        self._call("cuMemHostAlloc", byref(pointer), c_size_t(nbytes), 0)
        self._undo.append(("cuMemFreeHost", pointer))
        return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(pointer.value or 0))

    def stream(self) -> Stream:
        return _StubStream(self, self._new("cuStreamCreate", 1, "cuStreamDestroy_v2"))

    def event(self) -> Event:
        return _StubEvent(self, self._new("cuEventCreate", 2, "cuEventDestroy_v2"))

    def copy_in(self, pointer: int, array: Array, stream: Any) -> None:
        self._call(
            "cuMemcpyHtoDAsync_v2",
            c_ulonglong(pointer),
            c_void_p(array.ctypes.data),
            c_size_t(array.nbytes),
            c_void_p(stream.handle),
        )

    def copy_out(self, array: Array, pointer: int, stream: Any) -> None:
        self._call(
            "cuMemcpyDtoHAsync_v2",
            c_void_p(array.ctypes.data),
            c_ulonglong(pointer),
            c_size_t(array.nbytes),
            c_void_p(stream.handle),
        )

    def copy_device(self, to: int, source: int, nbytes: int, stream: Any) -> None:
        self._call(
            "cuMemcpyDtoDAsync_v2", c_ulonglong(to), c_ulonglong(source), c_size_t(nbytes), c_void_p(stream.handle)
        )

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with self.active():
                for name, handle in reversed(self._undo):
                    self._call(name, handle)
            self._call("cuDevicePrimaryCtxRelease_v2", 0)

    def _new(self, create: str, flags: int, destroy: str) -> int:
        handle = c_void_p()
        self._call(create, byref(handle), flags)
        self._undo.append((destroy, handle))
        return handle.value or 0

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            raise CudaError(f"{name}: {status}")


class _StubStream(Stream):
    def __init__(self, memory: StubMemory, handle: int) -> None:
        self._memory, self.handle = memory, handle

    def wait(self, event: Any) -> None:
        self._memory._call("cuStreamWaitEvent", c_void_p(self.handle), c_void_p(event.handle), 0)

    def synchronize(self) -> None:
        self._memory._call("cuStreamSynchronize", c_void_p(self.handle))


class _StubEvent(Event):
    def __init__(self, memory: StubMemory, handle: int) -> None:
        self._memory, self.handle = memory, handle

    def record(self, stream: Any) -> None:
        self._memory._call("cuEventRecord", c_void_p(self.handle), c_void_p(stream.handle))
