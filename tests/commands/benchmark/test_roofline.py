"""What bounds a row: hand-computed needs, and yardsticks that run on the engines."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mae_deploy.commands.benchmark import roofline as module
from mae_deploy.commands.benchmark.roofline import (
    Kind,
    Yardstick,
    bytes_moved,
    measure_on_gpu,
    open_yardsticks,
    rates_of,
    roofline,
    yardsticks,
)
from mae_deploy.commands.benchmark.rows import BenchmarkRow, bundle_subject
from mae_deploy.errors import MissingDependency
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.onnx_file import write_products
from mae_deploy.runtime.registry import open_graph
from tests.runtime.tiny_bundle import DEPTH, C, D, H, N, W, write_bundle


def row(path: Path, *, batch: int = 3, keep: int | None = 5, precision: str = "fp32") -> BenchmarkRow:
    """Of a tiny bundle; no engine is needed to know what it moves."""
    loaded: Any = SimpleNamespace(
        subject=bundle_subject(path), precision=precision, engine=SimpleNamespace(name="onnxruntime")
    )
    return BenchmarkRow(loaded, batch, keep)


@pytest.fixture(scope="module")
def visible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "visible")


def test_bytes_are_weights_once_and_of_each_image_what_it_brings(visible: Path) -> None:
    weights = bundle_subject(visible).size_bytes
    image, residual = C * H * W * 4, 2 * DEPTH * (1 + 5) * D * 4
    assert bytes_moved(row(visible)) == weights + 3 * (image + residual)
    assert bytes_moved(row(visible, precision="fp16", batch=1)) == weights + image + residual // 2
    assert bytes_moved(row(visible, keep=N, batch=1)) == weights + image + 2 * DEPTH * (1 + N) * D * 4


@pytest.mark.parametrize(
    ("compute", "weights", "bound"),
    [
        (0.5, 0.2, "compute"),
        (0.2, 0.5, "weights"),
        (0.41, 0.4, "compute"),
        (0.39, 0.1, "launch"),
        (0.1, 0.39, "launch"),
    ],
)
def test_the_larger_need_where_it_is_most_of_the_time(
    visible: Path, compute: float, weights: float, bound: str
) -> None:
    """A row of two seconds; the rates are such that it needs these shares of them."""
    found = row(visible)
    moved = bytes_moved(found)
    assert moved is not None
    rates: dict[Kind, float] = {"compute": 100 * 3 / (2 * compute), "weights": moved / (2 * weights), "call": 0.25}
    assert roofline(found, 2.0, 100, rates) == {
        "bound": bound,
        "compute_ms": pytest.approx(2000 * compute),
        "weights_ms": pytest.approx(2000 * weights),
        "call_ms": 250,
    }


def test_what_nobody_knows_has_no_bound(visible: Path) -> None:
    rates: dict[Kind, float] = {"compute": 1.0, "weights": 1.0, "call": 1.0}
    assert roofline(row(visible), 1.0, None, rates) is None
    assert roofline(row(visible), 1.0, 100, {}) is None


def test_rates_of_what_was_measured() -> None:
    marks = {
        Yardstick("a", "compute", 3, 5, 2): 0.5,
        Yardstick("a", "weights", 1, 7, 1, 2): 0.25,
        Yardstick("a", "call", 1, 1, 1): 0.125,
    }
    assert rates_of(marks) == {"a": {"compute": 2 * 3 * 2 * 25 / 0.5, "weights": 2 * 49 / 0.25, "call": 0.125}}


def test_yardsticks_run_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [Yardstick("onnxruntime", "compute", 5, 5, 2), Yardstick("onnxruntime", "weights", 1, 7, 1)]
    monkeypatch.setattr(module, "yardsticks", lambda engine: small)
    with ExitStack() as stack:
        found = open_yardsticks(["onnxruntime", "tensorrt"], EngineOptions(threads=1), stack)
        assert list(found) == small, "TensorRT opens no bare graphs"
        shapes = [output.shape for call in found.values() for output in call().values()]  # type: ignore[attr-defined]
    assert shapes == [(5, 5), (1, 7)]


@pytest.mark.parametrize(("rows", "half"), [(1, False), (3, True)])
def test_products_of_other_shapes_and_types(tmp_path: Path, rows: int, half: bool) -> None:
    path = tmp_path / "products.onnx"
    write_products(path, 7, 2, rows=rows, half=half)
    x = np.random.default_rng(1).standard_normal((rows, 7)).astype(np.float16 if half else np.float32)
    weight = np.random.default_rng(0).standard_normal((7, 7), np.float32) / np.float32(7**0.5)
    with open_graph(path, "onnxruntime", EngineOptions(threads=1)) as engine:
        (found,) = engine.run({"x": x}).values()
    assert found.dtype == x.dtype
    # FP16 has 11 bits: of values up to 3, products of two steps are good to a hundredth.
    np.testing.assert_allclose(found, x.astype(np.float32) @ weight @ weight, atol=2e-2 if half else 1e-5)


def test_engines_that_run_plans_are_timed_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Built:
        def __init__(self, mark: Yardstick) -> None:
            self.mark = mark

        def __enter__(self) -> Built:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(self.mark.kind)

        def timer(self, inputs: dict[str, Any], *, replays: int) -> Any:
            assert inputs["x"].dtype == np.float16
            assert inputs["x"].shape == (self.mark.rows, self.mark.size)
            return lambda: {"compute": 0.5, "weights": 0.25, "call": 0.125}[self.mark.kind]

    small = [Yardstick("tensorrt", kind, 3, 5, 1, 2) for kind in ("compute", "weights", "call")]
    monkeypatch.setattr(module, "yardsticks", lambda engine: small)
    monkeypatch.setattr(module, "_built", lambda mark, options: Built(mark))
    found = measure_on_gpu(["onnxruntime", "tensorrt"], EngineOptions(), repeats=2)
    assert list(found.values()) == [0.5, 0.25, 0.125]
    assert sorted(closed) == ["call", "compute", "weights"]


def test_an_engine_that_cannot_be_built_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise MissingDependency("there is no NVIDIA driver")

    monkeypatch.setattr(module, "_built", missing)
    assert measure_on_gpu(["tensorrt-rtx"], EngineOptions(), repeats=1) == {}
    assert "no roofline: tensorrt-rtx: there is no NVIDIA driver" in capsys.readouterr().err


def test_every_engine_has_the_three() -> None:
    for engine in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert [mark.kind for mark in yardsticks(engine)] == ["compute", "weights", "call"]
