"""Profiles and shapes, without TensorRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.runtime.tensorrt.tensors import (
    ProfileRange,
    Tensor,
    check_dtype,
    check_shapes,
    choose_profile,
    to_numpy,
)


def ranged(index: int, least: tuple[int, int], most: tuple[int, int]) -> ProfileRange:
    return ProfileRange(
        index=index, least={"images": (least[0], 3), "ids_keep": least}, most={"images": (most[0], 3), "ids_keep": most}
    )


PROFILES = [
    ranged(0, (1, 2), (32, 196)),
    ranged(1, (1, 49), (1, 49)),
    ranged(2, (1, 2), (8, 49)),
    ranged(3, (1, 2), (8, 49)),
]


@pytest.mark.parametrize(
    ("sizes", "index"), [((1, 49), 1), ((1, 48), 2), ((8, 2), 2), ((9, 2), 0), ((1, 50), 0), ((32, 196), 0)]
)
def test_the_smallest_that_fits(sizes: tuple[int, int], index: int) -> None:
    assert choose_profile(PROFILES, {"images": (sizes[0], 3), "ids_keep": sizes}).index == index


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 3), (0, 2)),
        ((1, 3), (1, 1)),
        ((33, 3), (33, 2)),
        ((1, 3), (1, 197)),
        ((1, 4), (1, 49)),
        ((1,), (1, 49)),
        ((1, 3, 1), (1, 49)),
    ],
)
def test_none_that_fits(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"this engine takes no images .*; it takes images \(1, 3\) to \(32, 3\), ids_keep \(1, 2\) to \(32, 196\);"
            r" or images \(1, 3\), "
        ),
    ):
        choose_profile(PROFILES, dict(zip(("images", "ids_keep"), shapes, strict=True)))


def tensor(dtype: Any, **more: Any) -> Tensor:
    return Tensor(name="x", shape=(-1, 3), dtype=np.dtype(dtype), **more)


def test_the_size_of_a_tensor() -> None:
    assert tensor(np.float16).nbytes((5, 3)) == 30


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        (np.int32, np.array([-(2**31), 2**31 - 1])),
        (np.int32, np.zeros((0, 3), np.int64)),
        (np.int64, np.array([7], np.uint8)),
        (np.uint8, np.array([255], np.int64)),
        (np.float16, np.array([1], np.float16)),
    ],
)
def test_types_that_fit(dtype: type, array: Any) -> None:
    check_dtype(tensor(dtype), array)


@pytest.mark.parametrize(
    ("dtype", "array"),
    [
        (np.int32, np.array([2**31])),
        (np.int64, np.array([2**63], np.uint64)),
        (np.uint8, np.array([-1])),
        (np.float16, np.array([1], np.float32)),
        (np.float32, np.array([1])),
        (np.int32, np.array([True])),
    ],
)
def test_types_that_do_not_fit(dtype: type, array: Any) -> None:
    with pytest.raises(ConfigError, match=f"the input x .*the engine takes {np.dtype(dtype)}"):
        check_dtype(tensor(dtype), array)


def test_bf16_is_widened() -> None:
    exact = np.array([[1.0, -2.5, 2.0**100], [0.0, np.inf, -(2.0**-120)]], np.float32)
    pinned = (exact.view(np.uint32) >> 16).astype(np.uint16)
    found = to_numpy(tensor(np.uint16, bfloat16=True), pinned)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, exact)


def test_other_outputs_are_copied() -> None:
    pinned = np.ones((2, 3), np.float32)
    found = to_numpy(tensor(np.float32), pinned)
    pinned[...] = 2
    assert found.tolist() == [[1.0] * 3] * 2


def test_shapes_that_are_not_known() -> None:
    check_shapes([], {"cls": (1, 3)})
    with pytest.raises(MaeDeployError, match="cannot tell the shape of images, tokens"):
        check_shapes(["images"], {"cls": (1, 3), "tokens": (1, -1, 3)})
