"""Arrays of other libraries on the GPU and ours for them; NumPy stands for the other side of DLPack, with the host as
the GPU.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.cuda import arrays as device_array
from mae_deploy.runtime.cuda.arrays import DeviceArray, Lease, is_on_device, view_of


class Lent(DeviceArray):
    """One that says it is on the host, so that NumPy takes it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Foreign:
    """A NumPy array that says it is on GPU 0."""

    def __init__(self, array: Any, device: tuple[int, int] = (2, 0)) -> None:
        self.array, self.device = array, device
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__()


class Owner:
    """Stands for the engine."""


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8])
def test_numpy_reads_ours(dtype: type) -> None:
    array: Any = np.arange(35).reshape(5, 7).astype(dtype)
    owner = Owner()
    alive = weakref.ref(owner)
    ours = Lent(array.ctypes.data, array.shape, array.dtype, index=0, lease=Lease(), owner=owner)
    read = np.from_dlpack(ours)
    del ours, owner
    np.testing.assert_array_equal(read, array)
    assert read.dtype == dtype
    assert read.ctypes.data == array.ctypes.data
    assert alive() is not None, "whoever reads the memory keeps it"
    del read
    assert alive() is None
    assert device_array._lent == {}


def test_a_capsule_that_nobody_takes() -> None:
    ours = Lent(8, (1,), np.dtype(np.float32), index=0, lease=Lease(), owner=None)
    capsule = ours.__dlpack__()
    assert len(device_array._lent) == 1
    del capsule
    assert device_array._lent == {}


def test_ours_is_not_copied_elsewhere() -> None:
    ours = DeviceArray(8, (1,), np.dtype(np.float32), index=1, lease=Lease(), owner=None)
    wanted: list[dict[str, Any]] = [{"copy": True}, {"dl_device": (1, 0)}]
    for more in wanted:
        with pytest.raises(BufferError, match="in place, on its own GPU"):
            ours.__dlpack__(**more)
    assert ours.__dlpack__(stream=1, max_version=(1, 0), dl_device=(2, 1), copy=False) is not None
    assert repr(ours) == "DeviceArray(shape=(1,), dtype=float32, gpu=1)"


def test_what_is_on_the_gpu() -> None:
    array = np.zeros(3, np.float32)
    assert not any(is_on_device(value) for value in (array, [1, 2], 3.0, Foreign(array, (1, 0))))
    assert is_on_device(Foreign(array))
    assert is_on_device(DeviceArray(8, (1,), np.dtype(np.float32), index=0, lease=Lease(), owner=None))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.uint8, np.bool_])
def test_a_view_of_numpys(dtype: type) -> None:
    array: Any = np.ones((5, 7), dtype)
    foreign = Foreign(array[2:])
    view = view_of(foreign, "images", index=0, stream=77)
    assert (view.pointer, view.shape, view.dtype, view.stream) == (array[2:].ctypes.data, (3, 7), array.dtype, None)
    assert foreign.streams == [77]


def test_a_view_of_ours() -> None:
    array = np.ones((5, 7), np.float32)
    view = view_of(
        DeviceArray(array.ctypes.data, (5, 7), array.dtype, index=3, lease=Lease(), owner=None),
        "images",
        index=3,
        stream=77,
    )
    assert (view.pointer, view.shape, view.dtype) == (array.ctypes.data, (5, 7), array.dtype)


class Refusing(Foreign):
    """As a tensor that requires gradients."""

    def __dlpack__(self, *, stream: int) -> Any:
        raise BufferError("Can't export tensors that require gradient")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            Foreign(np.ones((5, 7), np.float32).T),
            r"the input images of shape \(7, 5\) lies on the GPU with strides \(4, 28\)",
        ),
        (Foreign(np.ones((5, 7), np.complex64)), r"of a type that NumPy has not \(DLPack code 5, 64 bits\)"),
        (Foreign(np.ones(3), (2, 1)), "the input images is on device 1, the engine on GPU 0"),
        (Refusing(np.ones(3)), "the input images cannot be read: Can't export"),
    ],
)
def test_what_cannot_be_taken(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        view_of(value, "images", index=0, stream=77)
