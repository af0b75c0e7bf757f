"""The part of an ONNX graph that some of its tensors need: what lies behind them is not run by any engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

_GRAPH = "teacher.onnx"
_DATA = "teacher.onnx.data"


def output_of(tensor: str) -> str:
    """The name under which a tensor is an output of the graph that `write_prefix` writes."""
    return f"{tensor}:float32"


def write_prefix(graph: Path, tensors: Sequence[str], folder: Path) -> Path:
    """Write the part of a graph that gives these tensors, in float32, and return its path; weights of the rest are left
    out.

    Args:
        tensors: names of outputs or inner tensors; `output_of` says what they are called.
    """
    model = onnx.load(graph)
    needed = _needed(model.graph, tensors)
    nodes = [node for node in model.graph.node if needed & set(node.output)]
    casts = [helper.make_node("Cast", [tensor], [output_of(tensor)], to=TensorProto.FLOAT) for tensor in tensors]
    _keep(model.graph.node, [*nodes, *casts])
    _keep(model.graph.initializer, [weight for weight in model.graph.initializer if weight.name in needed])
    _keep(model.graph.input, [entry for entry in model.graph.input if entry.name in needed])
    _keep(
        model.graph.output,
        [helper.make_tensor_value_info(output_of(tensor), TensorProto.FLOAT, None) for tensor in tensors],
    )
    _keep(model.graph.value_info, [entry for entry in model.graph.value_info if entry.name in needed])
    path = folder / _GRAPH
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=_DATA)
    return path


def _needed(graph: onnx.GraphProto, tensors: Sequence[str]) -> set[str]:
    """Every tensor that these depend on, and they themselves."""
    producers = {output: node for node in graph.node for output in node.output}
    needed: set[str] = set()
    left = list(tensors)
    while left:
        tensor = left.pop()
        if tensor not in needed:
            needed.add(tensor)
            left += producers[tensor].input if tensor in producers else ()
    return needed


def _keep(field: object, kept: Sequence[object]) -> None:
    """Put other entries into a repeated field of a protobuf."""
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]
