"""TensorRT for RTX: on which GPUs, from what, and what a machine without one has of it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.runtime.tensorrt import rtx
from mae_deploy.runtime.tensorrt.rtx import find_gpu, import_rtx, load_builder, load_rtx, supports, target
from tests.runtime.tensorrt.planned_bundle import H200, ORIN, RTX4090, T4, gpu


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *(((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 7), False), ((8, 9), True)),
        *(((9, 0), False), ((10, 0), False), ((11, 0), False), ((12, 0), True), ((12, 1), True), ((13, 0), True)),
    ],
)
def test_gpus_as_nvidia_lists_them(capability: tuple[int, int], runs: bool) -> None:
    assert supports(gpu("some", capability)) is runs


@pytest.mark.parametrize("other", [H200, ORIN, T4], ids=lambda other: other.name)
def test_another_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    monkeypatch.setattr(rtx, "require_gpu", lambda index: other)
    with pytest.raises(ConfigError, match=f"does not support {other.name}, which has compute capability") as caught:
        load_rtx()
    assert str(caught.value).endswith("it supports 8.0, 8.6, 8.9, and 12.0 and later")
    assert caught.value.hint == "--engine trt builds an engine for this GPU"


def test_what_builds_needs_no_gpu_and_what_runs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("tensorrt_rtx")
    module.__version__, module.ILogger = "1.7.1.116", type("ILogger", (), {"__init__": lambda self: None})
    monkeypatch.setattr(rtx, "_loaded", {})
    monkeypatch.setattr(rtx, "import_rtx", lambda: module)
    api = load_builder()
    assert (api.version, api.major, api.title) == ("1.7.1.116", 11, "TensorRT for RTX 1.7.1.116")
    assert load_builder() is api

    def none(index: int) -> None:
        raise MissingDependency("there is no NVIDIA driver here")

    monkeypatch.setattr(rtx, "require_gpu", none)
    with pytest.raises(MissingDependency, match="no NVIDIA driver"):
        load_rtx()
    monkeypatch.setattr(rtx, "require_gpu", lambda index: RTX4090)
    assert find_gpu() == RTX4090
    assert load_rtx().gpu == RTX4090


def test_a_plan_is_for_every_gpu_that_has_the_arithmetic() -> None:
    found = {precision: target(precision).compute_capability for precision in ("fp32", "fp16", "bf16", "fp8")}
    assert found == {"fp32": (8, 0), "fp16": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_deploy.runtime.tensorrt.rtx.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="TensorRT for RTX is not installed") as caught:
        import_rtx()
    assert caught.value.hint == "pip install 'mae-deploy[trt-rtx]'"


def test_bindings_without_their_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libtensorrt_rtx.so.1:\\n not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    with pytest.raises(MissingDependency, match=r"cannot be imported \(libtensorrt_rtx.so.1: not found\)"):
        import_rtx()
