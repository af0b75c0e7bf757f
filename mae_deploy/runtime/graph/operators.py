"""The operators that networks of our kind are made of: the sizes of what each makes, and of sizes their values.

No operator that repeats others is among them (Loop, Scan, SequenceMap), none that runs code of others, and none whose
result is as large as its data say (NonZero, Compress). `If` is: both of its branches are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mae_deploy.runtime.graph import shapes
from mae_deploy.runtime.graph.nodes import KNOWN_VALUES, Node, Tensor
from mae_deploy.runtime.graph.shapes import Given, Shape
from mae_deploy.runtime.graph.values import VALUES

Rule = Callable[[Node, Given], "list[Shape]"]
"""The shapes of an operator's results; behind them, those of what it needs beside them while it runs."""

MICROSOFT = "com.microsoft"

_MOST_AXES = 32
"""As many as NumPy's arrays have."""


_ELEMENTWISE = (
    "Abs Add And Atan Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish"
    " Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal"
    " Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh Where Xor"
)
_AS_FIRST = (
    "BatchNormalization Cast CastLike CumSum DequantizeLinear Dropout GroupNormalization Hardmax InstanceNormalization"
    " LayerNormalization LogSoftmax LpNormalization QuantizeLinear RMSNormalization RandomNormalLike RandomUniformLike"
    " RotaryEmbedding ScatterElements ScatterND SimplifiedLayerNormalization Softmax Trilu"
)
_OF_MICROSOFT = (
    "BiasGelu BiasSplitGelu DequantizeLinear FastGelu Gelu QuantizeLinear QuickGelu SkipLayerNormalization"
    " SkipSimplifiedLayerNormalization"
)
_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

_RULES: dict[tuple[str, str], Rule] = {
    **{("", name): shapes.elementwise for name in _ELEMENTWISE.split()},
    **{("", name): shapes.as_first for name in _AS_FIRST.split()},
    **{("", f"Reduce{name}"): shapes.reduced for name in _REDUCE.split()},
    **{
        ("", name): rule
        for name, rule in {
            "ArgMax": shapes.reduced,
            "ArgMin": shapes.reduced,
            "Attention": shapes.attention,
            "AveragePool": shapes.pool,
            "Concat": shapes.concat,
            "Constant": shapes.constant,
            "ConstantOfShape": shapes.filled,
            "Conv": shapes.conv,
            "ConvInteger": shapes.conv,
            "ConvTranspose": shapes.conv_transpose,
            "DepthToSpace": shapes.depth_to_space,
            "DynamicQuantizeLinear": shapes.quantized,
            "Einsum": shapes.einsum,
            "Expand": shapes.expand,
            "Flatten": shapes.flatten,
            "Gather": shapes.gather,
            "GatherElements": shapes.gather_elements,
            "GatherND": shapes.gather_nd,
            "Gemm": shapes.gemm,
            "GlobalAveragePool": shapes.global_pool,
            "GlobalMaxPool": shapes.global_pool,
            "MatMul": shapes.matmul,
            "MatMulInteger": shapes.matmul,
            "MaxPool": shapes.pool,
            "OneHot": shapes.one_hot,
            "Pad": shapes.pad,
            "QLinearConv": shapes.conv,
            "QLinearMatMul": shapes.matmul,
            "Range": shapes.range_,
            "Reshape": shapes.reshape,
            "Resize": shapes.resize,
            "Shape": shapes.shape,
            "Size": shapes.scalar,
            "Slice": shapes.slice_,
            "SpaceToDepth": shapes.depth_to_space,
            "Split": shapes.split,
            "Squeeze": shapes.squeeze,
            "Tile": shapes.tile,
            "TopK": shapes.top,
            "Transpose": shapes.transpose,
            "Unsqueeze": shapes.unsqueeze,
            "Upsample": shapes.resize,
        }.items()
    },
    **{(MICROSOFT, name): shapes.as_first for name in _OF_MICROSOFT.split()},
    (MICROSOFT, "FusedMatMul"): shapes.fused_matmul,
}


def is_known(node: Node) -> bool:
    """Whether its operator is among those that are known."""
    return (node.domain.removeprefix("ai.onnx"), node.operator) in _RULES


def results(node: Node, given: Given) -> list[Tensor]:
    """What a node makes, and its values where they follow from known ones.

    Raises:
        KeyError: the operator is not among those that are known.
        ValueError: it cannot take this, or how much it makes shows only when it runs.
    """
    rule = _RULES[(node.domain.removeprefix("ai.onnx"), node.operator)]
    found = [Tensor(shape) for shape in rule(node, given)]
    if any(side < 0 for tensor in found for side in tensor.shape) or len(found[0].shape) > _MOST_AXES:
        raise ValueError(f"the shape {found[0].shape[:_MOST_AXES]}")
    if (compute := VALUES.get(node.operator)) is not None and found[0].size <= KNOWN_VALUES:
        values = compute(node, given)
        if values is not None:
            return [Tensor(part.shape, part) for part in (values if isinstance(values, list) else [values])]
    return found


def products(node: Node, given: Given, made: Sequence[Tensor]) -> int:
    """Multiply-adds of a node, and at least one for each number that it reads or makes."""
    largest = max(tensor.size for tensor in (*given, *made, shapes.LEFT_OUT))
    inner = 1
    if node.operator.endswith(("MatMul", "MatMulInteger")) and given[0].shape:
        inner = given[0].shape[-1]
    elif node.operator == "Gemm":
        inner = given[0].shape[0 if node.attributes.get("transA") else -1]
    elif "Conv" in node.operator:
        weight = given[3 if node.operator == "QLinearConv" else 1].shape
        return max(largest, (given[0] if node.operator == "ConvTranspose" else made[0]).size * math.prod(weight[1:]))
    elif node.operator == "Einsum":
        sizes = shapes.letters(node, given)
        return max(largest, math.prod(sizes.values()))
    elif node.operator == "Attention":
        inner = given[0].shape[-1]
        return max(largest, 2 * made[-1].size * inner)
    return max(largest, made[0].size * inner)
