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
from mae_deploy.models.config import Activation
from mae_deploy.models.quantization.rounding import INT8, Rounding, quantize_weight


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
        self.epsilon = 1e-6
        """Of the norms."""
        self.activation: Activation = "gelu"
        """Of the blocks' MLPs."""
        self.fuses_tanh = True
        """See `GraphSpec`."""

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

    def block(self, tokens: str, name: str, num_heads: int, turn: str | None = None) -> str:
        """Pre-norm attention and MLP with their residuals, on rows or tokens of width D, in the residual stream's
        type.

        Args:
            turn: cosines and sines of the tokens' rotary angles, `(T, 2 d)` with whatever dimensions before them.
        """
        attention = self._attention(self.layer_norm(tokens, f"{name}.norm1"), f"{name}.attn", num_heads, turn)
        tokens = self._residual(tokens, attention, f"{name}/attn_residual")
        normed = self.layer_norm(tokens, f"{name}.norm2")
        if self.activation == "swiglu" and f"{name}.mlp.fc1" not in self.quantized:
            hidden = self._gated(normed, f"{name}.mlp")
        else:
            hidden = self._activated(self._linear(normed, f"{name}.mlp.fc1"), f"{name}.mlp", self.activation)
        if f"{name}.mlp.norm.weight" in self.weights:
            hidden = self.layer_norm(hidden, f"{name}.mlp.norm")
        return self._residual(tokens, self._linear(hidden, f"{name}.mlp.fc2"), f"{name}/mlp_residual")

    def layer_norm(self, value: str, name: str, *, dtype: DType | None = None, factor: float = 1.0) -> str:
        """One LayerNormalization node that accumulates in FP32, its result times a factor; in `dtype`, or as the blocks
        have it.
        """
        b, stream = self.builder, self.arithmetic.stream
        given, dtype = dtype is not None, dtype or self.arithmetic.of("norm")
        values = (self.weights[f"{name}.{part}"] * np.float32(factor) for part in ("weight", "bias"))
        scale, bias = (
            self._weight(f"{name}.{part}", value, dtype) for part, value in zip(("weight", "bias"), values, strict=True)
        )
        normed = b.node(
            "LayerNormalization",
            [b.cast(value, dtype), scale, bias],
            f"{name}/LayerNormalization",
            axis=-1,
            epsilon=self.epsilon,
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

    def fp32_mlp(self, value: str, norm: str, name: str, activation: Activation | None) -> str:
        """`x + MLP(norm(x))` in FP32; None: the blocks' activation."""
        hidden = self.fp32_linear(self.layer_norm(value, norm, dtype=FLOAT32), f"{name}.fc1")
        hidden = self._activated(hidden, name, activation or self.activation, FLOAT32)
        return self.builder.node("Add", [value, self.fp32_linear(hidden, f"{name}.fc2")], f"{name}/residual")

    def _attention(self, tokens: str, name: str, num_heads: int, turn: str | None) -> str:
        """`softmax(q k^T) v` written out, the scale folded into q's weights or norm: `(B, T, D) -> (B, T, D)`."""
        b, dtype = self.builder, self.arithmetic.product
        weight, bias = self.weights[f"{name}.qkv.weight"], self.weights[f"{name}.qkv.bias"]
        D = weight.shape[1]
        d = D // num_heads
        normed = f"{name}.q_norm.weight" in self.weights
        scale = np.ones(3 * D, np.float32)
        scale[:D] = 1.0 if normed else 1 / math.sqrt(d)
        qkv = self._linear(tokens, f"{name}.qkv", weight * scale[:, None], bias * scale)
        qkv = b.node("Reshape", [qkv, b.integers(*(self.sizes or (0, 0)), 3, num_heads, d)], f"{name}/heads")
        qkv = b.node("Transpose", [qkv], f"{name}/qkv_first", perm=[2, 0, 3, 1, 4])
        q, k, v = (
            b.node("Gather", [qkv, b.scalar(i, np.int64)], f"{name}/{part}", axis=0) for i, part in enumerate("qkv")
        )
        if normed:
            q, k = (
                self.layer_norm(value, f"{name}.{part}_norm", factor=factor)
                for part, value, factor in (("q", q, 1 / math.sqrt(d)), ("k", k, 1.0))
            )
        if turn is not None:
            q, k = (self._turned(value, turn, f"{name}/{part}_turned", d) for part, value in (("q", q), ("k", k)))
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
        if f"{name}.norm.weight" in self.weights:
            merged = self.layer_norm(merged, f"{name}.norm")
        return self._linear(merged, f"{name}.proj")

    def _turned(self, value: str, turn: str, name: str, head_dim: int) -> str:
        """Queries or keys turned by rotary angles: `x cos + (second half, first half) (-sin, sin)`, `(B, H, T, d)`."""
        b, d = self.builder, head_dim
        cos, sin = (b.half(turn, 2 * d, index, f"{turn}/{part}") for index, part in enumerate(("cos", "sin")))
        first, second = (b.half(value, d, index, f"{name}/{part}") for index, part in enumerate(("first", "second")))
        swapped = b.node("Concat", [second, first], f"{name}/swapped", axis=-1)
        kept, moved = b.node("Mul", [value, cos], f"{name}/kept"), b.node("Mul", [swapped, sin], f"{name}/moved")
        return b.node("Add", [kept, moved], name)

    def _softmax(self, scores: str, name: str) -> str:
        b, dtype = self.builder, self.arithmetic.of("softmax")
        scores = b.cast(scores, dtype)
        if self.padding is not None:
            scores = b.node("Add", [scores, b.cast(self.padding, dtype)], f"{name}/padding")
        return b.node("Softmax", [scores], f"{name}/softmax", axis=-1)

    def _activated(self, value: str, mlp: str, activation: Activation, given: DType | None = None) -> str:
        """What an MLP's first layer gave through its activation, in the given type, or as the blocks have it; of SwiGLU
        silu of the first half times the second half.
        """
        if activation == "gelu":
            return self.gelu(value, f"{mlp}.gelu", given)
        b, name, dtype = self.builder, f"{mlp}.{activation}", given or self.arithmetic.of("gelu")
        value = b.cast(value, dtype)
        if activation == "swiglu":
            hidden = 2 * self.weights[f"{mlp}.fc2.weight"].shape[1]
            gate, value = (b.half(value, hidden, index, f"{name}/{part}") for index, part in enumerate(("gate", "up")))
            factor = self._silu(gate, name)
        elif activation == "quick_gelu":
            scaled = b.node("Mul", [value, b.scalar(1.702, dtype)], f"{name}/scaled")
            factor = b.node("Sigmoid", [scaled], f"{name}/share")
        else:
            value, factor = self._tanh_parts(value, name, dtype)
        return b.cast(b.node("Mul", [value, factor], name), given or self.arithmetic.stream)

    def _tanh_parts(self, value: str, name: str, dtype: DType) -> tuple[str, str]:
        """The two factors of GELU by tanh, `x / 2` and `1 + tanh z`, `z = sqrt(2 / pi) x (1 + 0.044715 x^2)`, as ONNX
        Runtime fuses them; or `x` and the same by a sigmoid, which is faster elsewhere: `(1 + tanh z) / 2 =
        sigmoid(2 z)`.
        """
        b, times = self.builder, math.sqrt(2 / math.pi) * (1 if self.fuses_tanh else 2)
        one = b.scalar(1.0, dtype)
        scaled = b.node("Mul", [value, b.scalar(0.044715, dtype)], f"{name}/scaled")
        cubic = b.node("Add", [b.node("Mul", [scaled, value], f"{name}/square"), one], f"{name}/shifted")
        linear = b.node("Mul", [value, b.scalar(times, dtype)], f"{name}/linear")
        inner = b.node("Mul", [linear, cubic], f"{name}/inner")
        if not self.fuses_tanh:
            return value, b.node("Sigmoid", [inner], f"{name}/share")
        share = b.node("Add", [b.node("Tanh", [inner], f"{name}/tanh"), one], f"{name}/share")
        return b.node("Mul", [value, b.scalar(0.5, dtype)], f"{name}/half"), share

    def _gated(self, value: str, mlp: str) -> str:
        """SwiGLU by a linear map for each half of fc1: to cut one map's result in two would copy it, 3 % of a small
        network's time on ONNX Runtime (docs/results/latency.md).
        """
        b, dtype, name = self.builder, self.arithmetic.of("gelu"), f"{mlp}.swiglu"
        weights, biases = (np.split(self.weights[f"{mlp}.fc1.{part}"], 2) for part in ("weight", "bias"))
        gate, up = (
            b.cast(self._linear(value, f"{mlp}.fc1.{part}", weight, bias), dtype)
            for part, weight, bias in zip(("gate", "up"), weights, biases, strict=True)
        )
        return b.cast(b.node("Mul", [up, self._silu(gate, name)], name), self.arithmetic.stream)

    def _silu(self, gate: str, name: str) -> str:
        b = self.builder
        return b.node("Mul", [gate, b.node("Sigmoid", [gate], f"{name}/share")], f"{name}/silu")

    def gelu(self, value: str, name: str, given: DType | None = None) -> str:
        """The exact form, which engines know and fuse: `0.5 x (1 + erf(x / sqrt 2))`."""
        b, dtype = self.builder, given or self.arithmetic.of("gelu")
        value = b.cast(value, dtype)
        root, one, half = (b.scalar(number, dtype) for number in (math.sqrt(2), 1.0, 0.5))
        erf = b.node("Erf", [b.node("Div", [value, root], f"{name}/scaled")], f"{name}/erf")
        product = b.node("Mul", [value, b.node("Add", [erf, one], f"{name}/shifted")], f"{name}/product")
        return b.cast(b.node("Mul", [product, half], f"{name}/half"), given or self.arithmetic.stream)

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
