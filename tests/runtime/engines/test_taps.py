"""Inner tensors as outputs, on both engines, without a change of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mae_deploy.errors import MaeDeployError
from mae_deploy.export.graph import builder as onnx_builder
from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.images.read import Array
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.engines.openvino import OpenVinoEngine
from mae_deploy.runtime.engines.taps import with_outputs
from mae_deploy.runtime.registry import load_engine
from tests.runtime.tiny_bundle import BLOCK_TENSORS, OUTPUTS, golden_inputs, reference_blocks, write_bundle

ENGINES = [OnnxRuntimeEngine, OpenVinoEngine]
OPTIONS = EngineOptions(threads=1)
ROWS, INNER, OUTER = 3, 29, 31

X = np.linspace(-1, 1, ROWS * INNER, dtype=np.float32).reshape(ROWS, INNER)
WEIGHT = np.linspace(-1, 1, INNER * OUTER, dtype=np.float32).reshape(INNER, OUTER)
"""Of more than the 1024 bytes from which a weight may lie outside of the graph."""


def write_graph(path: Path) -> Path:
    """`tanh` of a product, given as an output; the product and its float16 form are inner tensors."""
    graph = GraphBuilder("two steps")
    product = graph.node(
        "MatMul", [graph.input("x", np.float32, ["B", INNER]), graph.weight("w", WEIGHT)], "inner/product"
    )
    half = graph.cast(product, np.float16)
    graph.output("y", graph.node("Tanh", [graph.cast(half, np.float32)], "tanh"), ["B", OUTER])
    path.parent.mkdir()
    graph.save(path)
    return path


@pytest.fixture(params=ENGINES, ids=["onnxruntime", "openvino"])
def engine_class(request: pytest.FixtureRequest) -> Any:
    if request.param is OpenVinoEngine:
        pytest.importorskip("openvino")
    return request.param


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_inner_values(engine_class: Any, external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", 0 if external else 1 << 30)
    path = write_graph(tmp_path / "graph" / "encoder.onnx")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert len(before) == (2 if external else 1)
    monkeypatch.chdir(path.parent)
    for graph in (path, Path("encoder.onnx")):
        with engine_class(graph, OPTIONS, taps=["inner/product", "inner/product/float16"]) as engine:
            assert engine.output_names == ("y", "inner/product", "inner/product/float16")
            found: dict[str, Array] = engine.run({"x": X})
        np.testing.assert_allclose(found["inner/product"], X @ WEIGHT, atol=1e-5)  # FP32 sums in another order
        assert found["inner/product/float16"].dtype == np.float16
        np.testing.assert_allclose(found["inner/product/float16"], X @ WEIGHT, rtol=1e-3)  # eleven bits
        np.testing.assert_allclose(found["y"], np.tanh(X @ WEIGHT), atol=2e-3)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_blocks_of_a_bundle(name: str, visible_bundle: Path) -> None:
    pytest.importorskip(name)
    samples = golden_inputs(visible=True)
    with load_engine(Bundle.load(visible_bundle), name, OPTIONS, taps=BLOCK_TENSORS) as engine:
        assert engine.output_names == (*OUTPUTS, *BLOCK_TENSORS)
        found = engine.run(samples, BLOCK_TENSORS)
    np.testing.assert_allclose(
        np.stack([found[block] for block in BLOCK_TENSORS], axis=1), reference_blocks(**samples), atol=1e-4
    )


def test_a_tap_that_is_an_output_already(engine_class: Any, visible_bundle: Path) -> None:
    with engine_class(visible_bundle / "encoder.onnx", OPTIONS, taps=["pooled"]) as engine:
        assert engine.output_names == tuple(OUTPUTS)
        assert list(engine.run(golden_inputs(visible=True))) == list(OUTPUTS)


def test_a_tap_that_is_no_tensor(engine_class: Any, visible_bundle: Path) -> None:
    with pytest.raises(MaeDeployError, match=r"cannot load .*encoder\.onnx.*no_such_tensor") as caught:
        engine_class(visible_bundle / "encoder.onnx", OPTIONS, taps=["no_such_tensor"])
    assert "\n" not in str(caught.value)


def test_a_tap_in_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(MaeDeployError, match="ONNX Runtime cannot load"):
        OnnxRuntimeEngine(tmp_path / "empty.onnx", OPTIONS, taps=["x"])


def test_the_bytes_are_what_onnx_would_write(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "graph" / "encoder.onnx")
    names = ["inner/product", "a" * 127, "b" * 128, "c" * 20_000, "ünïcode"]
    expected = onnx.load(path)
    expected.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    assert onnx.load_from_string(with_outputs(path, names)) == expected
    assert with_outputs(path, names).startswith(path.read_bytes())


def test_a_bundle_stays_as_it_is(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b")
    with load_engine(Bundle.load(path), "onnxruntime", OPTIONS, taps=BLOCK_TENSORS):
        pass
    Bundle.load(path).check_files()
