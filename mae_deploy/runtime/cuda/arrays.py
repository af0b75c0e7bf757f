"""Arrays on the GPU, from and to other libraries, without one of them: the CUDA array interface and DLPack.

https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, https://dmlc.github.io/dlpack/latest/
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p, py_object
from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.cuda.driver import wait_for_stream

CUDA = 2
"""DLPack's number for memory of a GPU."""

_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}
"""DLPack's type codes as NumPy's kinds."""

_LEGACY_DEFAULT_STREAM, _LEGACY_HANDLE = 0, 1
"""The driver knows it by both; the CUDA array interface and DLPack by the second."""

_NO_STREAM = -1
"""DLPack: the caller waits by itself."""


@dataclass(frozen=True, slots=True)
class DeviceView:
    """Where an array of the caller's lies."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    """What fills the array is on this stream, and must be waited for; None: nothing is to be waited for."""
    owner: object
    """Keeps the memory alive."""


class Lease:
    """Whether a memory that is used again still holds what was put there; alive as long as somebody may ask."""

    valid = True


class DeviceArray:
    """An output on the GPU, contiguous, that torch, CuPy, JAX or Numba can read in place.

    It is complete, or where it has a stream, for what is on that from then on. It is the engine's memory, which a later
    run uses again: at the earliest the second one after this. Copy what is needed longer.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        index: int,
        lease: Lease,
        owner: object,
        stream: int | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.index = index
        """Of the GPU."""
        self.stream = stream
        """The driver's handle of the stream on which it is complete; None: everywhere."""
        self._pointer = pointer
        self._lease = lease
        self._owner = owner
        """Keeps the memory, in whatever library it is read."""

    @property
    def pointer(self) -> int:
        """The address on the GPU.

        Raises:
            MaeDeployError: a later run has written there, or the engine is closed.
        """
        if not self._lease.valid:
            raise MaeDeployError(
                "this output is gone: a later run has used its memory, or the engine is closed",
                hint="copy an output before the second next run",
            )
        return self._pointer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": _LEGACY_HANDLE if self.stream == _LEGACY_DEFAULT_STREAM else self.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.index

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule of this memory; a stream other than that on which it is complete waits for that.

        Raises:
            CudaError: the caller's stream cannot wait.
            BufferError: it is wanted elsewhere, or as a copy.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("a DeviceArray is given in place, on its own GPU")
        if self.stream is not None and stream not in (_NO_STREAM, self.stream):
            wait_for_stream(_LEGACY_DEFAULT_STREAM if stream is None else stream, self.stream)
        return _export(self.pointer, self.shape, self.dtype, self.__dlpack_device__(), self._owner)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, gpu={self.index})"


def is_on_device(value: Any) -> bool:
    """Whether an array lies on a GPU."""
    if isinstance(value, np.ndarray):
        return False
    return hasattr(value, "__cuda_array_interface__") or (
        hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) == CUDA
    )


def view_of(value: Any, name: str, *, index: int, stream: int) -> DeviceView:
    """Where an array lies that `is_on_device` knows, in order with what fills it.

    Args:
        index: the GPU that it must be on, where it says on which it is.
        stream: what will read it.

    Raises:
        ConfigError: another GPU, an array with gaps, or a type that NumPy has not.
    """
    if hasattr(value, "__dlpack_device__"):
        device = tuple(int(number) for number in value.__dlpack_device__())
        if device != (CUDA, index):
            raise ConfigError(
                f"the input {name} is on device {device[1]}, the engine on GPU {index}", hint=f"move it to GPU {index}"
            )
        return _import(value, name, stream)
    interface = value.__cuda_array_interface__
    shape, dtype = tuple(int(side) for side in interface["shape"]), np.dtype(interface["typestr"])
    _check_contiguous(interface.get("strides"), shape, dtype.itemsize, name)
    # Before version 3 there was no word for the stream: what fills the array is on the default one.
    waits_for = interface.get("stream") if interface.get("version", 0) >= 3 else _LEGACY_DEFAULT_STREAM
    return DeviceView(int(interface["data"][0]), shape, dtype, waits_for, value)


def _check_contiguous(strides: tuple[int, ...] | None, shape: tuple[int, ...], itemsize: int, name: str) -> None:
    if strides is None:
        return
    expected = itemsize
    for stride, side in zip(reversed(strides), reversed(shape), strict=True):
        if side != 1 and stride != expected:
            raise ConfigError(
                f"the input {name} of shape {shape} lies on the GPU with strides {tuple(strides)}",
                hint="make it contiguous",
            )
        expected *= side


# --- DLPack ----------------------------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor: a tensor, and how its owner is told that it is no longer used."""


_Deleter = ctypes.CFUNCTYPE(None, POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", c_void_p), ("deleter", _Deleter))

_CapsuleDestructor = ctypes.PYFUNCTYPE(None, c_void_p)
_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(py_object, c_void_p, c_char_p, _CapsuleDestructor)(("PyCapsule_New", _api))
_pointer_of = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", _api))
_raw_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", _api))
_raw_pointer_of = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", _api))

_UNUSED = b"dltensor"
"""The name of a capsule that nobody has taken the tensor from; kept here because a capsule does not copy it."""

_lent: dict[int, tuple[_Managed, Any, object]] = {}
"""What capsules point to, by address, until it is no longer used."""


def _import(value: Any, name: str, stream: int) -> DeviceView:
    try:
        capsule = value.__dlpack__(stream=stream)  # lets our stream wait for what fills the array
    except (BufferError, RuntimeError) as error:  # a tensor that requires gradients, say
        raise ConfigError(f"the input {name} cannot be read: {' '.join(str(error).split())}") from error
    tensor = ctypes.cast(_pointer_of(capsule, _UNUSED), POINTER(_Managed)).contents.tensor
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    kind, itemsize = _KINDS.get(tensor.code), tensor.bits // 8
    if kind is None or tensor.lanes != 1:
        raise ConfigError(
            f"the input {name} is of a type that NumPy has not (DLPack code {tensor.code}, {tensor.bits} bits)",
            hint="give float32 or float16",
        )
    strides = tuple(tensor.strides[axis] * itemsize for axis in range(tensor.ndim)) if tensor.strides else None
    _check_contiguous(strides, shape, itemsize, name)
    return DeviceView(
        (tensor.data or 0) + tensor.byte_offset, shape, np.dtype(f"{kind}{itemsize}"), None, (value, capsule)
    )


def _export(pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int], owner: object) -> Any:
    code = next(code for code, kind in _KINDS.items() if kind == dtype.kind)
    sides = (c_int64 * len(shape))(*shape)
    managed = _Managed()
    managed.tensor = _Tensor(
        pointer, *device, len(shape), code, 8 * dtype.itemsize, 1, ctypes.cast(sides, POINTER(c_int64)), None, 0
    )
    managed.deleter = _give_back_callback
    address = ctypes.addressof(managed)
    _lent[address] = (managed, sides, owner)
    return _new(address, _UNUSED, _drop_capsule_callback)


def _give_back(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


def _drop_capsule(capsule: int) -> None:
    """Give back the tensor of a capsule that nobody took it from."""
    if _raw_is_valid(capsule, _UNUSED):
        _lent.pop(_raw_pointer_of(capsule, _UNUSED), None)


_give_back_callback = _Deleter(_give_back)
_drop_capsule_callback = _CapsuleDestructor(_drop_capsule)
