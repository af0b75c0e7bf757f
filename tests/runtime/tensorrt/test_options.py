"""Sizes and options of a TensorRT build: how they are written, and which of several ranges a number of samples is run
in.
"""

from __future__ import annotations

from typing import Any

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.profiles import batch_that_fits, covering, read_profiles
from mae_deploy.runtime.tensorrt.options import BuildOptions, check_rtx_options

LATENCY = {"B": (1, 1, 1), "K": (49, 49, 49)}
THROUGHPUT = {"B": (8, 32, 64), "K": (20, 49, 196)}


def test_profiles_are_read() -> None:
    assert read_profiles("B:1,1,1 K:49,49,49; B:8,32,64  K:20,49,196") == [LATENCY, THROUGHPUT]
    assert read_profiles("K:1,2,3") == [{"K": (1, 2, 3)}]
    assert read_profiles(None) == []


@pytest.mark.parametrize(
    "text", ["", ";", "B:1,8", "B:8,1,32", "B:0,1,2", "B:1,2,3 B:1,2,3", "H:1,2,3", "B:1,2,3;", "B:1,2,3 and K:1,2,3"]
)
def test_what_is_no_profile(text: str) -> None:
    with pytest.raises(ConfigError, match="--profile") as caught:
        read_profiles(text)
    assert "'B:1,8,32 K:20,49,196'" in (caught.value.hint or "")


def test_the_sizes_of_several_profiles() -> None:
    assert covering([LATENCY, THROUGHPUT]) == {"B": [1, 1, 64], "K": [20, 49, 196]}
    assert covering([THROUGHPUT]) == {"B": [8, 32, 64], "K": [20, 49, 196]}


@pytest.mark.parametrize(
    ("batch", "keep", "taken"),
    [
        (1, 49, 1),
        (3, 49, 1),
        (8, 49, 8),
        (64, 49, 64),
        (65, 49, 64),
        (3, 20, 8),
        (9, 196, 9),
        (3, 197, None),
        (3, 19, None),
        (70, None, 64),
    ],
    ids=lambda value: str(value),
)
def test_how_many_samples_at_a_time(batch: int, keep: int | None, taken: int | None) -> None:
    assert batch_that_fits([LATENCY, THROUGHPUT], batch, keep) == taken


def test_a_graph_of_all_patches_has_one_range() -> None:
    assert [batch_that_fits([{"B": [2, 4, 6]}], batch, None) for batch in (1, 5, 7)] == [2, 5, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace": 0}, "--workspace must be at least 1, got 0"),
        ({"optimization_level": 6}, "--optimization-level must be at least 0 and at most 5, got 6"),
        ({"optimization_level": -1}, "--optimization-level must be at least 0 and at most 5, got -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strip": True}, "--strip"),
        ({"refit": True}, "--refit"),
        ({"version_compatible": True}, "--version-compatible"),
        ({"hardware_compatible": "ampere"}, "--hardware-compatible ampere"),
    ],
)
def test_what_tensorrt_for_rtx_does_not_take(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}: TensorRT for RTX builds no such engines$"):
        check_rtx_options(BuildOptions(**options))
    check_rtx_options(BuildOptions(workspace=1, optimization_level=5, timing_cache="off"))
