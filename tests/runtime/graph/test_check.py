"""What no engine should run is refused before one sees it; networks of our kind are followed exactly."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.graph.check import GraphCheck, Network, check_graph
from mae_deploy.runtime.graph.nodes import Tensor, read_graph
from mae_deploy.runtime.registry import load_engine, open_graph
from tests.hostile.graphs import GRAPHS
from tests.hostile.run import FIXTURES

BUNDLES = sorted(path.parent.name for path in (FIXTURES / "bundles").glob("*/encoder.onnx"))
SIZES = {"B": 3, "K": 9}
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def computed(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of a run, and every value in the graph, as ONNX Runtime computes them."""
    model = onnx.load(path)
    known = {entry.name for entry in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in model.graph.node for name in node.output if name not in known
    )
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {}
    for entry in session.get_inputs():
        shape: list[Any] = [SIZES.get(side, side) for side in entry.shape]
        values = np.arange(shape[-1]) if entry.type == "tensor(int64)" and len(shape) > 1 else 3
        given[entry.name] = np.broadcast_to(values, shape).astype(_DTYPES[entry.type])
    names = [entry.name for entry in session.get_outputs()]
    return given, dict(zip(names, session.run(names, given), strict=True))


def check_against_engine(path: Path) -> None:
    """Every shape that is followed is the one that is computed, and so are the values."""
    given, found = computed(path)
    known: Mapping[str, Tensor] = GraphCheck(path).follow({name: array.shape for name, array in given.items()})
    for name, array in found.items():
        values = known[name].values
        assert known[name].shape == array.shape, name
        assert values is None or np.array_equal(values, array, equal_nan=True), name


@pytest.mark.parametrize("name", [name for name in BUNDLES if name != "bf16"])  # of bfloat16 NumPy knows nothing
def test_every_shape_is_that_of_the_engine(name: str, tmp_path: Path) -> None:
    check_against_engine(Path(shutil.copytree(FIXTURES / "bundles" / name, tmp_path / name)) / "encoder.onnx")


@pytest.mark.parametrize("name", ["visible", "int8-dynamic", "int8-static"])
def test_what_an_optimiser_wrote_is_followed(name: str, tmp_path: Path) -> None:
    """With operators of its own, which the file that it writes has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(FIXTURES / "bundles" / name / "encoder.onnx"), options)
    own = [node.domain for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert any(domain.startswith("com.microsoft") for domain in own)
    check_against_engine(tmp_path / "optimised.onnx")


def test_nodes_may_stand_in_any_order(tmp_path: Path) -> None:
    """As a conversion to FP16 leaves them."""
    model = onnx.load(FIXTURES / "bundles/visible/encoder.onnx")
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "a.onnx")
    check_against_engine(tmp_path / "a.onnx")


@pytest.mark.parametrize("name", BUNDLES)
def test_our_own_bundles_pass(name: str) -> None:
    assert Bundle.load(FIXTURES / "bundles" / name).graph().is_file()


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "200,000 nodes"])
def test_hostile_graphs_are_refused(name: str, tmp_path: Path) -> None:
    model = onnx.load(FIXTURES / "bundles/visible/encoder.onnx")
    GRAPHS[name](model)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    shapes = [{"images": (batch, 3, 25, 10), "ids_keep": (batch, 9)} for batch in (1, 64)]
    with pytest.raises(ConfigError) as refused:
        check_graph(tmp_path / "a.onnx", shapes, Network(tokens=11, dim=12, heads=3))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 900


def test_too_many_nodes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_deploy.runtime.graph.nodes._MOST_FIELDS", 500)
    with pytest.raises(ConfigError, match="more nodes than any network"):
        read_graph(FIXTURES / "bundles/visible/encoder.onnx")


def test_a_bundle_names_the_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.hostile.run import CORPORA

    bundle = str(CORPORA["bundle"].files["graph with Tile to TB"](tmp_path))
    assert main(["verify", bundle, "--threads", "1"]) == 2
    assert "node 'hostile' (Tile) would need 1,000,000,000," in capsys.readouterr().err


def chosen(path: Path, condition: bool | None) -> Path:
    """A graph that doubles its input or leaves it as it is; None: as the input says."""
    value = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    twice = helper.make_graph([helper.make_node("Concat", ["x", "x"], ["y"], axis=0)], "twice", [], value)
    same = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [], value)
    nodes = [] if condition is not None else [helper.make_node("Cast", ["first"], ["condition"], to=TensorProto.BOOL)]
    if condition is None:
        nodes = [helper.make_node("ReduceMax", ["x"], ["first"], keepdims=0), *nodes]
    constants = [helper.make_tensor("condition", TensorProto.BOOL, [], [bool(condition)])][: condition is not None]
    nodes.append(helper.make_node("If", ["condition"], ["z"], then_branch=twice, else_branch=same))
    graph = helper.make_graph(
        nodes,
        "chosen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 5])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize(("condition", "rows"), [(True, 6), (False, 3)])
def test_branches_are_looked_at(condition: bool, rows: int, tmp_path: Path) -> None:
    """As torch's exporter writes for some models."""
    path = chosen(tmp_path / "a.onnx", condition)
    assert GraphCheck(path).follow({"x": (3, 5)})["z"].shape == (rows, 5)


def test_a_branch_that_pixels_choose_must_not_change_sizes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="branches of different sizes"):
        GraphCheck(chosen(tmp_path / "a.onnx", None)).check({"x": (3, 5)})


def larger_at(path: Path, axis: int, size: int) -> Path:
    """A bundle's graph that needs 10^12 numbers, but only where an axis of `ids_keep` has this size."""
    model = onnx.load(FIXTURES / "bundles/visible/encoder.onnx")
    constants = {"size": np.array([size]), "large": np.array([10**12]), "one": np.array([1]), "zero": np.zeros(1)}
    model.graph.initializer.extend(numpy_helper.from_array(value, f"h_{name}") for name, value in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["ids_keep"], ["h_given"], start=axis, end=axis + 1),
            helper.make_node("Equal", ["h_given", "h_size"], ["h_same"]),
            helper.make_node("Where", ["h_same", "h_large", "h_one"], ["h_times"]),
            helper.make_node("Tile", ["h_zero", "h_times"], ["h_long"]),
        ]
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("axis", [0, 1])
def test_every_size_is_followed_before_it_runs(axis: int, tmp_path: Path) -> None:
    """What the smallest and the largest do not show."""

    def given(size: int) -> dict[str, Any]:
        B, K = (size, 9) if axis == 0 else (2, size)
        return {"images": np.zeros((B, 3, 25, 10), np.float32), "ids_keep": np.tile(np.arange(K), (B, 1))}

    path = larger_at(tmp_path / "a.onnx", axis, 5)
    trials = [{name: array.shape for name, array in given(size).items()} for size in (1, 9)]
    check = check_graph(path, trials, Network(tokens=11, dim=12, heads=3))
    engine: Engine
    with open_graph(path, options=EngineOptions(threads=1), check=check) as engine:
        for again in (engine, pickle.loads(pickle.dumps(engine))):
            assert len(again.run(given(4))["cls"]) == (4 if axis == 0 else 2)
            with pytest.raises(ConfigError, match=r"node 'h_long' \(Tile\) would need 1,000,000,000,"):
                again.run(given(5))


def test_a_bundle_is_followed_at_every_size(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(FIXTURES / "bundles/visible-8", tmp_path / "b"))
    with load_engine(Bundle.load(bundle), options=EngineOptions(threads=1)) as engine:
        assert engine._graph_check is not None


def test_what_is_made_stays_until_its_last_use(tmp_path: Path) -> None:
    """40 arrays after one another pass where 40 at the same time do not."""
    number = 1 << 24
    names = [f"a{index}" for index in range(40)]

    def written(nodes: list[onnx.NodeProto]) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Tile", ["x", "times"], [names[0]]), *nodes],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [helper.make_tensor("times", TensorProto.INT64, [1], [number])],
        )
        onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
        return tmp_path / "a.onnx"

    network = Network(tokens=2, dim=2, heads=1)
    chain = [helper.make_node("Neg", [a], [b]) for a, b in zip(names, [*names[1:], "y"], strict=True)]
    check_graph(written(chain), [{}], network)
    beside = [helper.make_node("Neg", [names[0]], [name]) for name in names[1:]]
    with pytest.raises(ConfigError, match="would need"):
        check_graph(written([*beside, helper.make_node("Sum", names, ["y"])]), [{}], network)
