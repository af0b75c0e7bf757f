"""The operators of com.microsoft that ONNX Runtime's optimisers and quantisers write, as `shapes` has those of ONNX.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mae_deploy.runtime.graph import shapes
from mae_deploy.runtime.graph.nodes import Node
from mae_deploy.runtime.graph.shapes import Given, Rule, Shape

MICROSOFT = "com.microsoft"
_BLOCKED = "com.microsoft.nchwc"
"""Convolutions whose channels are in blocks of as many as the machine's vectors hold."""

_AS_FIRST = (
    "BiasGelu DequantizeLinear FastGelu Gelu QLinearLeakyRelu QLinearSigmoid QLinearSoftmax QuantizeLinear QuickGelu"
    " RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization Trilu"
)


def _of(places: Callable[[Given], Given], rule: Rule) -> Rule:
    """A rule for the inputs that are not scales and zero points."""
    return lambda node, given: rule(node, places(given))


def _first_and(*places: int) -> Callable[[Given], Given]:
    return lambda given: [given[0], *(given[place] for place in places)]


def _channels_last(rule: Rule, *, always: bool = False) -> Rule:
    """Of images (B, H, W, C), where the node says so."""

    def compute(node: Node, given: Given) -> list[Shape]:
        if not always and not node.attributes.get("channels_last"):
            return rule(node, given)
        images = given[0].shape
        turned = [given[0]._replace(shape=(images[0], images[-1], *images[1:-1])), *given[1:]]
        made, *beside = rule(node, turned)
        return [(made[0], *made[2:], made[1]), *beside]

    return compute


def _weights_last(rule: Rule) -> Rule:
    """Of NhwcConv, whose weights (M, kH, kW, C) are in the order of its images."""

    def compute(node: Node, given: Given) -> list[Shape]:
        weight = given[1].shape
        return rule(node, [given[0], given[1]._replace(shape=(weight[0], weight[-1], *weight[1:-1])), *given[2:]])

    return compute


def fused_matmul(node: Node, given: Given) -> list[Shape]:
    sides = [tensor.shape for tensor in given[:2]]
    for index, name in enumerate("AB"):
        if node.attributes.get(f"transBatch{name}"):  # the first axis among the last two
            first, *batch, last = sides[index]
            sides[index] = (*batch, first, last)
        if node.attributes.get(f"trans{name}"):
            sides[index] = (*sides[index][:-2], *sides[index][:-3:-1])
    return [shapes.product(*sides)]


def packed_matmul(node: Node, given: Given) -> list[Shape]:
    """Weights of a few bits, `N` columns of `K` numbers, which may be unpacked."""
    rows, K, N = given[0].shape, node.attributes["K"], node.attributes["N"]
    if rows[-1:] != (K,):
        raise ValueError(f"{rows} by {K} rows")
    return [(*rows[:-1], N), (K, N)]


def attention(node: Node, given: Given) -> list[Shape]:
    """Of tokens (B, T, D) and one matrix for queries, keys and values."""
    (B, T, _), (_, width) = given[0].shape, given[1].shape
    parts = node.attributes.get("qkv_hidden_sizes") or [width // 3] * 3
    H, past = node.attributes["num_heads"], given[4 if node.operator == "Attention" else 8 :][:1]
    if past and past[0] is not shapes.LEFT_OUT:
        raise ValueError("keys and values of earlier tokens")
    kept = [(2, B, H, T, parts[0] // H)] * (len(node.outputs) - 1)
    return [(B, T, parts[2]), *kept, (B, T, width), (B, H, T, T)]


def multi_head_attention(node: Node, given: Given) -> list[Shape]:
    """Of queries (B, T, D), keys and values, in one tensor or in three."""
    found: list[Shape] = [tensor.shape for tensor in given[:3]]
    queries, keys, values = found + [()] * (3 - len(found))
    H = node.attributes["num_heads"]
    if any(tensor is not shapes.LEFT_OUT for tensor in given[6:]) or len(node.outputs) > 1:
        raise ValueError("keys and values of earlier tokens")
    B, T = queries[:2]
    D = queries[2] * queries[4] if len(queries) == 5 else queries[2]
    S = (keys[2] if len(keys) == 4 else keys[1]) if keys else T
    V = (values[1] * values[3] if len(values) == 4 else values[2]) if values else D
    return [(B, T, V), (B, H, T, S), (B, T, 3 * D)]


def reordered(node: Node, given: Given) -> list[Shape]:
    """Into blocks of channels and back."""
    images = given[0].shape
    if node.operator == "ReorderInput":
        images = (images[0], images[-1], *images[1:-1]) if node.attributes.get("channels_last") else images
        return [(images[0], -(-images[1] // 16) * 16, *images[2:])]
    found = (images[0], node.attributes["channels"], *images[2:])
    return [(found[0], *found[2:], found[1]) if node.attributes.get("channels_last") else found]


def _plain_conv(node: Node, given: Given) -> list[Shape]:
    return shapes.conv(replace(node, operator="Conv"), given)


FUSED: dict[tuple[str, str], Rule] = {
    **{(MICROSOFT, name): shapes.as_first for name in _AS_FIRST.split()},
    **{
        (MICROSOFT, name): rule
        for name, rule in {
            "Attention": attention,
            "DynamicQuantizeMatMul": shapes.matmul,
            "FusedConv": _plain_conv,
            "FusedGemm": shapes.gemm,
            "FusedMatMul": fused_matmul,
            "MatMulBnb4": packed_matmul,
            "MatMulIntegerToFloat": shapes.matmul,
            "MatMulNBits": packed_matmul,
            "MultiHeadAttention": multi_head_attention,
            "NhwcConv": _weights_last(_channels_last(_plain_conv, always=True)),
            "NhwcMaxPool": _channels_last(shapes.pool, always=True),
            "QAttention": attention,
            "QGemm": _of(_first_and(3), shapes.gemm),
            "QLinearAdd": _of(_first_and(3), shapes.elementwise),
            "QLinearAveragePool": _channels_last(shapes.pool),
            "QLinearConcat": _of(lambda given: given[2::3], shapes.concat),
            "QLinearConv": _channels_last(shapes.conv),
            "QLinearGlobalAveragePool": _channels_last(shapes.global_pool),
            "QLinearMul": _of(_first_and(3), shapes.elementwise),
            "QLinearWhere": _of(_first_and(1, 4), shapes.elementwise),
            "TransposeMatMul": fused_matmul,
        }.items()
    },
    **{
        (_BLOCKED, name): rule
        for name, rule in {
            "AveragePool": shapes.pool,
            "Conv": _plain_conv,
            "GlobalAveragePool": shapes.global_pool,
            "GlobalMaxPool": shapes.global_pool,
            "MaxPool": shapes.pool,
            "ReorderInput": reordered,
            "ReorderOutput": reordered,
        }.items()
    },
}
