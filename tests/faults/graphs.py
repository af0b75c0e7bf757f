"""Faults in a graph: what a wrong exporter, a wrong fusion or a wrong quantiser would have made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from mae_deploy.images.read import Array
from tests.faults.edit import Graph, attribute

Plant = Callable[[Graph], None]

_BLOCK = re.compile(r"(?:blocks|rotary_table)\.(\d+)")


@dataclass(frozen=True)
class GraphFault:
    """One thing that is wrong with a graph."""

    kind: str
    place: str
    """The node or the weight."""
    plant: Plant

    @property
    def block(self) -> int | None:
        """The block that it lies in; None before and after the blocks."""
        found = _BLOCK.search(self.place)
        return None if found is None else int(found[1])


def graph_faults(model: onnx.ModelProto) -> Iterator[GraphFault]:
    """Every fault that this graph can have; kinds whose node it lacks are not among them."""
    graph = Graph(model)
    for ending, kinds in _NODES.items():
        for node in graph.named(ending):
            for kind, edit in kinds.items():
                yield GraphFault(kind, node.name, _on_node(node.name, edit))
    for ending, edits in _WEIGHTS.items():
        for name in graph.weights:
            if name.endswith(ending) and graph.value(name).dtype.kind == "f":
                for kind, change in edits.items():
                    yield GraphFault(kind, name, _on_weight(name, change))
    yield from _quantisation(graph)
    yield from _heads(graph)


def _on_node(name: str, edit: Callable[[Graph, onnx.NodeProto], None]) -> Plant:
    return lambda graph: edit(graph, graph.nodes[name])


def _on_weight(name: str, edit: Callable[[Array], Any]) -> Plant:
    return lambda graph: graph.change(name, edit)


# --- nodes -----------------------------------------------------------------------------------------------------------


def _without_residual(graph: Graph, node: onnx.NodeProto) -> None:
    graph.bypass(node, node.input[1])


def _without_branch(graph: Graph, node: onnx.NodeProto) -> None:
    graph.bypass(node, node.input[0])


def _swapped_inputs(graph: Graph, node: onnx.NodeProto) -> None:
    """Keys for values: the other of the two indices."""
    other = f"{node.name[:-1]}{'v' if node.name.endswith('k') else 'k'}"
    node.input[1], graph.nodes[other].input[1] = graph.nodes[other].input[1], node.input[1]


def _tanh_gelu(graph: Graph, node: onnx.NodeProto) -> None:
    """erf(s) becomes tanh(sqrt(2/pi) (x + 0.044715 x³)) with x = s sqrt(2)."""
    s, dtype = node.input[0], _dtype(graph, node)
    cube, scaled, total = (f"{node.name}/{part}" for part in ("square", "scaled", "total"))
    place = next(i for i, other in enumerate(graph.model.graph.node) if other.name == node.name)
    made = [
        onnx.helper.make_node("Mul", [s, s], [cube], name=cube),
        onnx.helper.make_node(
            "Mul", [cube, graph.constant(np.array(2 * 0.044715, dtype))], [f"{cube}/1"], name=f"{cube}/1"
        ),
        onnx.helper.make_node(
            "Add", [f"{cube}/1", graph.constant(np.array(1, dtype))], [f"{cube}/2"], name=f"{cube}/2"
        ),
        onnx.helper.make_node("Mul", [s, f"{cube}/2"], [scaled], name=scaled),
        onnx.helper.make_node(
            "Mul", [scaled, graph.constant(np.array(2 / math.sqrt(math.pi), dtype))], [total], name=total
        ),
    ]
    for index, other in enumerate(made):
        graph.model.graph.node.insert(place + index, other)
    node.op_type, node.input[0] = "Tanh", total


def _epsilon(value: float) -> Callable[[Graph, onnx.NodeProto], None]:
    return lambda graph, node: attribute(node, "epsilon", value)


def _other_axis(graph: Graph, node: onnx.NodeProto) -> None:
    attribute(node, "axis", -2)


def _times(factor: float) -> Callable[[Graph, onnx.NodeProto], None]:
    return lambda graph, node: graph.after(
        node, ("Mul", [None, graph.constant(np.array(factor, _dtype(graph, node)))], {})
    )


def _rounded_to(kind: int) -> Callable[[Graph, onnx.NodeProto], None]:
    return lambda graph, node: graph.after(
        node, ("Cast", [None], {"to": kind}), ("Cast", [None], {"to": _type(graph, node)})
    )


def _overflow(graph: Graph, node: onnx.NodeProto) -> None:
    """An outlier that FP16 has no number for."""
    large = graph.constant(np.array(4e4, np.float32))
    graph.after(
        node,
        ("Cast", [None], {"to": onnx.TensorProto.FLOAT}),
        ("Mul", [None, large], {}),
        ("Cast", [None], {"to": onnx.TensorProto.FLOAT16}),
        ("Cast", [None], {"to": onnx.TensorProto.FLOAT}),
        ("Div", [None, large], {}),
        ("Cast", [None], {"to": _type(graph, node)}),
    )


def _not_turned(graph: Graph, node: onnx.NodeProto) -> None:
    graph.bypass(node, node.output[0].removesuffix("_turned"))


def _other_half(graph: Graph, node: onnx.NodeProto) -> None:
    """The halves in their order, as if pairs were turned without being swapped."""
    first, second = node.input
    node.input[0], node.input[1] = second, first


def _shifted(graph: Graph, node: onnx.NodeProto) -> None:
    """`ids_keep` counted from one."""
    graph.bypass(graph.nodes["ids/shift"], node.input[0])


def _reversed_patch(graph: Graph, node: onnx.NodeProto) -> None:
    """Rows and columns inside a patch exchanged."""
    perm = next(list(entry.ints) for entry in node.attribute if entry.name == "perm")
    perm[-3], perm[-2] = perm[-2], perm[-3]
    attribute(node, "perm", perm)


def _dtype(graph: Graph, node: onnx.NodeProto) -> Any:
    return np.float16 if _type(graph, node) == onnx.TensorProto.FLOAT16 else np.float32


def _type(graph: Graph, node: onnx.NodeProto) -> int:
    """Of a node's first output, by shape inference."""
    inferred = onnx.shape_inference.infer_shapes(graph.model)
    for value in [*inferred.graph.value_info, *inferred.graph.output]:
        if value.name == node.output[0]:
            return int(value.type.tensor_type.elem_type)
    return int(onnx.TensorProto.FLOAT)


_ROUND = {
    "a product rounded to BF16": _rounded_to(onnx.TensorProto.BFLOAT16),
    "a product rounded to FP16": _rounded_to(onnx.TensorProto.FLOAT16),
}
_NORM = {
    "norm missing": lambda graph, node: graph.bypass(node, node.input[0]),
    "epsilon 1e-3": _epsilon(1e-3),
    "epsilon 1e-5": _epsilon(1e-5),
}
_NODES: dict[str, dict[str, Callable[[Graph, onnx.NodeProto], None]]] = {
    "/attn_residual": {"residual missing": _without_residual, "branch missing": _without_branch},
    "/mlp_residual": {"residual missing": _without_residual, "branch missing": _without_branch},
    "norm1/LayerNormalization": _NORM,
    "norm2/LayerNormalization": _NORM,
    "gelu/erf": {"tanh GELU for erf": _tanh_gelu},
    "gelu/half": {"a factor of 2 lost": _times(2.0), "a factor of 1.01": _times(1.01)},
    "attn/qk": {"attention's scale applied twice": _times(0.25), "attention's scale missing": _times(4.0), **_ROUND},
    "attn/softmax": {"softmax over the wrong axis": _other_axis},
    "attn/k": {"keys and values exchanged": _swapped_inputs},
    "attn/padding": {"padding's mask lost": lambda graph, node: graph.bypass(node, node.input[0])},
    "attn/av": {"FP16 overflow of an outlier": _overflow},
    "attn/heads_last": {"heads not merged back": lambda graph, node: attribute(node, "perm", [0, 1, 2, 3])},
    "attn/q_turned": {"queries not turned": _not_turned},
    "attn/k_turned": {"keys not turned": _not_turned},
    "q_turned/moved": {"queries turned the other way": _times(-1.0)},
    "k_turned/swapped": {"pairs of rotary channels exchanged": _other_half},
    "fc2/Gemm": _ROUND,
    "fc2/MatMul": _ROUND,
    "patchify/transpose": {"rows and columns of a patch exchanged": _reversed_patch},
    "ids/shift": {"ids_keep off by one": _shifted},
    "outputs/mean": {"the mean over one patch too many": _times(63 / 64)},
}


# --- weights ---------------------------------------------------------------------------------------------------------


def _noise(share: float) -> Callable[[Array], Any]:
    """Weights of another checkpoint, near these."""
    return lambda w: w + share * w.std() * np.random.default_rng(0).standard_normal(w.shape)


def _one(edit: Callable[[Any], Any]) -> Callable[[Array], Any]:
    """The largest value alone."""

    def apply(w: Array) -> Array:
        index = np.unravel_index(np.abs(w).argmax(), w.shape)
        w[index] = edit(w[index])
        return w

    return apply


def _half_of_last(w: Array) -> Array:
    w[..., w.shape[-1] // 2] = 0
    return w


def _column(factor: float) -> Callable[[Array], Any]:
    def apply(w: Array) -> Array:
        w[..., -1] *= factor
        return w

    return apply


def _transposed_grid(w: Array) -> Array:
    """The places of a square grid, which stand behind the tokens that have none."""
    side = math.isqrt(len(w))
    prefix, places = w[: len(w) - side**2], w[len(w) - side**2 :]
    return np.concatenate([prefix, places.reshape(side, side, -1).swapaxes(0, 1).reshape(places.shape)])


def _bgr(w: Array) -> Array:
    """Rows of the patch embedding for BGR: a patch is `(P, P, C)`."""
    return w.reshape(-1, 3, w.shape[-1])[:, ::-1].reshape(w.shape) if w.shape[0] % 3 == 0 else w[::-1]


def _bits(bits: int) -> Callable[[Array], Any]:
    """Rounded to so many bits after the leading one: 7 BF16, 10 TF32."""

    def apply(w: Array) -> Any:
        mantissa, exponent = np.frexp(w.astype(np.float64))
        return np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)

    return apply


def _row(first: int, second: int) -> Callable[[Array], Any]:
    def apply(w: Array) -> Array:
        w[[first, second]] = w[[second, first]]
        return w

    return apply


def _sines(factor: float) -> Callable[[Array], Any]:
    """The second half of a rotary table."""

    def apply(w: Array) -> Array:
        w[..., w.shape[-1] // 2 :] *= factor
        return w

    return apply


def _angles(factor: float) -> Callable[[Array], Any]:
    def apply(w: Array) -> Array:
        cos, sin = np.split(w, 2, axis=-1)
        turned = factor * np.arctan2(sin, cos)
        return np.concatenate([np.cos(turned), np.sin(turned)], axis=-1)

    return apply


_LINEAR: dict[str, Callable[[Array], Any]] = {
    "stale weights, 2 % away": _noise(0.02),
    "a column of weights zero": _half_of_last,
    "one weight's sign flipped": _one(lambda value: -value),
    "one weight's exponent flipped": _one(lambda value: 16 * value),
    "weights rounded to BF16": _bits(7),
    "weights rounded to TF32": _bits(10),
    "channels of the weights in another order": lambda w: np.roll(w, 1, axis=-1),
    "the last row of weights zero": lambda w: np.concatenate([w[:-1], 0 * w[-1:]]),
    "a column of weights 5 % too large": _column(1.05),
}
_BIAS: dict[str, Callable[[Array], Any]] = {
    "bias missing": lambda b: 0 * b,
    "bias in another order": lambda b: np.roll(b, 1),
}
_WEIGHTS: dict[str, dict[str, Callable[[Array], Any]]] = {
    "attn.qkv.weight": {**_LINEAR, "values, queries and keys": lambda w: np.roll(w, w.shape[-1] // 3, axis=-1)},
    "attn.proj.weight": {**_LINEAR, "weights transposed": lambda w: w.T, "LayerScale missing": lambda w: 10 * w},
    "mlp.fc1.weight": _LINEAR,
    "mlp.fc2.weight": _LINEAR,
    "attn.qkv.bias": _BIAS,
    "attn.proj.bias": _BIAS,
    "mlp.fc1.bias": _BIAS,
    "mlp.fc2.bias": _BIAS,
    "norm1.weight": {"norm's scale missing": lambda w: w * 0 + 1},
    "norm2.bias": _BIAS,
    "norm.weight": {"norm's scale missing": lambda w: w * 0 + 1},
    "norm.bias": _BIAS,
    "head.weight": {
        "classes in another order": lambda w: np.roll(w, 1, axis=-1),
        "two classes exchanged": lambda w: w[:, [1, 0, *range(2, w.shape[-1])]],
        "one class 3 % too large": _column(1.03),
        "one feature's weights 5 % too large": lambda w: np.concatenate([1.05 * w[:1], w[1:]]),
    },
    "head.bias": _BIAS,
    "patch_embed.proj.weight": {"order of the channels": _bgr},
    "position_table": {
        "positions off by one": lambda w: np.concatenate([w[:1], np.roll(w[1:], 1, axis=0)]),
        "two positions exchanged": _row(3, 4),
        "positions of another grid": lambda w: np.concatenate([w[:1], w[1:][::-1]]),
        "the CLS token's row zero": lambda w: np.concatenate([0 * w[:1], w[1:]]),
        "positions stale, 2 % away": _noise(0.02),
        "rows and columns of positions exchanged": _transposed_grid,
        "the last position stale": lambda w: np.concatenate([w[:-1], w[-2:-1]]),
    },
    "rotary_table": {
        "rotary angles of the place beside": lambda w: np.concatenate([w[:1], np.roll(w[1:], 1, axis=0)]),
        "two places' rotary angles exchanged": _row(3, 4),
        "rows and columns of rotary angles exchanged": _transposed_grid,
        "rotary angles one step late": lambda w: np.concatenate([w[:1], w[:-1]]),
        "sines of rotary angles missing": _sines(0.0),
        "rotary angles a tenth too small": _angles(0.9),
    },
    **{
        f"rotary_table.{block}": {
            "rotary angles of one block stale": lambda w: np.roll(w, 1, axis=-2),
            "a head's rotary angles of another head": lambda w: np.roll(w, 1, axis=0),
        }
        for block in range(3)
    },
}


def _heads(graph: Graph) -> Iterator[GraphFault]:
    """Queries of two heads exchanged, where the weights are `(D, 3 D)`."""
    for node in graph.named("attn/heads"):
        heads, dim = (int(size) for size in graph.value(node.input[1])[-2:])
        name = node.name.replace("/heads", ".qkv.weight")
        if heads < 2 or name not in graph.weights or graph.value(name).dtype.kind != "f":
            continue

        def swap(w: Array, dim: int = dim) -> Array:
            w[:, : 2 * dim] = np.roll(w[:, : 2 * dim], dim, axis=1)
            return w

        yield GraphFault("queries of two heads exchanged", name, _on_weight(name, swap))


# --- quantisation ----------------------------------------------------------------------------------------------------


def _quantisation(graph: Graph) -> Iterator[GraphFault]:
    """Scales and zero points of Q and DQ nodes, and of the products that ONNX Runtime quantises as they come."""
    seen = set()
    for node in graph.model.graph.node:
        for name in node.input:
            if name not in graph.weights or name in seen:
                continue
            value = graph.value(name)
            if "scale" in name.rsplit("/", 1)[-1] and value.dtype.kind == "f":
                seen.add(name)
                yield GraphFault("a scale twice too large", name, _on_weight(name, lambda s: 2 * s))
                yield GraphFault("a scale 1.05 times too large", name, _on_weight(name, lambda s: 1.05 * s))
                if value.size > 1:
                    yield GraphFault("scales of the wrong channel", name, _on_weight(name, lambda s: np.roll(s, 1)))
            elif "zero" in name.rsplit("/", 1)[-1] and value.dtype.kind in "iu":
                seen.add(name)
                yield GraphFault("a zero point off by 8", name, _on_weight(name, lambda z: z + 8))
            elif value.dtype.itemsize == 1 and value.ndim == 2:
                seen.add(name)
                yield GraphFault("a column of weights zero", name, _on_weight(name, _half_of_last))
                yield GraphFault(
                    "channels of the weights in another order", name, _on_weight(name, lambda w: np.roll(w, 1, axis=-1))
                )
