"""Transformer blocks as ONNX nodes, in any precision: LayerNorm, attention written out, MLP, quantised linear maps.

Shapes: B images, T tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mae_deploy.export.graph.builder import GraphBuilder
from mae_deploy.export.graph.cached import CacheWriter
from mae_deploy.export.graph.precision import FLOAT32, Arithmetic, DType, in_type
from mae_deploy.images.read import Array
from mae_deploy.models.quantization.rounding import INT8, Rounding, quantize_weight

_EPSILON = 1e-6


class BlockWriter:
    """Writes blocks into a graph; values are named by the state dict's names.

    Args:
        padding: added to the scores of attention, FP32 `(B, 1, 1, T)`: 0 where a token is real, very negative where it
            is padding.
        cache: keys and values of earlier frames, which are attended to as well; its mask takes the padding's place.
        sizes: B and T, one of which may be -1 for a dynamic size. The blocks then work on rows, `(B * T, D)`, where a
            linear map is one Gemm: 3 % faster on ONNX Runtime (docs/results/cpu.md). None where both are dynamic: rows
            could not be told apart without shape arithmetic.
        rounding: in which eight-bit type the `quantized` Linears multiply.
        stores_rounded: whether static weights are stored in that type; else in FP32 with a QuantizeLinear behind them,
            as TensorRT 8 needs them.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        weights: Mapping[str, Array],
        arithmetic: Arithmetic,
        *,
        quantized: Mapping[str, float | None] | None = None,
        attention_scales: Mapping[str, tuple[float, float, float]] | None = None,
        padding: str | None = None,
        cache: CacheWriter | None = None,
        sizes: tuple[int, int] | None = None,
        rounding: Rounding = INT8,
        stores_rounded: bool = True,
    ) -> None:
        self.builder = builder
        self.weights = weights
        self.arithmetic = arithmetic
        self.quantized = quantized or {}
        self.attention_scales = attention_scales or {}
        self.cache = cache
        self.padding = padding if cache is None else cache.mask
        self.sizes = sizes
        self.rounding = rounding
        self.stores_rounded = stores_rounded

    def rows(self, tokens: str, dim: int, name: str) -> str:
        """What the blocks work on: `(B, T, D) -> (B * T, D)`, or the tokens as they are where there are no rows."""
        return (
            tokens
            if self.sizes is None
            else self.builder.node("Reshape", [tokens, self.builder.integers(-1, dim)], name)
        )

    def tokens(self, rows: str, dim: int, name: str) -> str:
        """The inverse of `rows`."""
        return (
            rows
            if self.sizes is None
            else self.builder.node("Reshape", [rows, self.builder.integers(*self.sizes, dim)], name)
        )

    def block(self, tokens: str, name: str, num_heads: int) -> str:
        """Pre-norm attention and MLP with their residuals, on rows or tokens of width D, in the residual stream's
        type.
        """
        attention = self._attention(self.layer_norm(tokens, f"{name}.norm1"), f"{name}.attn", num_heads)
        tokens = self._residual(tokens, attention, f"{name}/attn_residual")
        hidden = self.gelu(
            self._linear(self.layer_norm(tokens, f"{name}.norm2"), f"{name}.mlp.fc1"), f"{name}.mlp.gelu"
        )
        return self._residual(tokens, self._linear(hidden, f"{name}.mlp.fc2"), f"{name}/mlp_residual")

    def layer_norm(self, value: str, name: str, *, dtype: DType | None = None) -> str:
        """One LayerNormalization node that accumulates in FP32; in `dtype`, or as the blocks have it."""
        b, stream = self.builder, self.arithmetic.stream
        given, dtype = dtype is not None, dtype or self.arithmetic.of("norm")
        scale, bias = (
            self._weight(f"{name}.{part}", self.weights[f"{name}.{part}"], dtype) for part in ("weight", "bias")
        )
        normed = b.node(
            "LayerNormalization",
            [b.cast(value, dtype), scale, bias],
            f"{name}/LayerNormalization",
            axis=-1,
            epsilon=_EPSILON,
            stash_type=1,
        )
        return normed if given else b.cast(normed, stream)

    def fp32_linear(self, value: str, name: str, *, bias: Array | None = None) -> str:
        """`x W^T + b` in FP32, whatever the precision of the blocks."""
        b = self.builder
        bias = self.weights[f"{name}.bias"] if bias is None else bias
        product = b.node(
            "MatMul", [value, b.weight(f"{name}.weight", self.weights[f"{name}.weight"].T)], f"{name}/MatMul"
        )
        return b.node("Add", [product, b.weight(f"{name}.bias", bias)], f"{name}/Add")

    def _attention(self, tokens: str, name: str, num_heads: int) -> str:
        """`softmax(q k^T) v` written out, the scale folded into q's weights: `(B, T, D) -> (B, T, D)`."""
        b, dtype = self.builder, self.arithmetic.product
        weight, bias = self.weights[f"{name}.qkv.weight"], self.weights[f"{name}.qkv.bias"]
        D = weight.shape[1]
        d = D // num_heads
        scale = np.ones(3 * D, np.float32)
        scale[:D] = 1 / math.sqrt(d)
        qkv = self._linear(tokens, f"{name}.qkv", weight * scale[:, None], bias * scale)
        qkv = b.node("Reshape", [qkv, b.integers(*(self.sizes or (0, 0)), 3, num_heads, d)], f"{name}/heads")
        qkv = b.node("Transpose", [qkv], f"{name}/qkv_first", perm=[2, 0, 3, 1, 4])
        q, k, v = (
            b.node("Gather", [qkv, b.scalar(i, np.int64)], f"{name}/{part}", axis=0) for i, part in enumerate("qkv")
        )
        if self.cache is not None:
            index = name.split(".")[1]
            k, v = (self.cache.beside(part, index, new, num_heads, d) for part, new in (("keys", k), ("values", v)))
        k = b.node("Transpose", [k], f"{name}/k_transposed", perm=[0, 1, 3, 2])
        if (
            name in self.attention_scales
        ):  # behind the Transpose: TensorRT fuses attention whose products read DequantizeLinear directly
            q, k, v = (
                self._round_trip(value, scale, value)
                for value, scale in zip((q, k, v), self.attention_scales[name], strict=True)
            )
        scores = b.node("MatMul", [b.cast(q, dtype), b.cast(k, dtype)], f"{name}/qk")
        shares = b.cast(self._softmax(scores, name), dtype)
        if name in self.attention_scales:
            shares = self._round_trip(shares, self.rounding.softmax_scale, shares)
        mixed = b.node("MatMul", [shares, b.cast(v, dtype)], f"{name}/av")
        mixed = b.node("Transpose", [b.cast(mixed, self.arithmetic.stream)], f"{name}/heads_last", perm=[0, 2, 1, 3])
        merged = b.node(
            "Reshape", [mixed, b.integers(0, 0, D) if self.sizes is None else b.integers(-1, D)], f"{name}/merged"
        )
        return self._linear(merged, f"{name}.proj")

    def _softmax(self, scores: str, name: str) -> str:
        b, dtype = self.builder, self.arithmetic.of("softmax")
        scores = b.cast(scores, dtype)
        if self.padding is not None:
            scores = b.node("Add", [scores, b.cast(self.padding, dtype)], f"{name}/padding")
        return b.node("Softmax", [scores], f"{name}/softmax", axis=-1)

    def gelu(self, value: str, name: str) -> str:
        """The exact form, which engines know and fuse: `0.5 x (1 + erf(x / sqrt 2))`."""
        b, dtype = self.builder, self.arithmetic.of("gelu")
        value = b.cast(value, dtype)
        root, one, half = (b.scalar(number, dtype) for number in (math.sqrt(2), 1.0, 0.5))
        erf = b.node("Erf", [b.node("Div", [value, root], f"{name}/scaled")], f"{name}/erf")
        product = b.node("Mul", [value, b.node("Add", [erf, one], f"{name}/shifted")], f"{name}/product")
        return b.cast(b.node("Mul", [product, half], f"{name}/half"), self.arithmetic.stream)

    def _residual(self, tokens: str, update: str, name: str) -> str:
        b, dtype = self.builder, self.arithmetic.of("residual")
        return b.node("Add", [b.cast(tokens, dtype), b.cast(update, dtype)], name)

    def _weight(self, name: str, values: Array, dtype: DType) -> str:
        return self.builder.weight(name, in_type(name, values, dtype))

    def _linear(self, value: str, name: str, weight: Array | None = None, bias: Array | None = None) -> str:
        """`x W^T + b`, quantised where the plan says so; the result is in the stream's type."""
        b, types = self.builder, self.arithmetic
        weight = self.weights[f"{name}.weight"] if weight is None else weight
        bias = self.weights[f"{name}.bias"] if bias is None else bias
        if name not in self.quantized:
            if self.sizes is not None and types.product == types.stream:
                stored = b.cast(self._weight(f"{name}.weight", weight, types.stored), types.product)
                return b.node(
                    "Gemm",
                    [value, stored, self._weight(f"{name}.bias", bias, types.stream)],
                    f"{name}/Gemm",
                    transB=1,
                )
            stored = b.cast(self._weight(f"{name}.weight", weight.T, types.stored), types.product)
            product = b.node("MatMul", [b.cast(value, types.product), stored], f"{name}/MatMul")
        elif (scale := self.quantized[name]) is not None:
            product = self._static_product(value, scale, weight, name)
        else:
            product = self._dynamic_product(value, weight, name)
        return b.node(
            "Add",
            [b.cast(product, types.stream), self._weight(f"{name}.bias", bias, types.stream)],
            f"{name}/Add",
        )

    def _static_product(self, value: str, scale: float, weight: Array, name: str) -> str:
        """Explicit Q/DQ: activations per tensor, weights per output channel (FP8: per tensor), both symmetric with zero
        points of 0.
        """
        b = self.builder
        rounded, scales = quantize_weight(weight, f"{name}.weight", self.rounding)
        constants = [
            b.weight(f"{name}.weight_scale", scales.astype(b.types[value])),
            b.weight(f"{name}.weight_zero", np.zeros(scales.shape, rounded.dtype)),
        ]
        stored = b.weight(f"{name}.weight", (rounded if self.stores_rounded else weight).T)
        axis: dict[str, Any] = {"axis": 1} if self.rounding.per_channel else {}
        if not self.stores_rounded:
            stored = b.node("QuantizeLinear", [stored, *constants], f"{name}/weight_quantized", **axis)
        stored = b.node("DequantizeLinear", [stored, *constants], f"{name}/weight", **axis)
        return b.node("MatMul", [self._round_trip(value, scale, f"{name}/input"), stored], f"{name}/MatMul")

    def _dynamic_product(self, value: str, weight: Array, name: str) -> str:
        """Activations as uint8 with a range found at run time, weights int8 per output channel, the sum in int32."""
        b = self.builder
        integers, scales = quantize_weight(weight, f"{name}.weight", self.rounding)
        scale, zero = f"{name}/input_scale", f"{name}/input_zero"
        rounded = b.node("DynamicQuantizeLinear", [value], f"{name}/input", extra_outputs=(scale, zero))
        stored = b.weight(f"{name}.weight", integers.T)
        zeros = b.weight(f"{name}.weight_zero", np.zeros(len(scales), np.int8))
        total = b.node("MatMulInteger", [rounded, stored, zero, zeros], f"{name}/MatMulInteger")
        total = b.cast(total, FLOAT32)
        factors = b.node("Mul", [scale, b.weight(f"{name}.weight_scale", scales)], f"{name}/factors")
        return b.node("Mul", [total, factors], f"{name}/MatMul")

    def _round_trip(self, value: str, scale: float, name: str) -> str:
        """QuantizeLinear and DequantizeLinear: the engine fuses what lies between two of them."""
        b = self.builder
        constants = [b.scalar(scale, b.types[value]), b.scalar(0, self.rounding.dtype)]
        rounded = b.node("QuantizeLinear", [value, *constants], f"{name}/quantized")
        return b.node("DequantizeLinear", [rounded, *constants], f"{name}/dequantized")
