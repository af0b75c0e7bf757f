"""An ONNX graph under the knife: its nodes by name, its weights as arrays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mae_deploy.images.read import Array


class Graph:
    """A copy of a model whose parts can be changed in place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = copy.deepcopy(model)
        self.nodes: dict[str, onnx.NodeProto] = {node.name: node for node in self.model.graph.node}
        self.weights = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def named(self, ending: str) -> Iterator[onnx.NodeProto]:
        """The nodes whose name ends so, in the graph's order."""
        return (node for node in self.model.graph.node if node.name.endswith(ending))

    def value(self, name: str) -> Array:
        """A constant."""
        return numpy_helper.to_array(self.weights[name])

    def change(self, name: str, edit: Callable[[Array], Any]) -> None:
        """Put another value of the same type in place of a constant."""
        old = self.value(name)
        new = np.ascontiguousarray(np.asarray(edit(old.copy())).astype(old.dtype))
        self.weights[name].CopyFrom(numpy_helper.from_array(new, name))

    def constant(self, array: Array) -> str:
        """The name of a new constant."""
        name = f"planted/{len(self.weights)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        self.weights[name] = self.model.graph.initializer[-1]
        return name

    def bypass(self, node: onnx.NodeProto, value: str) -> None:
        """Let a node hand on `value` in place of what it computed."""
        made = helper.make_node("Identity", [value], [node.output[0]], name=node.name)
        node.CopyFrom(made)

    def after(self, node: onnx.NodeProto, *steps: tuple[str, list[str | None], dict[str, Any]]) -> None:
        """Put nodes behind one: each an operator, its inputs (None: what the one before gave) and attributes; who read
        the node now reads the last.
        """
        place = next(i for i, other in enumerate(self.model.graph.node) if other.name == node.name)
        output, value = node.output[0], f"{node.output[0]}/planted"
        node.output[0] = value
        for index, (operator, inputs, attributes) in enumerate(steps):
            name = f"{output}/planted/{index}"
            result = output if index == len(steps) - 1 else name
            given = [value if given is None else given for given in inputs]
            self.model.graph.node.insert(
                place + 1 + index, helper.make_node(operator, given, [result], name=name, **attributes)
            )
            value = result


def attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set an attribute of a node."""
    for index, entry in enumerate(node.attribute):
        if entry.name == name:
            del node.attribute[index]
            break
    node.attribute.append(helper.make_attribute(name, value))
