"""NVIDIA's driver through ctypes: which GPUs there are, CUDA graphs, and one stream that waits for another.

Nothing here needs a package. Asking for GPUs makes no context, so it costs no memory on them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from mae_deploy.errors import MaeDeployError, MissingDependency

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
"""NVIDIA's driver."""

_NO_DEVICE, _STUB_LIBRARY = 100, 34
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_CAPTURE_THREAD_LOCAL = 1
_WITH_TIMING, _DISABLE_TIMING = 0, 2

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
}


class CudaError(MaeDeployError):
    """A call of the CUDA driver failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU that the driver sees."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    driver: str
    """The CUDA version that the driver has: "12.4"."""


def gpus() -> list[Gpu]:
    """Every GPU of this machine, in the driver's order; empty without a driver or a device."""
    return _survey()[0]


def require_gpu(index: int = 0) -> Gpu:
    """The GPU of this index.

    Raises:
        MissingDependency: there is no driver, it does not work, it has no GPU, or none of this index.
    """
    found, problem = _survey()
    if problem is not None:
        raise problem
    if not 0 <= index < len(found):
        listed = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in found)
        raise MissingDependency(f"there is no GPU {index}", hint=f"this machine has: {listed}")
    return found[index]


class CudaGraph:
    """The work of one enqueue, recorded once and launched again as a whole; its addresses and shapes are fixed."""

    def __init__(self, executable: int) -> None:
        self._executable: int | None = executable
        self._launch = _load_driver().cuGraphLaunch

    @classmethod
    def capture(cls, stream: int, enqueue: Callable[[], None]) -> CudaGraph:
        """Record what `enqueue` puts on the stream; nothing of it is computed.

        Only this thread is kept from calls that would break the capture. The stream must not be the default one, and
        the same work must have been done once before: libraries allocate then.

        Raises:
            CudaError: the work cannot be captured.
        """
        driver = _load_driver()
        graph, executable = c_void_p(), c_void_p()
        _check(driver.cuStreamBeginCapture_v2(stream, _CAPTURE_THREAD_LOCAL), "begin a CUDA graph")
        try:
            enqueue()
        except BaseException:
            driver.cuStreamEndCapture(
                stream, byref(graph)
            )  # the stream must leave the capture; that it failed is known
            _destroy(graph)
            raise
        _check(driver.cuStreamEndCapture(stream, byref(graph)), "capture a CUDA graph")
        try:
            _check(driver.cuGraphInstantiateWithFlags(byref(executable), graph, 0), "instantiate a CUDA graph")
        finally:
            _destroy(graph)
        assert executable.value is not None
        return cls(executable.value)

    def launch(self, stream: int) -> None:
        """Put the recorded work on a stream.

        Raises:
            CudaError: the driver refuses it.
        """
        status = self._launch(self._executable, stream)
        if status:
            _check(status, "launch a CUDA graph")

    def close(self) -> None:
        """Free the graph, which must not be running; closing twice does nothing."""
        if self._executable is not None:
            _load_driver().cuGraphExecDestroy(self._executable)
            self._executable = None


def wait_for_stream(stream: int, other: int) -> None:
    """Let what is put on `stream` from now on wait for all that is on `other` now; 0 is the default stream.

    Raises:
        CudaError: one of them is not a stream of the current context.
    """
    driver = _load_driver()
    with _event(_DISABLE_TIMING) as event:
        _check(driver.cuEventRecord(event, other), "record an event")
        _check(driver.cuStreamWaitEvent(stream, event, 0), "wait for an event")


def seconds_on(stream: int, enqueue: Callable[[], None]) -> float:
    """How long the GPU takes for what `enqueue` puts on a stream, by its own clock; waits for it.

    Raises:
        CudaError: the work failed, or it is not a stream of the current context.
    """
    driver, milliseconds = _load_driver(), c_float()
    with _event(_WITH_TIMING) as start, _event(_WITH_TIMING) as end:
        _check(driver.cuEventRecord(start, stream), "record an event")
        enqueue()
        _check(driver.cuEventRecord(end, stream), "record an event")
        _check(driver.cuEventSynchronize(end), "wait for an event")
        _check(driver.cuEventElapsedTime(byref(milliseconds), start, end), "time what is between two events")
    return milliseconds.value / 1000


def pop_context() -> None:
    """Take the calling thread's current context from it, whoever pushed it."""
    _check(_load_driver().cuCtxPopCurrent_v2(byref(c_void_p())), "leave a context")


def _survey() -> tuple[list[Gpu], MissingDependency | None]:
    """The GPUs, or why there are none."""
    try:
        driver = _load_driver()
    except OSError as error:
        return [], MissingDependency(
            f"there is no NVIDIA driver here: {LIBRARY} cannot be loaded ({_one_line(error)})",
            hint="install the driver; in a container, start it with the GPUs (docker run --gpus all)",
        )
    except AttributeError as error:
        return [], MissingDependency(
            f"the NVIDIA driver is too old ({_one_line(error)})", hint="CUDA 11.4 or later is needed"
        )
    count = c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(byref(count))
    if status == _STUB_LIBRARY:
        return [], MissingDependency(
            f"{LIBRARY} is the stand-in that the CUDA toolkit brings, not a driver",
            hint="take its folder out of LD_LIBRARY_PATH",
        )
    if status not in (0, _NO_DEVICE):
        return [], MissingDependency(
            f"the NVIDIA driver does not start: {_reason(status)}", hint="nvidia-smi says more"
        )
    if status == _NO_DEVICE or count.value == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = (
            "nvidia-smi lists the GPUs of this machine"
            if hidden is None
            else f"CUDA_VISIBLE_DEVICES is '{hidden}', which may hide them"
        )
        return [], MissingDependency("the NVIDIA driver sees no GPU", hint=hint)
    return [_describe(driver, index) for index in range(count.value)], None


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor, version = c_int(), c_int(), c_int(), c_int()
    name, memory = ctypes.create_string_buffer(256), c_size_t()
    driver.cuDeviceGet(byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    driver.cuDeviceTotalMem_v2(byref(memory), device)
    driver.cuDriverGetVersion(byref(version))
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace"),
        compute_capability=(major.value, minor.value),
        memory_bytes=memory.value,
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


@contextmanager
def _event(flags: int) -> Iterator[c_void_p]:
    """An event of the current context; it is freed when it has happened."""
    driver, event = _load_driver(), c_void_p()
    _check(driver.cuEventCreate(byref(event), flags), "create an event")
    try:
        yield event
    finally:
        driver.cuEventDestroy_v2(event)


def _destroy(graph: c_void_p) -> None:
    if graph:
        _load_driver().cuGraphDestroy(graph)


_drivers: dict[str, ctypes.CDLL] = {}


def _load_driver() -> ctypes.CDLL:
    """The library with its functions' types; the same one at each call."""
    driver = _drivers.get(LIBRARY)
    if driver is None:
        driver = ctypes.CDLL(LIBRARY)
        for name, arguments in _SIGNATURES.items():
            function = getattr(driver, name)
            function.argtypes, function.restype = arguments, c_int
        _drivers[LIBRARY] = driver
    return driver


def _check(status: int, what: str) -> None:
    if status:
        raise CudaError(f"CUDA cannot {what}: {_reason(status)}")


def _reason(status: int) -> str:
    text = c_char_p()
    known = _load_driver().cuGetErrorString(status, byref(text)) == 0 and text.value
    return f"{text.value.decode(errors='replace') if known and text.value else 'unknown error'} (error {status})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
