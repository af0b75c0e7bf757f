"""A small builder for ONNX graphs: named nodes, named weights, and files that never hold the weights twice in memory.

Graphs are written node by node rather than traced: nothing is left in them that the model does not compute, every
weight keeps its state-dict name, and a dynamic batch or length needs no shape arithmetic but in a ragged one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mae_deploy.errors import CheckFailed
from mae_deploy.export.graph.precision import BFLOAT16, FLOAT32
from mae_deploy.images.read import Array
from mae_deploy.runtime.manifest import TensorEntry

OPSET = 17
"""The highest that TensorRT 8.6 reads, and the first with LayerNormalization."""

OPSET_TYPED_SCALES = 19
"""The first whose QuantizeLinear takes FP16, with FP16 scales, and gives FP8: eight bits in an FP16 graph."""

_IR_VERSIONS = {OPSET: 8, OPSET_TYPED_SCALES: 9}
"""The file format's version that came with each opset."""

INLINE_LIMIT = 1 << 30
"""Weights of more bytes go to a file beside the graph (protobuf ends at 2 GiB)."""

_LARGE = 1024
"""Bytes from which a constant may go to that file."""

_ALIGNMENT = 4096

Dim = int | str
"""A fixed size, or the name of a dynamic one."""


_RESULT_TYPES: dict[str, np.dtype[Any]] = {
    "DynamicQuantizeLinear": np.dtype(np.uint8),
    "MatMulInteger": np.dtype(np.int32),
    "Equal": np.dtype(np.bool_),
    "LessOrEqual": np.dtype(np.bool_),
    "Shape": np.dtype(np.int64),
}
"""Of operators whose result is not of the type of their first input; see also `_result_type`."""


class GraphBuilder:
    """Collects nodes, weights, inputs and outputs, and knows every value's type."""

    def __init__(self, name: str, *, opset: int = OPSET, emulates_bf16: bool = False) -> None:
        """Begin an empty graph.

        Args:
            emulates_bf16: compute in FP32 what is BF16, and round the result to BF16: for engines that store BF16 and
                do not compute in it.
        """
        self.name = name
        self.opset = opset
        self.emulates_bf16 = emulates_bf16
        self.types: dict[str, np.dtype[Any]] = {}
        self._nodes: dict[str, onnx.NodeProto] = {}
        self._weights: dict[str, Array] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[Dim]) -> str:
        """Declare a graph input; returns its name."""
        self.types[name] = np.dtype(dtype)
        self._inputs.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
        )
        return name

    def output(self, name: str, value: str, shape: Sequence[Dim], dtype: npt.DTypeLike = np.float32) -> None:
        """Declare a graph output: `value` under the name that users see, in `dtype`."""
        dtype = np.dtype(dtype)
        attributes: dict[str, Any] = (
            {} if self.types[value] == dtype else {"to": helper.np_dtype_to_tensor_dtype(dtype)}
        )
        self._nodes[f"output/{name}"] = helper.make_node(
            "Cast" if attributes else "Identity", [value], [name], name=f"output/{name}", **attributes
        )
        self._outputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), list(shape)))

    def weight(self, name: str, value: Array) -> str:
        """Store a constant tensor under a name; returns the name. The same name again must mean the same tensor."""
        self._weights.setdefault(name, value)
        self.types[name] = value.dtype
        return name

    def integers(self, *values: int) -> str:
        """An int64 vector, shared by all who need the same one."""
        return self.weight("const/" + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float, dtype: npt.DTypeLike = np.float32) -> str:
        """A scalar constant, shared by all who need the same one."""
        dtype = np.dtype(dtype)
        return self.weight(f"const/{dtype.name}/{value!r}", np.array(value, dtype))

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, extra_outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """Add a node whose first output carries the node's name; returns that. The same name again means the same
        node.
        """
        if self.emulates_bf16 and op != "Cast" and any(self.types[value] == BFLOAT16 for value in inputs):
            wide = [self.cast(value, FLOAT32) if self.types[value] == BFLOAT16 else value for value in inputs]
            return self.cast(self.node(op, wide, f"{name}/wide", **attributes), BFLOAT16, name=name)
        node = helper.make_node(op, list(inputs), [name, *extra_outputs], name=name, **attributes)
        assert self._nodes.setdefault(name, node) == node, f"two nodes are named {name}"
        self.types[name] = self._result_type(op, inputs, attributes)
        if op == "DynamicQuantizeLinear":
            self.types |= dict(zip(extra_outputs, (np.dtype(np.float32), np.dtype(np.uint8)), strict=True))
        return name

    def cast(self, value: str, dtype: npt.DTypeLike, *, name: str | None = None) -> str:
        """The value in another type: one Cast for all who need it, none where it has that type."""
        dtype = np.dtype(dtype)
        name = name or f"{value}/{dtype.name}"
        if self.types[value] == dtype:
            return value
        return (
            name if name in self.types else self.node("Cast", [value], name, to=helper.np_dtype_to_tensor_dtype(dtype))
        )

    def mean(self, value: str, axis: int, name: str, *, keepdims: bool = False) -> str:
        """The mean along an axis; from opset 18 on, ReduceMean takes the axes as an input."""
        if self.opset < 18:
            return self.node("ReduceMean", [value], name, axes=[axis], keepdims=int(keepdims))
        return self.node("ReduceMean", [value, self.integers(axis)], name, keepdims=int(keepdims))

    def half(self, value: str, dim: int, index: int, name: str) -> str:
        """The first or second half of the last axis, `(..., dim) -> (..., dim / 2)`."""
        ends = self.integers(index * dim // 2), self.integers((1 + index) * dim // 2), self.integers(-1)
        return self.node("Slice", [value, *ends], name)

    def without_first(self, tokens: str, count: int, name: str, axis: int = 1) -> str:
        """All tokens but the first ones, CLS and registers: `(B, P + N, D) -> (B, N, D)`."""
        if not count:
            return tokens
        ends = self.integers(count), self.integers(np.iinfo(np.int64).max), self.integers(axis)
        return self.node("Slice", [tokens, *ends], name)

    def inputs(self) -> list[TensorEntry]:
        """The inputs as a manifest records them."""
        return [_entry(info) for info in self._inputs]

    def outputs(self) -> list[TensorEntry]:
        """The outputs as a manifest records them."""
        return [_entry(info) for info in self._outputs]

    def save(self, path: Path) -> list[Path]:
        """Write the checked graph; returns the files written (the graph, and its weights where they are large).

        Raises:
            CheckFailed: the ONNX checker or shape inference refuses the graph.
        """
        files = [path]
        used = {name for node in self._nodes.values() for name in node.input}
        weights = {name: value for name, value in self._weights.items() if name in used}
        # Shapes and other small constants stay in the graph, where shape inference can read them.
        small = {name: value for name, value in weights.items() if value.nbytes < _LARGE}
        large = {name: value for name, value in weights.items() if name not in small}
        model = helper.make_model(
            helper.make_graph(list(self._nodes.values()), self.name, self._inputs, self._outputs),
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=_IR_VERSIONS[self.opset],
            producer_name="mae-deploy",
        )
        tensors = model.graph.initializer  # filled in place and one by one: each call above copies what it is given
        tensors.extend(numpy_helper.from_array(value, name) for name, value in small.items())
        if sum(value.nbytes for value in large.values()) > INLINE_LIMIT:
            files.append(path.with_name(path.name + ".data"))
            tensors.extend(_write_external(files[-1], large))
        else:
            tensors.extend(numpy_helper.from_array(value, name) for name, value in large.items())
        onnx.save_model(model, path)
        str(path).encode()  # onnx takes no name that is not UTF-8
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise CheckFailed(f"the exported graph is not valid ONNX: {' '.join(str(error).split())}") from error
        return files

    def _result_type(self, op: str, inputs: Sequence[str], attributes: dict[str, Any]) -> np.dtype[Any]:
        if op == "Cast":
            return np.dtype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
        if op in ("DequantizeLinear", "Where"):  # the scale's; that of the values chosen from
            return self.types[inputs[1]]
        if op == "QuantizeLinear":  # the zero point's
            return self.types[inputs[2]]
        return _RESULT_TYPES.get(op, self.types[inputs[0]])


def _entry(info: onnx.ValueInfoProto) -> TensorEntry:
    tensor = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return {"name": info.name, "dtype": dtype, "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]}


def _write_external(path: Path, weights: dict[str, Array]) -> list[onnx.TensorProto]:
    """Stream the weights to one aligned file; only one of them is copied at a time."""
    tensors = []
    with path.open("wb") as file:
        for name, value in weights.items():
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            offset = file.tell()
            np.ascontiguousarray(value).tofile(file)
            tensor = TensorProto(
                name=name,
                data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
                dims=value.shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, entry in (("location", path.name), ("offset", offset), ("length", value.nbytes)):
                tensor.external_data.add(key=key, value=str(entry))
            tensors.append(tensor)
    return tensors
