"""Whether 8-bit products are exact is found by multiplying on each engine, and INT8 is computed accordingly."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mae_deploy.images.read import Array
from mae_deploy.models.quantization.rounding import INT8_WEIGHTS_7
from mae_deploy.runtime.engines import onnxruntime as onnxruntime_engine
from mae_deploy.runtime.engines import openvino as openvino_engine
from mae_deploy.runtime.engines import saturation
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.engines.openvino import OpenVinoEngine, openvino_core
from mae_deploy.runtime.engines.saturation import onnxruntime_saturates, openvino_saturates

ENTRY = "session.x64quantprecision"


def test_the_graph_is_valid_and_named_as_onnx_has_it() -> None:
    model = onnx.load_from_string(saturation._integer_product())
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == (
        "MatMulInteger",
        ["activations", "weights"],
        ["product"],
    )
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [
        TensorProto.UINT8,
        TensorProto.INT8,
        TensorProto.INT32,
    ]


def test_this_cpu() -> None:
    """Against a larger product of a graph that the onnx package writes: the same kernels have to be exact, or not."""
    a, b = np.full((5, 96), 255, np.uint8), np.full((96, 17), 127, np.int8)
    values = [
        helper.make_tensor_value_info(*value)
        for value in (("a", TensorProto.UINT8, [5, 96]), ("b", TensorProto.INT8, [96, 17]))
    ]
    outputs = [helper.make_tensor_value_info("c", TensorProto.INT32, [5, 17])]
    body = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["c"])], "g", values, outputs)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {"a": a, "b": b})[0]
    exact = np.array_equal(found, a.astype(np.int32) @ b.astype(np.int32))
    assert onnxruntime_saturates(onnxruntime) is not exact


def product(activations: Array, weights: Array, *, saturates: bool) -> Array:
    """uint8 `(B, I)` by int8 `(I, O)` as vpmaddubsw has it, two products at a time in 16 bits, or exactly: int32."""
    products = activations.astype(np.int32)[:, :, None] * weights.astype(np.int32)
    pairs = products[:, ::2] + products[:, 1::2]
    found: Array = (pairs.clip(-32768, 32767) if saturates else pairs).sum(axis=1)
    return found


def test_weights_of_7_bits_fit_on_every_cpu() -> None:
    """The largest of both signs, in every order; weights of 8 bits do not fit, nor do the next larger ones."""
    largest = int(INT8_WEIGHTS_7.largest_weight)
    for most, fits in ((largest, True), (largest + 1, False), (127, False)):
        activations = np.array([[255, 255, 0, 0], [255, 0, 255, 0], [128, 127, 1, 255]], np.uint8)
        weights = np.array(np.meshgrid(*[[most, -most]] * 4), np.int8).reshape(4, 16)
        found, expected = (product(activations, weights, saturates=saturates) for saturates in (True, False))
        assert np.array_equal(found, expected) is fits


@pytest.mark.parametrize("saturates", [False, True])
def test_a_cpu_without_vnni(saturates: bool) -> None:
    """Two products of 255 and 127 are 64,770; 16 bits hold 32,767."""

    def run(_: None, inputs: dict[str, Any]) -> list[Any]:
        return [product(inputs["activations"], inputs["weights"], saturates=saturates)]

    runtime = SimpleNamespace(
        SessionOptions=SimpleNamespace, InferenceSession=lambda *_, **__: SimpleNamespace(run=run)
    )
    assert onnxruntime_saturates(cast(ModuleType, runtime)) is saturates


@pytest.mark.parametrize(
    ("precision", "saturates", "exact"),
    [("int8", True, True), ("int8-w7", True, False), ("int8", False, False), ("fp32", True, False)],
)
def test_the_session(
    full_bundle: Path, precision: str, saturates: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "onnxruntime_saturates", lambda _: saturates)
    with OnnxRuntimeEngine(full_bundle / "encoder.onnx", EngineOptions(threads=1), precision=precision) as engine:
        options = cast(Any, engine)._session.get_session_options()
        if exact:
            assert options.get_session_config_entry(ENTRY) == "1"
        else:
            with pytest.raises(RuntimeError, match=ENTRY):
                options.get_session_config_entry(ENTRY)


def test_this_cpu_on_openvino(tmp_path: Path) -> None:
    """Against a larger product of explicit Q/DQ, read from a file as a bundle's graph is."""
    pytest.importorskip("openvino")
    model = quantized_product(np.full((96, 17), 127, np.int8))
    onnx.save_model(model, tmp_path / "product.onnx")
    x = np.full((5, 96), 127, np.float32)
    with OpenVinoEngine(tmp_path / "product.onnx", EngineOptions(threads=1)) as engine:
        exact = np.array_equal(engine.run({"x": x})["y"], x @ np.full((96, 17), 127, np.float32))
    assert openvino_saturates(openvino_core()) is not exact
    with OpenVinoEngine(tmp_path / "product.onnx", EngineOptions(threads=1), precision="int8") as engine:
        assert (engine.run({"x": x})["y"] == 96 * 127 * 127).all()


@pytest.mark.parametrize("saturates", [False, True])
def test_a_cpu_without_vnni_on_openvino(saturates: bool) -> None:
    """int8 becomes uint8 by adding 128, which is taken back from the sum."""
    pytest.importorskip("openvino")

    class Core:
        def compile_model(self, *_: Any) -> Any:
            weights = np.full((8, 8), 127, np.int8)
            return lambda values: [product(values + 128, weights, saturates=saturates) - 128 * 8 * 127]

    assert openvino_saturates(Core()) is saturates


@pytest.mark.parametrize(
    ("precision", "saturates", "exact"),
    [
        ("int8", True, True),
        ("int8-bf16", True, True),
        ("int8-w7", True, False),
        ("int8-w7-bf16", True, False),
        ("int8", False, False),
        ("fp32", True, False),
    ],
)
def test_the_compiled_graph(
    precision: str, saturates: bool, exact: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[dict[str, Any]] = []
    core = SimpleNamespace(
        get_property=lambda *_: [], compile_model=lambda _model, _device, settings: given.append(settings)
    )
    monkeypatch.setattr(openvino_engine, "openvino_saturates", lambda _: saturates)
    saturation.say_exact.cache_clear()
    for _ in range(2):
        openvino_engine._compile(core, None, EngineOptions(threads=1), precision)
    assert given[0].get("LP_TRANSFORMS_MODE", True) is not exact
    assert [record.getMessage() for record in caplog.records] == exact * [
        "OpenVINO computes INT8 in FP32: this CPU has no VNNI, and its fast products of 8-bit integers overflow; for"
        " it, export fp32, or for ONNX Runtime with --weight-bits 7"
    ]


def quantized_product(weights: Array) -> onnx.ModelProto:
    """`x (5, I)` rounded to int8 by weights `(I, O)`, as an export of static INT8 has it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "one", "zero"], ["activations"]),
        helper.make_node("DequantizeLinear", ["stored", "ones", "zeros"], ["weights"], axis=1),
        helper.make_node("MatMul", ["activations", "weights"], ["y"]),
    ]
    I, O = weights.shape  # noqa: E741
    constants = {
        "stored": weights,
        "one": np.float32(1),
        "zero": np.int8(0),
        "ones": np.ones(O, np.float32),
        "zeros": np.zeros(O, np.int8),
    }
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5, size])] for name, size in (("x", I), ("y", O))
    )
    body = helper.make_graph(
        nodes,
        "g",
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
