"""The builder writes what it was told: names, constants once, weights inside or beside the graph, and nothing that the
checker refuses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mae_deploy.errors import CheckFailed
from mae_deploy.export.graph import builder as onnx_builder
from mae_deploy.export.graph.builder import OPSET, OPSET_TYPED_SCALES, GraphBuilder
from mae_deploy.images.read import Array
from tests.export.tiny_exports import SavedGraph, open_session, run_session

# A weight of 19 x 23 floats has 1,748 bytes, one of 7 x 11 has 308: the first may go to a file of its own, the second
# may not.
ROWS, COLUMNS = 19, 23
LARGE = np.random.default_rng(0).normal(size=(COLUMNS, ROWS)).astype(np.float32)
OTHER = np.random.default_rng(1).normal(size=(COLUMNS, ROWS)).astype(np.float32)
SMALL = np.random.default_rng(2).normal(size=(ROWS,)).astype(np.float32)
INPUT = np.random.default_rng(3).normal(size=(5, ROWS)).astype(np.float32)


def linear_graph() -> GraphBuilder:
    """`(x @ large.T + x @ other.T) + (small, zeros)` with a weight that no node reads; `large` is given as a view that
    is not contiguous.
    """
    b = GraphBuilder("linear")
    x = b.input("x", np.float32, ["B", ROWS])
    first = b.node("MatMul", [x, b.weight("first.weight", LARGE.T)], "first/MatMul")
    second = b.node("MatMul", [x, b.weight("second.weight", OTHER.T)], "second/MatMul")
    total = b.node("Add", [first, second], "sum")
    padded = b.node("Pad", [b.weight("bias", SMALL), b.integers(0, COLUMNS - ROWS)], "padded")
    b.weight("decoder.weight", LARGE)
    b.output("y", b.node("Add", [total, padded], "total"), ["B", COLUMNS])
    return b


def expected_output() -> Array:
    total: Array = INPUT @ LARGE.T + INPUT @ OTHER.T + np.pad(SMALL, (0, COLUMNS - ROWS))
    return total


# --- names and constants ---------------------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    saved = SavedGraph(linear_graph(), tmp_path)
    graph = saved.model.graph
    assert graph.name == "linear"
    assert [(node.name, list(node.output)) for node in graph.node] == [
        ("first/MatMul", ["first/MatMul"]),
        ("second/MatMul", ["second/MatMul"]),
        ("sum", ["sum"]),
        ("padded", ["padded"]),
        ("total", ["total"]),
        ("output/y", ["y"]),
    ]
    assert set(saved.weights) == {"first.weight", "second.weight", "bias", "const/0_4"}
    assert [(entry.domain, entry.version) for entry in saved.model.opset_import] == [("", 17)]
    assert (saved.model.ir_version, saved.model.producer_name) == (8, "mae-deploy")


def test_inputs_and_outputs_as_a_manifest_records_them() -> None:
    b = GraphBuilder("g")
    x = b.input("images", np.float32, ["B", 3, 5, 7])
    b.input("ids_keep", np.int64, [2, "K"])
    b.output("cls", x, ["B", 13])
    assert b.inputs() == [
        {"name": "images", "dtype": "float32", "shape": ["B", 3, 5, 7]},
        {"name": "ids_keep", "dtype": "int64", "shape": [2, "K"]},
    ]
    assert b.outputs() == [{"name": "cls", "dtype": "float32", "shape": ["B", 13]}]


def test_a_constant_that_is_asked_for_twice_is_stored_once(tmp_path: Path) -> None:
    b = GraphBuilder("g")
    x = b.input("x", np.float32, ["B", 6])
    constants = [b.integers(0, 2, 3), b.integers(0, 3, 2), b.integers(0, 2, 3)]
    assert constants == ["const/0_2_3", "const/0_3_2", "const/0_2_3"]
    for index, constant in enumerate(constants):
        b.output(f"y{index}", b.node("Reshape", [x, constant], f"reshaped{index}"), ["B", "rows", "columns"])
    saved = SavedGraph(b, tmp_path)
    assert {name: numpy_helper.to_array(tensor).tolist() for name, tensor in saved.weights.items()} == {
        "const/0_2_3": [0, 2, 3],
        "const/0_3_2": [0, 3, 2],
    }
    assert all(tensor.data_type == TensorProto.INT64 for tensor in saved.weights.values())
    assert [array.shape for array in saved(x=np.zeros((5, 6), np.float32)).values()] == [
        (5, 2, 3),
        (5, 3, 2),
        (5, 2, 3),
    ]


def test_scalars_are_shared_by_value_and_type() -> None:
    b = GraphBuilder("g")
    names = [
        b.scalar(1.0),
        b.scalar(1.0, np.float32),
        b.scalar(1.0, np.float16),
        b.scalar(1, np.int64),
        b.scalar(0.5),
        b.scalar(0.5),
    ]
    assert len(set(names)) == 4
    assert names[0] == names[1]
    assert names[4] == names[5]
    assert [b.types[name].name for name in names[1:5]] == ["float32", "float16", "int64", "float32"]


def test_a_scalar_has_no_dimension(tmp_path: Path) -> None:
    b = GraphBuilder("g")
    x = b.input("x", np.float16, ["B", 3])
    b.output("y", b.node("Mul", [x, b.scalar(0.1, np.float16)], "tenth"), ["B", 3], np.float16)
    saved = SavedGraph(b, tmp_path)
    [constant] = (numpy_helper.to_array(tensor) for tensor in saved.weights.values())
    assert (constant.shape, constant.dtype.name, float(constant)) == ((), "float16", float(np.float16(0.1)))
    np.testing.assert_array_equal(
        saved(x=np.full((2, 3), 3, np.float16))["y"], np.full((2, 3), np.float16(3) * np.float16(0.1))
    )


def test_a_node_that_is_asked_for_twice_is_there_once(tmp_path: Path) -> None:
    b = GraphBuilder("g")
    x = b.input("x", np.float32, ["B", 3])
    assert b.node("Add", [x, x], "sum") == b.node("Add", [x, x], "sum") == "sum"
    with pytest.raises(AssertionError, match="sum"):
        b.node("Mul", [x, x], "sum")
    b.output("y", "sum", ["B", 3])
    assert [node.op_type for node in SavedGraph(b, tmp_path).model.graph.node] == ["Add", "Identity"]


# --- types -----------------------------------------------------------------------------------------------------------


def test_the_type_of_every_value_is_known(tmp_path: Path) -> None:
    """As shape inference finds it afterwards: the builder decides by it what to cast."""
    b = GraphBuilder("g")
    x = b.input("x", np.float32, ["B", 6])
    half = b.cast(x, np.float16)
    scale, zero = b.scalar(0.25, np.float32), b.scalar(0, np.int8)
    rounded = b.node("QuantizeLinear", [x, scale, zero], "rounded")
    again = b.node("DequantizeLinear", [rounded, scale, zero], "again")
    dynamic = b.node("DynamicQuantizeLinear", [x], "dynamic", extra_outputs=("dynamic/scale", "dynamic/zero"))
    b.node("MatMulInteger", [dynamic, b.weight("integers", np.ones((6, 2), np.int8)), "dynamic/zero"], "product")
    same = b.node("Equal", [x, again], "same")
    b.node("LessOrEqual", [half, half], "less")
    chosen = b.node("Where", [same, half, b.scalar(0.0, np.float16)], "chosen")
    b.output("y", chosen, ["B", 6])
    b.save(tmp_path / "graph.onnx")
    inferred = onnx.shape_inference.infer_shapes(
        onnx.load(tmp_path / "graph.onnx"), check_type=True, strict_mode=True
    ).graph.value_info
    found = {entry.name: helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type).name for entry in inferred}
    assert {name: b.types[name].name for name in found} == found
    assert found == {
        "x/float16": "float16",
        "rounded": "int8",
        "again": "float32",
        "dynamic": "uint8",
        "dynamic/scale": "float32",
        "dynamic/zero": "uint8",
        "product": "int32",
        "same": "bool",
        "less": "bool",
        "chosen": "float16",
    }


def test_one_cast_for_all_who_need_it(tmp_path: Path) -> None:
    b = GraphBuilder("g")
    x = b.input("x", np.float32, ["B", 3])
    assert b.cast(x, np.float32) == x
    first, second = b.cast(x, np.float16), b.cast(x, "float16")
    assert first == second != x
    assert b.cast(first, np.float32) != x, "what was lost stays lost"
    b.output("y", b.node("Add", [first, second], "sum"), ["B", 3])
    saved = SavedGraph(b, tmp_path)
    assert [node.op_type for node in saved.model.graph.node] == ["Cast", "Cast", "Add", "Cast"]
    np.testing.assert_array_equal(
        saved(x=np.array([[0.1, 1, 2049]], np.float32))["y"],
        2 * np.array([[0.1, 1, 2049]], np.float16).astype(np.float32),
    )


@pytest.mark.parametrize(("dtype", "operator"), [(np.float32, "Identity"), (np.float16, "Cast")])
def test_an_output_in_the_type_asked_for(tmp_path: Path, dtype: type, operator: str) -> None:
    b = GraphBuilder("g")
    b.output("y", b.input("x", np.float32, ["B", 3]), ["B", 3], dtype)
    saved = SavedGraph(b, tmp_path)
    assert [node.op_type for node in saved.model.graph.node] == [operator]
    assert saved(x=np.array([[0.1, 1, 2]], np.float32))["y"].tolist() == np.array([[0.1, 1, 2]], dtype).tolist()
    assert b.outputs() == [{"name": "y", "dtype": np.dtype(dtype).name, "shape": ["B", 3]}]


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("opset", [OPSET, OPSET_TYPED_SCALES])
def test_a_mean_in_every_opset(tmp_path: Path, opset: int, keepdims: bool) -> None:
    """Its axes are an attribute before opset 18 and an input from there on."""
    b = GraphBuilder("g", opset=opset)
    x = b.input("x", np.float32, ["B", 3, 5])
    b.output("y", b.mean(x, 1, "mean", keepdims=keepdims), ["B", 1, 5] if keepdims else ["B", 5])
    values = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    saved = SavedGraph(b, tmp_path)
    np.testing.assert_allclose(saved(x=values)["y"], values.mean(axis=1, keepdims=keepdims), rtol=0, atol=1e-6)
    assert [(entry.domain, entry.version) for entry in saved.model.opset_import] == [("", opset)]
    assert saved.model.ir_version == {17: 8, 19: 9}[opset]


def test_one_node_may_give_several_outputs(tmp_path: Path) -> None:
    b = GraphBuilder("g")
    x = b.input("x", np.float32, ["B", 3])
    doubled = b.node("Add", [x, x], "doubled")
    b.output("first", doubled, ["B", 3])
    b.output("second", doubled, ["B", 3])
    found = SavedGraph(b, tmp_path)(x=np.array([[1, 2, 3]], np.float32))
    assert {name: array.tolist() for name, array in found.items()} == {"first": [[2, 4, 6]], "second": [[2, 4, 6]]}


def test_attributes_reach_the_node(tmp_path: Path) -> None:
    b = GraphBuilder("g")
    x = b.input("x", np.float32, [2, 3])
    b.output("y", b.node("Transpose", [x], "turned", perm=[1, 0]), [3, 2])
    pixels = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(SavedGraph(b, tmp_path)(x=pixels)["y"], pixels.T)


# --- weights inside and beside the graph -----------------------------------------------------------------------------


def test_weights_up_to_the_limit_stay_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", LARGE.nbytes + OTHER.nbytes)
    saved = SavedGraph(linear_graph(), tmp_path)
    assert saved.files == [tmp_path / "graph.onnx"] == list(tmp_path.iterdir())
    # Sums of 19 products in another order.
    np.testing.assert_allclose(saved(x=INPUT)["y"], expected_output(), rtol=0, atol=1e-5)


def test_weights_above_the_limit_go_to_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", LARGE.nbytes + OTHER.nbytes - 1)
    saved = SavedGraph(linear_graph(), tmp_path)
    assert saved.files == [tmp_path / "graph.onnx", tmp_path / "graph.onnx.data"]
    assert set(tmp_path.iterdir()) == set(saved.files)
    np.testing.assert_allclose(saved(x=INPUT)["y"], expected_output(), rtol=0, atol=1e-5)
    # Small constants stay where shape inference can read them.
    outside = {
        name: {entry.key: entry.value for entry in tensor.external_data}
        for name, tensor in saved.weights.items()
        if tensor.external_data
    }
    assert set(outside) == {"first.weight", "second.weight"}
    assert outside["first.weight"] == {"location": "graph.onnx.data", "offset": "0", "length": str(LARGE.nbytes)}
    assert outside["second.weight"] == {"location": "graph.onnx.data", "offset": "4096", "length": str(OTHER.nbytes)}
    content = saved.files[1].read_bytes()
    assert len(content) == 4096 + OTHER.nbytes
    assert content[: LARGE.nbytes] == LARGE.T.tobytes()
    assert content[4096:] == OTHER.T.tobytes()
    assert saved.files[0].stat().st_size < LARGE.nbytes


def test_both_forms_are_the_same_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "beside").mkdir()
    inside = SavedGraph(linear_graph(), tmp_path / "inside")
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", 1)
    beside = SavedGraph(linear_graph(), tmp_path / "beside")
    np.testing.assert_array_equal(inside(x=INPUT)["y"], beside(x=INPUT)["y"])
    whole = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(beside.path).graph.initializer}
    assert whole.keys() == inside.weights.keys()
    for name, tensor in inside.weights.items():
        np.testing.assert_array_equal(whole[name], numpy_helper.to_array(tensor), strict=True)


def test_a_graph_with_external_data_may_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", 1)
    (tmp_path / "here").mkdir()
    linear_graph().save(tmp_path / "here" / "graph.onnx")
    (tmp_path / "here").rename(tmp_path / "there")
    found = run_session(open_session(tmp_path / "there" / "graph.onnx"), x=INPUT)
    np.testing.assert_allclose(found["y"], expected_output(), rtol=0, atol=1e-5)  # as above


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_builder, "INLINE_LIMIT", 1)
    graph = linear_graph()
    contents = []
    for _ in range(2):
        contents.append([path.read_bytes() for path in graph.save(tmp_path / "graph.onnx")])
    assert contents[0] == contents[1]


# --- what the checker refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "inputs"),
    [("NoSuchOperator", ["x"]), ("Add", ["x", "nowhere"]), ("MatMul", ["x", "weight"])],
    ids=["operator", "missing input", "shapes"],
)
def test_an_invalid_graph_is_one_line(tmp_path: Path, op: str, inputs: list[str]) -> None:
    b = GraphBuilder("g")
    b.input("x", np.float32, [2, 3])
    b.weight("weight", np.zeros((5, 7), np.float32))
    b.output("y", b.node(op, inputs, "wrong"), [2, 7])
    with pytest.raises(CheckFailed, match=r"^the exported graph is not valid ONNX: ") as caught:
        b.save(tmp_path / "graph.onnx")
    assert "\n" not in str(caught.value)


def test_an_output_of_another_shape_than_declared_is_refused(tmp_path: Path) -> None:
    b = GraphBuilder("g")
    b.output("y", b.node("Neg", [b.input("x", np.float32, ["B", 3])], "negative"), ["B", 5])
    with pytest.raises(CheckFailed, match="not valid ONNX"):
        b.save(tmp_path / "graph.onnx")
