"""The values of sizes and indices where they follow from known ones: what a graph computes of shapes, not images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.graph import shapes
from mae_deploy.runtime.graph.nodes import KNOWN_VALUES, Node, Tensor
from mae_deploy.runtime.graph.shapes import Given, Shape


def _from_values(function: Any) -> Callable[[Node, Given], Array | None]:
    """Of operators whose result follows from the values of all inputs."""

    def compute(node: Node, given: Given) -> Array | None:
        if any(tensor.values is None for tensor in given):
            return None
        with np.errstate(all="ignore"):
            return np.asarray(function(*(tensor.values for tensor in given)))

    return compute


def _moved(rule: Callable[[Node, Given], list[Shape]]) -> Callable[[Node, Given], Array | None]:
    """Of operators that only give the first input another shape."""
    return lambda node, given: None if given[0].values is None else given[0].values.reshape(rule(node, given)[0])


def _value_of_constant(node: Node, given: Given) -> Array | None:
    (value,) = node.attributes.values()
    if isinstance(value, Tensor):
        return value.values
    whole = "int" in next(iter(node.attributes))
    return None if isinstance(value, str) else np.array(value, np.int64 if whole else np.float32)


def _value_of_fill(node: Node, given: Given) -> Array | None:
    fill = node.attributes.get("value")
    values = np.zeros(1, np.float32) if fill is None else fill.values
    if values is None:
        return None
    return np.full(shapes.numbers_of(given[0], "shape"), values.reshape(-1)[0], values.dtype)


def _value_of_cast(node: Node, given: Given) -> Array | None:
    dtype = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}.get(
        node.attributes["to"]
    )
    if given[0].values is None or dtype is None:
        return None
    with np.errstate(all="ignore"):
        return given[0].values.astype(dtype)


def _value_of_quantized(node: Node, given: Given) -> Array | None:
    """Of one scale, which is how the ends of a Range are quantised."""
    values, scale, zero = (tensor.values for tensor in (*given, shapes.LEFT_OUT)[:3])
    if values is None or scale is None or zero is None or scale.size != 1 or zero.dtype.kind not in "iu":
        return None
    ends = np.iinfo(zero.dtype)
    with np.errstate(all="ignore"):
        return (np.rint(values / scale).astype(np.float64) + zero).clip(ends.min, ends.max).astype(zero.dtype)


def _value_of_dequantized(node: Node, given: Given) -> Array | None:
    values, scale, zero = (tensor.values for tensor in (*given, shapes.LEFT_OUT)[:3])
    if values is None or scale is None or zero is None or scale.size != 1:
        return None
    return ((values.astype(np.int32) - zero.astype(np.int32)).astype(scale.dtype) * scale).astype(scale.dtype)


def _value_of_gather(node: Node, given: Given) -> Array | None:
    values, indices = given[0].values, given[1].values
    return None if values is None or indices is None else np.take(values, indices, node.attributes.get("axis", 0))


def _value_of_concat(node: Node, given: Given) -> Array | None:
    parts = [tensor.values for tensor in given if tensor.values is not None]
    return np.concatenate(parts, node.attributes["axis"]) if len(parts) == len(given) else None


def _value_of_slice(node: Node, given: Given) -> Array | None:
    return None if given[0].values is None else given[0].values[shapes.slices(node, given)]


def _value_of_split(node: Node, given: Given) -> list[Array] | None:
    values, axis = given[0].values, node.attributes.get("axis", 0)
    sides = np.cumsum([shape[axis] for shape in shapes.split(node, given)])[:-1]
    return None if values is None else np.split(values, sides, axis)


def _value_of_reduced(function: Any) -> Callable[[Node, Given], Array | None]:
    def compute(node: Node, given: Given) -> Array | None:
        values, axes = given[0].values, shapes.axes_of(node, given)
        if values is None or node.attributes.get("noop_with_empty_axes"):
            return None
        return np.asarray(
            function(values, axis=tuple(axes) if axes else None, keepdims=bool(node.attributes.get("keepdims", 1)))
        )

    return compute


def _divided(left: Array, right: Array) -> Array:
    if left.dtype.kind == "f":
        return np.asarray(left / right)
    return np.asarray(np.where(right == 0, 0, np.trunc(left / np.where(right == 0, 1, right))).astype(left.dtype))


def _parts(node: Node, given: Given) -> Tensor:
    """A sequence, as large as its parts together."""
    shape = given[0].shape
    axis = shapes.place_of(node.attributes.get("axis", 0), len(shape))
    if len(given) < 2:
        sides = [1] * shape[axis]
    elif given[1].shape:
        sides = shapes.numbers_of(given[1], "parts")
    else:
        (each,) = shapes.numbers_of(given[1], "parts")
        sides = [min(each, shape[axis] - start) for start in range(0, shape[axis], each)]
    if sum(sides) != shape[axis] or min(sides, default=0) < 0 or len(sides) > KNOWN_VALUES:
        raise ValueError(f"{shape[axis]} in {len(sides)} parts")
    found = [(*shape[:axis], side, *shape[axis + 1 :]) for side in sides]
    if len(given) < 2 and not node.attributes.get("keepdims", 1):
        found = [(*part[:axis], *part[axis + 1 :]) for part in found]
    return Tensor(shape, parts=tuple(map(Tensor, found)))


def _part(node: Node, given: Given) -> Tensor:
    (place,) = shapes.numbers_of(given[1], "place")
    return given[0].parts[place]


SEQUENCES: dict[tuple[str, str], Callable[[Node, Given], Tensor]] = {
    ("", "SequenceAt"): _part,
    ("", "SplitToSequence"): _parts,
}
"""What takes apart, as torch's exporter writes it without its optimiser."""

VALUES: dict[str, Callable[[Node, Given], Array | list[Array] | None]] = {
    **{
        name: _from_values(function)
        for name, function in {
            "Abs": np.abs,
            "Add": np.add,
            "And": np.logical_and,
            "Ceil": np.ceil,
            "Div": _divided,
            "Equal": np.equal,
            "Expand": lambda values, shape: np.broadcast_to(values, np.broadcast_shapes(values.shape, tuple(shape))),
            "Floor": np.floor,
            "Greater": np.greater,
            "GreaterOrEqual": np.greater_equal,
            "Identity": lambda values: values,
            "Less": np.less,
            "LessOrEqual": np.less_equal,
            "Max": lambda *values: np.max(np.broadcast_arrays(*values), axis=0),
            "Min": lambda *values: np.min(np.broadcast_arrays(*values), axis=0),
            "Mod": np.mod,
            "Mul": np.multiply,
            "Neg": np.negative,
            "Not": np.logical_not,
            "Or": np.logical_or,
            "Pow": lambda base, exponent: np.power(base.astype(np.float64), exponent).astype(base.dtype),
            "Range": np.arange,
            "Sqrt": np.sqrt,
            "Sub": np.subtract,
            "Tile": np.tile,
            "Where": np.where,
        }.items()
    },
    "Cast": _value_of_cast,
    "CastLike": lambda node, given: (
        None if given[0].values is None or given[1].values is None else given[0].values.astype(given[1].values.dtype)
    ),
    "Concat": _value_of_concat,
    "Constant": _value_of_constant,
    "ConstantOfShape": _value_of_fill,
    "DequantizeLinear": _value_of_dequantized,
    "Flatten": _moved(shapes.flatten),
    "Gather": _value_of_gather,
    "QuantizeLinear": _value_of_quantized,
    "ReduceMax": _value_of_reduced(np.max),
    "ReduceMin": _value_of_reduced(np.min),
    "ReduceProd": _value_of_reduced(np.prod),
    "ReduceSum": _value_of_reduced(np.sum),
    "Reshape": _moved(shapes.reshape),
    "Shape": lambda node, given: np.array(shapes.of_shape(node, given), np.int64),
    "Size": lambda node, given: np.array(given[0].size, np.int64),
    "Slice": _value_of_slice,
    "Split": _value_of_split,
    "Squeeze": _moved(shapes.squeeze),
    "Transpose": lambda node, given: (
        None if given[0].values is None else given[0].values.transpose(node.attributes.get("perm"))
    ),
    "Unsqueeze": _moved(shapes.unsqueeze),
}
