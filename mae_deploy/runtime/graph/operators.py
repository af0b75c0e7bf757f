"""The operators that networks of our kind are made of: the sizes of what each makes, and of sizes their values.

No operator that repeats others is among them (Loop, Scan, SequenceMap), none that runs code of others, and none whose
result is as large as its data say (NonZero, Compress). `If` is: both of its branches are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mae_deploy.runtime.graph import shapes
from mae_deploy.runtime.graph.fused import FUSED
from mae_deploy.runtime.graph.nodes import KNOWN_VALUES, Node, Tensor
from mae_deploy.runtime.graph.shapes import Given, Rule
from mae_deploy.runtime.graph.values import SEQUENCES, VALUES

_MOST_AXES = 32
"""As many as NumPy's arrays have."""


_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu Clip"
    " Cos Cosh Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN"
    " LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink"
    " Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
)
_AS_FIRST = (
    "BatchNormalization Cast CastLike CumSum DequantizeLinear Dropout EyeLike GroupNormalization Hardmax"
    " InstanceNormalization LayerNormalization LogSoftmax LpNormalization MeanVarianceNormalization QuantizeLinear"
    " RMSNormalization RandomNormalLike RandomUniformLike RotaryEmbedding ScatterElements ScatterND"
    " SimplifiedLayerNormalization Softmax Trilu"
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
            "Div": shapes.divided,
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
            "Mod": shapes.divided,
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
    **FUSED,
}


def is_known(node: Node) -> bool:
    """Whether its operator is among those that are known."""
    key = (node.domain.removeprefix("ai.onnx"), node.operator)
    return key in _RULES or key in SEQUENCES


def results(node: Node, given: Given) -> list[Tensor]:
    """What a node makes, and its values where they follow from known ones.

    Raises:
        ValueError: it cannot take this, or how much it makes shows only when it runs.
    """
    key = (node.domain.removeprefix("ai.onnx"), node.operator)
    if key in SEQUENCES:
        return [SEQUENCES[key](node, given)]
    found = [Tensor(shape) for shape in _RULES[key](node, given)]
    if any(side < 0 for tensor in found for side in tensor.shape) or len(found[0].shape) > _MOST_AXES:
        raise ValueError(f"the shape {found[0].shape[:_MOST_AXES]}")
    compute = None if key[0] else VALUES.get(node.operator)
    if compute is not None and found[0].size <= KNOWN_VALUES:
        values = compute(node, given)
        if values is not None:
            return [Tensor(part.shape, part) for part in (values if isinstance(values, list) else [values])]
    return found


def products(node: Node, given: Given, made: Sequence[Tensor]) -> int:
    """Multiply-adds of a node, and at least one for each number that it reads or makes."""
    operator = node.operator
    largest = max(tensor.size for tensor in (*given, *made, shapes.LEFT_OUT))
    inner = 1
    if "Attention" in operator:
        scores = next(tensor.shape for tensor in reversed(made) if len(tensor.shape) == 4)
        heads = scores[1] if len(given[0].shape) != 4 else 1
        widths = -(-(given[0].shape[-1] + made[0].shape[-1]) // max(heads, 1))
        projected = given[0].size * given[1].shape[-1] if operator != "MultiHeadAttention" and node.domain else 0
        return max(largest, projected + math.prod(scores) * widths)
    if "MatMul" in operator:
        inner = given[0].shape[shapes.summed_axis(node)] if given[0].shape else 1
    elif "Gemm" in operator:
        inner = given[0].shape[0 if node.attributes.get("transA") else -1]
    elif "Conv" in operator:
        weight = given[3 if operator == "QLinearConv" else 1].shape
        return max(largest, (given[0] if operator == "ConvTranspose" else made[0]).size * math.prod(weight[1:]))
    elif "kernel_shape" in node.attributes:
        inner = math.prod(node.attributes["kernel_shape"])
    elif operator == "Einsum":
        return max(largest, math.prod(shapes.letters(node, given).values()))
    return max(largest, made[0].size * inner)
