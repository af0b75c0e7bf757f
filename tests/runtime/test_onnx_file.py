"""The ONNX file format by hand, held against the onnx package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.onnx_file import read_inputs, read_opset, write_int8_products, write_products
from tests.runtime.tiny_bundle import C, H, W, write_bundle


def save(path: Path, inputs: list[Any], weights: dict[str, Any] | None = None) -> Path:
    """A graph that uses none of its inputs."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["constant"], ["y"])],
        "g" * 130,
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [
            numpy_helper.from_array(np.zeros(1, np.float32), "constant"),
            *(numpy_helper.from_array(array, name) for name, array in (weights or {}).items()),
        ],
    )
    onnx.save(helper.make_model(body, producer_name="somebody"), path)
    return path


def test_inputs_of_a_bundle(tmp_path: Path) -> None:
    assert read_inputs(write_bundle(tmp_path / "float", token_mode="ragged", batch=300) / "encoder.onnx") == [
        {"name": "images", "dtype": "float32", "shape": [300, C, H, W]},
        {"name": "ids_keep", "dtype": "int64", "shape": [300, "K"]},
        {"name": "num_keep", "dtype": "int64", "shape": [300]},
    ]
    (entry,) = read_inputs(
        write_bundle(tmp_path / "bytes", token_mode="full", images="uint8", external="weights") / "encoder.onnx"
    )
    assert entry == {"name": "images", "dtype": "uint8", "shape": ["B", H, W, C]}


def test_the_opset_is_that_of_onnx_s_own_operators(tmp_path: Path) -> None:
    graph = helper.make_graph([], "empty", [], [])
    for opsets in ([("", 19), ("com.example", 23)], [("com.example", 23), ("", 19)]):
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in opsets]),
            tmp_path / "model.onnx",
        )
        assert read_opset(tmp_path / "model.onnx") == 19
    assert read_opset(write_bundle(tmp_path / "b") / "encoder.onnx") == 17
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not an ONNX model"):
        read_opset(tmp_path / "empty")


def test_types_nameless_sizes_and_weights_among_the_inputs(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_value_info("a/b:0", TensorProto.FLOAT16, [None, 3, "höhe", 1 << 40]),
        helper.make_tensor_value_info("scalar", TensorProto.STRING, []),
        helper.make_tensor_value_info("weight", TensorProto.FLOAT, [7]),
    ]
    found = read_inputs(save(tmp_path / "a.onnx", inputs, {"weight": np.full(7, 1e30, np.float32)}))
    assert found == [
        {"name": "a/b:0", "dtype": "float16", "shape": ["?", 3, "höhe", 1 << 40]},
        {"name": "scalar", "dtype": "type 8", "shape": []},
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"hello, world", b"\x7f" * 50, b"\x3a\xff\xff\xff\xff\x0f", b"PK\x03\x04" + bytes(100), b"\x3a\x80"],
)
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.onnx is not an ONNX model"):
        read_inputs(path)
    with pytest.raises(ConfigError, match=r"no ONNX file at .*b\.onnx"):
        read_inputs(tmp_path / "b.onnx")


def test_a_model_that_is_cut_short(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 5, 7])])
    whole = path.read_bytes()
    for length in range(whole.rindex(b"y")):  # the graph's output stands near its end
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="is not an ONNX model"):
            read_inputs(path)


@pytest.mark.parametrize("length", [1, 3])
def test_matrix_products(tmp_path: Path, length: int) -> None:
    size = 129
    path = tmp_path / "products.onnx"
    write_products(path, size, length)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert read_inputs(path) == [{"name": "x", "dtype": "float32", "shape": [size, size]}]
    assert [node.op_type for node in model.graph.node] == ["MatMul"] * length
    x = np.random.default_rng(1).standard_normal((size, size), np.float32)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    expected = x.astype(np.float64)
    for _ in range(length):
        expected = expected @ weight
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.std(found) == pytest.approx(1, abs=0.1), "the scale is kept"


def test_matrix_products_in_int8(tmp_path: Path) -> None:
    size, length = 129, 3
    write_products(tmp_path / "fp32", size, length)
    write_int8_products(tmp_path / "int8", size, length)
    model = onnx.load(tmp_path / "int8")
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("MatMul") == length
    x = np.random.default_rng(1).standard_normal((size, size), np.float32)
    outputs: list[Any] = [
        onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for name in ("fp32", "int8")
    ]
    expected, found = outputs
    # Rounding to 127 steps of four deviations, twice a product: 35 dB each time, 30 after three. AVX2's products of
    # 8-bit integers saturate, which costs as much again.
    noise = 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())
    assert 20 < noise < 45
