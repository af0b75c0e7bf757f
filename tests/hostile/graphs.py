"""ONNX graphs that never end, or need more memory than any machine has, each a whole one with a few nodes more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.ModelProto], object]
"""Makes a graph hostile."""

_LARGE = 10**12


def _before_the_end(*nodes: onnx.NodeProto, **constants: Any) -> Edit:
    """Nodes that make `hostile`, which is added to the first output after its sum is taken."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        output = graph.output[0].name
        for node in graph.node:
            for index, name in enumerate(node.output):
                if name == output:
                    node.output[index] = "before"
        graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
        graph.node.extend(nodes)
        graph.node.append(helper.make_node("ReduceSum", ["hostile"], ["summed"], keepdims=0))
        graph.node.append(helper.make_node("Add", ["before", "summed"], [output]))

    return edit


def _one(operator: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, ["hostile"], **attributes)


def _int64(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


_ZERO = np.zeros(1, np.float32)
_IMAGE = np.zeros((1, 1, 4, 4), np.float32)


def _body(*nodes: onnx.NodeProto, inputs: Sequence[Any] = (), outputs: Sequence[str] = ("value_",)) -> onnx.GraphProto:
    known = {"turn": TensorProto.INT64, "on": TensorProto.BOOL, "on_": TensorProto.BOOL}
    entries = [
        [helper.make_tensor_value_info(name, known.get(name, TensorProto.FLOAT), [] if name in known else None)]
        for name in (*inputs, *outputs)
    ]
    flat = [entry for (entry,) in entries]
    return helper.make_graph(list(nodes), "body", flat[: len(inputs)], flat[len(inputs) :])


def _turns(number: int) -> Edit:
    body = _body(
        helper.make_node("Identity", ["on"], ["on_"]),
        helper.make_node("Identity", ["value"], ["value_"]),
        inputs=("turn", "on", "value"),
        outputs=("on_", "value_"),
    )
    loop = _one("Loop", "times" if number else "", "true", "zero", body=body)
    return _before_the_end(loop, times=np.int64(number), true=np.array(True), zero=_ZERO)


def _scan() -> Edit:
    body = _body(helper.make_node("Identity", ["value"], ["value_"]), inputs=("value",))
    filled = helper.make_node("ConstantOfShape", ["rows"], ["long"])
    return _before_the_end(filled, _one("Scan", "long", body=body, num_scan_inputs=1), rows=_int64(10**8, 1))


def _branch_with(node: onnx.NodeProto) -> onnx.NodeProto:
    branch = _body(node, outputs=tuple(node.output))
    return _one("If", "true", then_branch=branch, else_branch=branch)


def _deep(levels: int) -> Edit:
    node = helper.make_node("Identity", ["zero"], ["value_0"])
    for level in range(levels):
        short = _body(helper.make_node("Identity", ["zero"], [f"short_{level}"]), outputs=(f"short_{level}",))
        branch = _body(node, outputs=tuple(node.output))
        node = helper.make_node("If", ["true"], [f"value_{level + 1}"], then_branch=branch, else_branch=short)
    last = helper.make_node("Identity", list(node.output), ["hostile"])
    return _before_the_end(node, last, true=np.array(True), zero=_ZERO)


def _doubled(times: int) -> Edit:
    names = ["zero", *(f"doubled_{index}" for index in range(times - 1)), "hostile"]
    pairs = itertools.pairwise(names)
    return _before_the_end(*(helper.make_node("Concat", [a, a], [b], axis=0) for a, b in pairs), zero=_ZERO)


def _products(times: int, size: int) -> Edit:
    names = ["square", *(f"product_{index}" for index in range(times - 1)), "hostile"]
    pairs = itertools.pairwise(names)
    return _before_the_end(
        helper.make_node("ConstantOfShape", ["sides"], ["square"]),
        *(helper.make_node("MatMul", [a, "square"], [b]) for a, b in pairs),
        sides=_int64(size, size),
    )


def _kept(times: int) -> Edit:
    """Arrays of a GB, all of which the last node needs."""
    names = [f"kept_{index}" for index in range(times)]
    return _before_the_end(
        *(helper.make_node("ConstantOfShape", ["sides"], [name]) for name in names),
        _one("Max", *names),
        sides=_int64(1 << 27),
    )


def _folded(times: int) -> Edit:
    """A chain of arrays of 64 MB that follow from constants: one at a time, were they not all kept when loading."""
    names = ["first", *(f"folded_{index}" for index in range(times - 1)), "hostile"]
    return _before_the_end(
        helper.make_node("Tile", ["zero", "times"], ["first"]),
        *(helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)),
        zero=_ZERO,
        times=_int64(1 << 24),
    )


def _out_of_order(in_branch: bool) -> Edit:
    """Arrays of 32 MB, each followed by what sums it up, so that in the file's order one is there at a time; but
    engines go from the results, and the last of these needs all, or a branch does.
    """

    def edit(model: onnx.ModelProto) -> None:
        first, second, nodes = [], [], []
        pixel = [helper.make_node("ReduceMax", [model.graph.input[0].name], ["pixel"], keepdims=1)]
        for index in range(100):
            big, sums = f"big_{index}", (f"sum_{index}", f"largest_{index}")
            nodes.append(helper.make_node("Expand", ["pixel", "sides"], [big]))
            nodes.append(helper.make_node("ReduceSum", [big], [sums[0]], keepdims=0))
            if not in_branch:
                nodes.append(helper.make_node("ReduceMax", [big], [sums[1]], keepdims=0))
            first.append(sums[0])
            second.append(big if in_branch else sums[1])
        chosen = helper.make_node("Max", second, ["value_"])
        if in_branch:
            branch = _body(chosen)
            chosen = helper.make_node("If", ["true"], ["chosen"], then_branch=branch, else_branch=branch)
        else:
            chosen.output[0] = "chosen"
        model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None))
        _before_the_end(
            *pixel, *nodes, chosen, _one("Sum", *first), sides=_int64(1, 1, 1 << 12, 1 << 11), true=np.array(True)
        )(model)

    return edit


def _idle_branch(*nodes: onnx.NodeProto) -> Edit:
    """In a branch that is not taken, and that engines optimise when they load."""
    plain = _body(helper.make_node("Identity", ["zero"], ["value_"]))
    return _before_the_end(
        _one("If", "true", then_branch=plain, else_branch=_body(*nodes)),
        true=np.array(True),
        zero=_ZERO,
        sides=_int64(_LARGE),
        none=np.int64(0),
    )


def _shape_arithmetic(model: onnx.ModelProto) -> None:
    """The image's sizes, multiplied with themselves again and again."""
    images = model.graph.input[0].name
    names = ["sizes", *(f"sizes_{index}" for index in range(4)), "sides"]
    _before_the_end(
        helper.make_node("Shape", [images], ["sizes"]),
        *(helper.make_node("Mul", [a, a], [b]) for a, b in itertools.pairwise(names)),
        _one("ConstantOfShape", "sides"),
    )(model)


def _microsoft(operator: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return _one(operator, *inputs, domain="com.microsoft", **attributes)


def _by_the_batch(model: onnx.ModelProto) -> None:
    """An array of as many numbers as the batch to the power of ten."""
    images = model.graph.input[0].name
    rows = [helper.make_node("Shape", [images], ["rows"], start=0, end=1)]
    _before_the_end(
        *rows, helper.make_node("Concat", ["rows"] * 10, ["sides"], axis=0), _one("ConstantOfShape", "sides")
    )(model)


def _by_the_pixels(model: onnx.ModelProto) -> None:
    """An array of a size that the image says."""
    images = model.graph.input[0].name
    _before_the_end(
        helper.make_node("ReduceMax", [images], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest", "many"], ["size"]),
        helper.make_node("Cast", ["size"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "one"], ["sides"]),
        _one("ConstantOfShape", "sides"),
        many=np.float32(1e12),
        one=_int64(1),
    )(model)


def _many_nodes(number: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node.extend(
            helper.make_node("Identity", [model.graph.input[0].name], [f"copy_{index}"]) for index in range(number)
        )

    return edit


def _function(model: onnx.ModelProto) -> None:
    """A function that calls itself."""
    imports = [*model.opset_import, helper.make_opsetid("hostile", 1)]
    node = helper.make_node("Again", ["x"], ["y"], domain="hostile")
    model.functions.append(helper.make_function("hostile", "Again", ["x"], ["y"], [node], imports))
    model.opset_import.append(imports[-1])
    _before_the_end(helper.make_node("Again", ["zero"], ["hostile"], domain="hostile"), zero=_ZERO)(model)


def _hidden(model: onnx.ModelProto) -> None:
    """A function under the name of an operator of ONNX."""
    node = helper.make_node("Tile", ["x", "y"], ["z"])
    model.functions.append(helper.make_function("", "Add", ["x", "y"], ["z"], [node], model.opset_import))


def _sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(_ZERO, "zero"))
    sparse.indices.CopyFrom(numpy_helper.from_array(_int64(5), "places"))
    sparse.dims.append(_LARGE)
    _before_the_end(_one("Identity", "zero"))(model)


def _texts(model: onnx.ModelProto) -> None:
    _before_the_end(
        helper.make_node("Constant", [], ["texts"], value_strings=["x" * 1000] * 10_000),
        _one("StringNormalizer", "texts"),
    )(model)


def _foreign(domain: str, operator: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid(domain, 1))
        node = _one(operator, "zero")
        node.domain = domain
        _before_the_end(node, zero=_ZERO)(model)

    return edit


GRAPHS: dict[str, Edit] = {
    "a loop without an end": _turns(0),
    "a loop of 10^9 turns": _turns(10**9),
    "a scan of 10^8 rows": _scan(),
    "a branch with 10^12 numbers": _before_the_end(
        _branch_with(helper.make_node("ConstantOfShape", ["sides"], ["value_"])),
        true=np.array(True),
        sides=_int64(_LARGE),
    ),
    "branches in branches": _deep(30),
    "Expand to TB": _before_the_end(_one("Expand", "zero", "sides"), zero=_ZERO, sides=_int64(_LARGE)),
    "Expand to 10^19": _before_the_end(_one("Expand", "zero", "sides"), zero=_ZERO, sides=_int64(1 << 62, 1 << 62)),
    "Tile to TB": _before_the_end(_one("Tile", "zero", "times"), zero=_ZERO, times=_int64(_LARGE)),
    "ConstantOfShape of TB": _before_the_end(_one("ConstantOfShape", "sides"), sides=_int64(10**6, 10**6)),
    "Resize to TB": _before_the_end(
        _one("Resize", "image", "", "scales"), image=_IMAGE, scales=np.array([1, 1, 1e6, 1e6], np.float32)
    ),
    "Resize by infinity": _before_the_end(
        _one("Resize", "image", "", "scales"), image=_IMAGE, scales=np.array([1, 1, np.inf, 1], np.float32)
    ),
    "Resize to sizes of TB": _before_the_end(
        _one("Resize", "image", "", "", "sizes"), image=_IMAGE, sizes=_int64(1, 1, 10**6, 10**6)
    ),
    "Range to 10^12": _before_the_end(
        _one("Range", "start", "end", "step"), start=np.float32(0), end=np.float32(1e12), step=np.float32(1)
    ),
    "Range of steps of nothing": _before_the_end(
        _one("Range", "start", "end", "step"), start=np.float32(0), end=np.float32(1), step=np.float32(0)
    ),
    "Range of tiny steps": _before_the_end(
        _one("Range", "start", "end", "step"), start=np.float32(0), end=np.float32(1), step=np.float32(1e-38)
    ),
    "Pad to TB": _before_the_end(_one("Pad", "zero", "pads"), zero=_ZERO, pads=_int64(0, _LARGE)),
    "OneHot of 10^12": _before_the_end(
        _one("OneHot", "place", "depth", "values"),
        place=_int64(0),
        depth=_int64(_LARGE),
        values=np.zeros(2, np.float32),
    ),
    "ConvTranspose of huge steps": _before_the_end(
        _one("ConvTranspose", "image", "image", strides=[10**6, 10**6]), image=_IMAGE
    ),
    "Conv of huge padding": _before_the_end(_one("Conv", "image", "image", pads=[10**6] * 4), image=_IMAGE),
    "an outer product": _before_the_end(
        helper.make_node("ConstantOfShape", ["column_sides"], ["column"]),
        helper.make_node("ConstantOfShape", ["row_sides"], ["row"]),
        _one("MatMul", "column", "row"),
        column_sides=_int64(10**6, 1),
        row_sides=_int64(1, 10**6),
    ),
    "an outer sum": _before_the_end(
        helper.make_node("ConstantOfShape", ["column_sides"], ["column"]),
        helper.make_node("ConstantOfShape", ["row_sides"], ["row"]),
        _one("Add", "column", "row"),
        column_sides=_int64(10**6, 1),
        row_sides=_int64(1, 10**6),
    ),
    "an Einsum of nine letters": _before_the_end(
        _one("Einsum", *["zeros"] * 9, equation="a,b,c,d,e,f,g,h,i->abcdefghi"), zeros=np.zeros(64, np.float32)
    ),
    "Concat that doubles 40 times": _doubled(40),
    "Gather of 10^12": _before_the_end(
        helper.make_node("ConstantOfShape", ["sides"], ["places"], value=numpy_helper.from_array(_int64(0))),
        helper.make_node("Gather", ["zero", "places"], ["many"]),
        _one("Gather", "many", "places"),
        zero=_ZERO,
        sides=_int64(10**8),
    ),
    "1,000 arrays of 512 MB": _kept(1000),
    "products for hours": _products(3000, 4096),
    "1,000 constants of 64 MB": _folded(1000),
    "arrays that wait for the last result": _out_of_order(in_branch=False),
    "arrays that wait for a branch": _out_of_order(in_branch=True),
    "TB in a branch that is not taken": _idle_branch(helper.make_node("Tile", ["zero", "sides"], ["value_"])),
    "a loop in a branch that is not taken": _idle_branch(
        helper.make_node(
            "Loop",
            ["", "true", "zero"],
            ["value_"],
            body=_body(
                helper.make_node("Identity", ["on"], ["on_"]),
                helper.make_node("Identity", ["value"], ["turned"]),
                inputs=("turn", "on", "value"),
                outputs=("on_", "turned"),
            ),
        )
    ),
    "nodes that need each other": _before_the_end(
        helper.make_node("Add", ["zero", "b"], ["a"]), helper.make_node("Neg", ["a"], ["b"]), zero=_ZERO
    ),
    "sizes by arithmetic of shapes": _shape_arithmetic,
    "GatherND of 10^12": _before_the_end(
        helper.make_node("ConstantOfShape", ["sides"], ["places"], value=numpy_helper.from_array(_int64(0))),
        helper.make_node("ConstantOfShape", ["row"], ["rows"]),
        _one("GatherND", "rows", "places"),
        sides=_int64(10**5, 1),
        row=_int64(1, 10**7),
    ),
    "Upsample to TB": _before_the_end(
        _one("Upsample", "image", "scales"), image=_IMAGE, scales=np.array([1, 1, 1e6, 1e6], np.float32)
    ),
    "windows that are written out": _before_the_end(
        helper.make_node("ConstantOfShape", ["sides"], ["square"]),
        _one("ConvTranspose", "square", "square"),
        sides=_int64(1, 1, 300, 300),
    ),
    "windows of integers": _before_the_end(
        helper.make_node(
            "ConstantOfShape", ["sides"], ["square"], value=numpy_helper.from_array(np.zeros(1, np.uint8))
        ),
        _one("ConvInteger", "square", "square", pads=[128] * 4),
        sides=_int64(1, 1, 256, 256),
    ),
    "means of large windows": _before_the_end(
        helper.make_node("ConstantOfShape", ["sides"], ["square"]),
        _one("AveragePool", "square", kernel_shape=[511, 511], pads=[255] * 4),
        sides=_int64(1, 1, 1024, 1024),
    ),
    "an integer that overflows": _before_the_end(
        helper.make_node("Div", ["smallest", "minus_1"], ["whole"]),
        _one("Cast", "whole", to=TensorProto.FLOAT),
        smallest=_int64(-(1 << 63)),
        minus_1=_int64(-1),
    ),
    "an outer product of columns": _before_the_end(
        helper.make_node("ConstantOfShape", ["sides"], ["row"]),
        _microsoft("FusedMatMul", "row", "row", transA=1),
        sides=_int64(1, 10**6),
    ),
    "a product of 10^12 columns of bits": _before_the_end(
        _microsoft("MatMulNBits", "zeros", "zeros", "zeros", K=64, N=_LARGE), zeros=np.zeros(64, np.float32)
    ),
    "size of the batch to the tenth": _by_the_batch,
    "size of the pixels": _by_the_pixels,
    "200,000 nodes": _many_nodes(200_000),
    "a function that calls itself": _function,
    "a function in place of Add": _hidden,
    "sparse weights of 10^12": _sparse,
    "texts": _texts,
    "an operator of ATen": _foreign("org.pytorch.aten", "ATen"),
    "an operator of PyTorch's Python": _foreign("com.microsoft", "PythonOp"),
    "a kernel that is compiled": _foreign("com.microsoft", "Triton"),
    "an operator of extensions": _foreign("ai.onnx.contrib", "BertTokenizer"),
    "a graph within a graph": lambda model: model.graph.node.append(
        helper.make_node("SequenceMap", ["zero"], ["mapped"], body=_body(inputs=("value",), outputs=("value",)))
    ),
}
