"""Graphs of a few nodes, as ONNX Runtime reads them from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mae_deploy.images.read import Array
from tests.export.tiny_exports import open_session


def open_small(
    folder: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    shape: list[int],
    output: list[int],
    opset: int = 17,
) -> Any:
    """A graph from `x` to `y` in ONNX Runtime."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [
            helper.make_tensor(
                name,
                helper.np_dtype_to_tensor_dtype(value.dtype),
                value.shape,
                np.ascontiguousarray(value).tobytes(),
                raw=True,
            )
            for name, value in constants.items()
        ],
    )
    path = folder / "small.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    onnx.checker.check_model(str(path), full_check=True)
    return open_session(path)
