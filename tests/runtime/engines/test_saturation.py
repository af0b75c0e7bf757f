"""Whether 8-bit products are exact is found by multiplying, and a session for INT8 is set accordingly."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mae_deploy.runtime.engines import onnxruntime as onnxruntime_engine
from mae_deploy.runtime.engines import saturation
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.engines.saturation import products_saturate

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
    assert products_saturate(onnxruntime) is not exact


@pytest.mark.parametrize("saturates", [False, True])
def test_a_cpu_without_vnni(saturates: bool) -> None:
    """Two products of 255 and 127 are 64,770; 16 bits hold 32,767."""

    def run(_: None, inputs: dict[str, Any]) -> list[Any]:
        products = inputs["activations"].astype(np.int32)[:, :, None] * inputs["weights"].astype(np.int32)
        pairs = products[:, ::2] + products[:, 1::2]
        return [(pairs.clip(-32768, 32767) if saturates else pairs).sum(axis=1)]

    runtime = SimpleNamespace(
        SessionOptions=SimpleNamespace, InferenceSession=lambda *_, **__: SimpleNamespace(run=run)
    )
    assert products_saturate(cast(ModuleType, runtime)) is saturates


@pytest.mark.parametrize(
    ("precision", "saturates", "exact"), [("int8", True, True), ("int8", False, False), ("fp32", True, False)]
)
def test_the_session(
    full_bundle: Path, precision: str, saturates: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "products_saturate", lambda _: saturates)
    with OnnxRuntimeEngine(full_bundle / "encoder.onnx", EngineOptions(threads=1), precision=precision) as engine:
        options = cast(Any, engine)._session.get_session_options()
        if exact:
            assert options.get_session_config_entry(ENTRY) == "1"
        else:
            with pytest.raises(RuntimeError, match=ENTRY):
                options.get_session_config_entry(ENTRY)
