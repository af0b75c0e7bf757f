"""In which types a graph stores, multiplies and adds: the precisions and what stays FP32 in each.

In every precision the patch embedding, the positions, the final norm, pooling, the head, and the decoder's first and
last linear maps are FP32: they are under 2 % of the arithmetic, and what they lose goes straight to the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.images.read import Array

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Typing = Literal["weak", "strong"]
Island = Literal["softmax", "gelu", "norm", "residual"]

DType = np.dtype[Any]

FLOAT32: DType = np.dtype(np.float32)
FLOAT16: DType = np.dtype(np.float16)
BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)

_TYPES = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    """The types of a transformer block."""

    stored: DType = FLOAT32
    """Weights in the file; where it is not `product`, a Cast follows each."""
    product: DType = FLOAT32
    """Both sides of a matrix product."""
    stream: DType = FLOAT32
    """Residual stream, LayerNormalization's in- and output (it accumulates in FP32: stash_type 1), softmax, GELU."""
    islands: frozenset[Island] = frozenset()
    """Operators that are FP32 although the stream is not."""

    def of(self, operator: Island) -> DType:
        """The type in which an operator computes."""
        return FLOAT32 if operator in self.islands else self.stream


def arithmetic(precision: Precision, typing: Typing, islands: tuple[Island, ...] = ()) -> Arithmetic:
    """The types of a graph.

    Weak: the graph computes in FP32 and the engine is told by the manifest in what it may compute; weights are stored
        in the
    precision, which halves the file. Strong: the types in the graph say what is computed in what.

    Raises:
        ConfigError: `islands` in a graph that has no lower precision to keep them from, or weak FP8.
    """
    strong = typing == "strong"
    if precision == "fp8" and not strong:
        raise ConfigError("--precision fp8 --typing weak: FP8 is a type in the graph", hint="leave --typing out")
    # Eight bits of mantissa are too few for the residual stream: FP32 but for the products, unless islands say what is.
    if precision == "bf16" and strong:
        chosen = Arithmetic(
            stored=BFLOAT16, product=BFLOAT16, stream=BFLOAT16 if islands else FLOAT32, islands=frozenset(islands)
        )
    elif strong and precision in ("fp16", "int8", "fp8"):
        chosen = Arithmetic(stored=FLOAT16, product=FLOAT16, stream=FLOAT16, islands=frozenset(islands))
    else:
        chosen = Arithmetic(stored=FLOAT32 if precision == "int8" else _TYPES[precision])
    if islands and chosen.stream == FLOAT32:
        raise ConfigError(
            f"--fp32-ops {','.join(islands)}: with --precision {precision} --typing {typing} these are FP32 already"
        )
    return chosen


def in_type(name: str, weight: Array, dtype: DType) -> Array:
    """A weight in the type that the graph stores.

    Raises:
        CheckFailed: a value is beyond that type.
    """
    most = float(np.finfo(np.float16).max)
    if dtype == FLOAT16 and (largest := float(np.abs(weight).max(initial=0.0))) > most:
        raise CheckFailed(
            f"the weight {name} reaches {largest:.4g}, and FP16 ends at {most:,.0f}", hint="export fp32 or bf16"
        )
    return weight.astype(dtype, copy=False)
