"""The nodes and constants of an ONNX file, read without the onnx package.

Fields that protobuf merges when they come twice, such as the graph itself, are refused when they do: what is checked
must be what an engine reads.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.onnx_file import (
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    VALUE_NAME,
    Message,
    opened,
    tensor_entry,
)

_MODEL_FUNCTIONS = 25
_GRAPH_SPARSE = 15
_NODE = {1: "inputs", 2: "outputs", 3: "name", 4: "operator", 5: "attributes", 7: "domain"}
_ATTRIBUTE_NAME = 1
_FLOAT, _INTEGER, _TEXT, _TENSOR, _GRAPH, _FLOATS, _INTEGERS = 2, 3, 4, 5, 6, 7, 8
_OF_OTHER_KINDS = {9: "texts", 10: "tensors", 11: "graphs", 14: "a type", 15: "types", 22: "a sparse tensor"}
_DIMS, _TYPE, _FLOATS_32, _INTEGERS_32, _INTEGERS_64, _NAME, _RAW, _FLOATS_64 = 1, 2, 4, 5, 7, 8, 9, 10

_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}
_PACKED = {_FLOATS_32: "<f4", _FLOATS_64: "<f8"}

KNOWN_VALUES = 4096
"""Numbers of a tensor whose values are followed: sizes and indices, not weights."""
_MOST_FIELDS = 500_000
"""Of a file beside its weights; a ViT-H quantised layer by layer has 50,000."""
_DEEPEST = 8
"""Graphs in graphs."""


class Tensor(NamedTuple):
    """What is known of a value before anything is computed."""

    shape: tuple[int, ...]
    values: Array | None = None
    """Where it is small, and does not depend on the images."""
    constant: bool = False
    """Whether it follows from constants and sizes alone: an engine may compute it when it loads, and keep it."""
    parts: tuple[Tensor, ...] = ()
    """Of a sequence."""

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


@dataclass(slots=True)
class Node:
    """One operator at work."""

    operator: str = ""
    domain: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    """Empty: an optional input that is left out."""
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    """Numbers, lists of them, text, a `Tensor`, a `Graph`; None: of a kind that no operator we know has."""

    @property
    def graphs(self) -> list[Graph]:
        """Those that it runs."""
        return [value for value in self.attributes.values() if isinstance(value, Graph)]

    @property
    def reads(self) -> list[str]:
        """Its inputs, and what its graphs take and give: from around them where it is not made within."""
        within = [name for graph in self.graphs for name in (*graph.outputs, *graph.reads)]
        return [name for name in (*self.inputs, *within) if name]

    def __str__(self) -> str:
        return f"node '{(self.name or ','.join(self.outputs))[:100]}' ({self.title})"

    @property
    def title(self) -> str:
        """The operator, with its domain where that is not ONNX's own."""
        return (self.operator if self.domain in ("", "ai.onnx") else f"{self.domain}.{self.operator}")[:100]


@dataclass(slots=True)
class Graph:
    """Nodes in the order in which ONNX Runtime runs them, and what they start from."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, list[int | str]] = field(default_factory=dict)
    """Shapes, with names of open sizes."""
    outputs: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    """What its nodes read, once for each that does."""

    @property
    def num_weights(self) -> int:
        """Numbers in the constants."""
        return sum(tensor.size for tensor in self.constants.values())


def read_graph(path: Path) -> Graph:
    """Read everything but the weights.

    Raises:
        ConfigError: no such file, or no ONNX model; functions or sparse weights; more fields than any network has.
    """
    with opened(path) as model:
        try:
            return _Reader().model(model)
        except _Refusal as refusal:
            raise ConfigError(f"{path} {refusal}", hint="export it without") from refusal


class _Refusal(Exception):
    """Of an ONNX model that can be read."""


class _Reader:
    def __init__(self) -> None:
        self._left = _MOST_FIELDS

    def _fields(self, message: Message) -> Iterable[tuple[int, int | Message]]:
        for entry in message.fields():
            self._left -= 1
            if self._left < 0:
                raise _Refusal(f"has more nodes than any network: beyond {_MOST_FIELDS:,} fields of its file")
            yield entry

    def model(self, message: Message) -> Graph:
        graph: Graph | None = None
        for number, value in self._fields(message):
            if number == _MODEL_FUNCTIONS:
                raise _Refusal(
                    "defines functions of its own, which onnx.inliner.inline_local_functions puts in their place"
                )
            if number == MODEL_GRAPH and isinstance(value, Message):
                if graph is not None:
                    raise _Refusal("has two graphs")
                graph = self.graph(value, 0)
        if graph is None:
            raise ValueError("it has no graph")
        return graph

    def graph(self, message: Message, depth: int) -> Graph:
        if depth > _DEEPEST:
            raise _Refusal(f"has graphs in graphs, more than {_DEEPEST} deep")
        found = Graph()
        for number, value in self._fields(message):
            if not isinstance(value, Message):
                continue
            if number == GRAPH_NODE:
                found.nodes.append(self._node(value, depth))
            elif number == GRAPH_INITIALIZER:
                name, tensor = self._tensor(value)
                if name in found.constants:
                    raise ValueError(f"two weights are named '{name[:100]}'")
                found.constants[name] = tensor
            elif number == _GRAPH_SPARSE:
                raise _Refusal("has sparse weights")
            elif number == GRAPH_INPUT:
                name = value.message(VALUE_NAME).text()
                found.inputs[name] = [] if depth else tensor_entry(value)["shape"]
            elif number == GRAPH_OUTPUT:
                found.outputs.append(value.message(VALUE_NAME).text())
        for name in found.constants:  # older files list the weights among the inputs
            found.inputs.pop(name, None)
        found.nodes = _in_order(found.nodes)
        found.reads = [name for node in found.nodes for name in node.reads]
        return found

    def _node(self, message: Message, depth: int) -> Node:
        node = Node()
        for number, value in self._fields(message):
            kind = _NODE.get(number)
            if kind is None or not isinstance(value, Message):
                continue
            if kind == "attributes":
                name, given = self._attribute(value, depth)
                if name in node.attributes:
                    raise ValueError(f"a node has the attribute '{name[:100]}' twice")
                node.attributes[name] = given
            elif kind in ("inputs", "outputs"):
                getattr(node, kind).append(value.text())
            else:
                setattr(node, kind, value.text())
        return node

    def _attribute(self, message: Message, depth: int) -> tuple[str, Any]:
        name, values = "", list[Any]()
        listed: list[Any] = []
        for number, value in self._fields(message):
            if number == _ATTRIBUTE_NAME and isinstance(value, Message):
                name = value.text()
            elif number == _INTEGER and isinstance(value, int):
                values.append(_signed(value))
            elif number == _FLOAT and isinstance(value, Message):
                values.append(struct.unpack("<f", value.content())[0])
            elif number == _TEXT and isinstance(value, Message):
                values.append(value.content().decode("utf-8", "replace") if value.size <= KNOWN_VALUES else "")
            elif number == _TENSOR and isinstance(value, Message):
                values.append(self._tensor(value)[1])
            elif number == _GRAPH and isinstance(value, Message):
                values.append(self.graph(value, depth + 1))
            elif number == _INTEGERS:
                listed += self._integers(value)
            elif number == _FLOATS and isinstance(value, Message):
                listed += np.frombuffer(value.content(), "<f4").tolist()
            elif number in _OF_OTHER_KINDS:
                raise _Refusal(f"has a node with {_OF_OTHER_KINDS[number]} as its attribute '{name[:100]}'")
        if len(values) > 1 or (values and listed):
            raise ValueError(f"a node has two values of the attribute '{name[:100]}'")
        return name, values[0] if values else listed

    def _integers(self, value: int | Message) -> list[int]:
        """One number, or several in a stretch."""
        if isinstance(value, int):
            return [_signed(value)]
        if value.size > _MOST_FIELDS:
            raise ValueError(f"a list of {value.size} bytes")
        return [_signed(number) for number in value.integers()]

    def _tensor(self, message: Message) -> tuple[str, Tensor]:
        name, kind, dims = "", 0, list[int]()
        parts: list[tuple[int, int | Message]] = []
        for number, value in self._fields(message):
            if number == _DIMS:
                dims += self._integers(value)
            elif number == _TYPE and isinstance(value, int):
                kind = value
            elif number == _NAME and isinstance(value, Message):
                name = value.text()
            elif number in (_RAW, _INTEGERS_32, _INTEGERS_64, _FLOATS_32, _FLOATS_64):
                parts.append((number, value))
        if any(side < 0 for side in dims):
            raise ValueError(f"the tensor '{name[:100]}' has the shape {dims[:8]}")
        shape = tuple(dims)
        values = self._values(parts, _DTYPES.get(kind), shape) if math.prod(shape) <= KNOWN_VALUES else None
        return name, Tensor(shape, values)

    def _values(
        self, parts: list[tuple[int, int | Message]], dtype: str | None, shape: tuple[int, ...]
    ) -> Array | None:
        if dtype is None:
            return None
        found: list[Any] = []
        for number, value in parts:
            if isinstance(value, Message) and number in (_RAW, *_PACKED):
                found += np.frombuffer(value.content(), dtype if number == _RAW else _PACKED[number]).tolist()
            elif dtype == "<f2":  # the bits of each, as an integer
                found += np.array(self._integers(value), np.uint16).view(dtype).tolist()
            else:
                found += self._integers(value)
        if len(found) != math.prod(shape):
            return None  # elsewhere, or an engine refuses it
        return np.array(found, np.dtype(dtype)).reshape(shape)


def _in_order(nodes: Sequence[Node]) -> list[Node]:
    """As ONNX Runtime runs them, wherever they stand in the file: from each node that no other needs, the last one
    first, depth first to what that needs.

    Raises:
        ValueError: nodes that need each other.
    """
    maker = {name: index for index, node in enumerate(nodes) for name in node.outputs if name}
    needs = [sorted({maker[name] for name in node.reads if name in maker}) for node in nodes]
    needed = {index for before in needs for index in before}
    found: list[Node] = []
    stack = [(index, False) for index in range(len(nodes)) if index not in needed]
    seen: set[int] = set()
    while stack:
        index, has_all = stack.pop()
        if has_all:
            found.append(nodes[index])
        elif index not in seen:
            seen.add(index)
            stack += [(index, True), *((before, False) for before in needs[index])]
    if len(found) < len(nodes):
        raise ValueError("its nodes need each other")
    return found


def _signed(value: int) -> int:
    """A 64-bit varint as the number that it stands for."""
    return value - (1 << 64) if value >= 1 << 63 else value
