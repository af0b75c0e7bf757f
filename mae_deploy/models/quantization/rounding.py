"""Rounding to eight bits: which Linears, and how their weights and inputs are rounded.

INT8 weights are symmetric per output channel, of 8 bits or 7. Activations are one number range a tensor: static
(symmetric int8, the scale known beforehand) or dynamic (uint8, the range found at run time). FP8 is E4M3, per tensor
and static. All are ONNX's own definitions, QuantizeLinear and DynamicQuantizeLinear. On tensors nothing waits for the
device.
FP8 formats, Micikevicius et al. 2022: https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array

AttentionScales = tuple[float, float, float]
"""Scales of q (already times 1 / sqrt(d)), k and v."""

_ELIGIBLE = re.compile(r"(decoder_)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """An eight-bit type of numbers that stand for `stored * scale`."""

    dtype: np.dtype[Any]
    """As it is stored."""
    largest: float
    """The number that the largest magnitude becomes."""
    largest_weight: float
    """The same of weights."""
    per_channel: bool
    """Whether each output channel of a weight has its scale. TensorRT multiplies FP8 with one a tensor, but on Hopper
    from 10.6 on."""

    def scales(self, absmax: Tensor | npt.ArrayLike) -> Tensor:
        """The scales of what is within these magnitudes, float32 of any shape."""
        scales = torch.as_tensor(absmax, dtype=torch.float32) / self.largest
        # FP16 in the graph, which has all its digits from 6e-5 on; a larger scale loses no digit of FP8. Beyond FP16's
        # largest number it would be infinite, and all that it scales NaN.
        if self.dtype == FP8.dtype:
            half = torch.finfo(torch.float16)
            return scales.clamp(half.tiny, half.max).half().float()
        # Rows of zeros, and those so small that the scale has no full precision, become zeros: what they add is below
        # float32's smallest number.
        return torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)

    def levels(self, scaled: Tensor, least: float) -> Tensor:
        """What numbers that were divided by their scale are stored as, from `least` to the largest; still float32.
        Overwrites them.
        """
        if self.dtype == FP8.dtype:
            return scaled.clamp_(least, self.largest).to(torch.float8_e4m3fn).to(scaled.dtype)
        return scaled.round_().clamp_(least, self.largest)

    @property
    def softmax_scale(self) -> float:
        """Attention's shares are at most 1."""
        return 1 / self.largest


INT8 = Rounding(dtype=np.dtype(np.int8), largest=127, largest_weight=127, per_channel=True)
INT8_WEIGHTS_7 = replace(INT8, largest_weight=64)
"""Weights of 7 bits: two products fit in 16 bits, `2 * 255 * 64 = 32,640`, all that x86 CPUs without VNNI have."""
FP8 = Rounding(dtype=np.dtype(ml_dtypes.float8_e4m3fn), largest=448, largest_weight=448, per_channel=False)

ROUNDINGS = {"int8": INT8, "fp8": FP8}
"""By precision."""


def rounding_of(precision: str, weight_bits: int = 8) -> Rounding:
    """That of a precision; of another one than INT8 and FP8, INT8's."""
    return INT8_WEIGHTS_7 if weight_bits == 7 else ROUNDINGS.get(precision, INT8)


def eligible_linears(model: nn.Module) -> list[str]:
    """The Linears that INT8 applies to, in order: qkv, proj, fc1 and fc2 of every encoder block, and of every decoder
    block if there is a decoder.
    """
    return [name for name, _ in model.named_modules() if _ELIGIBLE.fullmatch(name)]


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def quantize_weight(weight: Array, name: str = "a weight", rounding: Rounding = INT8) -> tuple[Array, Array]:
    """Symmetric, of the rounding's type: `(O, I) -> (O, I), float32 scales (O,), or () for the whole tensor` with
    `weight ≈ stored * scale`.

    Raises:
        CheckFailed: NaN or infinity; the message has the name.
    """
    if not np.isfinite(weight).all():
        raise CheckFailed(f"{name} has NaN or infinite values and cannot be quantised")
    levels, scales = _weight_levels(torch.tensor(weight), rounding)
    return levels.numpy().astype(rounding.dtype), scales.numpy()


def rounded_weight(weight: Tensor, name: str, rounding: Rounding = INT8) -> Tensor:
    """A weight through `quantize_weight` and back, `(O, I)`.

    Raises:
        CheckFailed: NaN or infinity.
    """
    if not weight.isfinite().all():
        raise CheckFailed(f"{name} has NaN or infinite values and cannot be quantised")
    return weight_round_trip(weight.detach(), rounding)


def weight_round_trip(weight: Tensor, rounding: Rounding = INT8) -> Tensor:
    """The same for a weight that is known to be finite, or need not be."""
    levels, scales = _weight_levels(weight, rounding)
    return levels.mul_(scales.reshape(-1, 1)).to(weight.dtype)


def static_round_trip(values: Tensor, scale: float | Tensor, rounding: Rounding = INT8) -> Tensor:
    """QuantizeLinear and DequantizeLinear with zero point 0: round half to even, clamp to -128 to 127, or to -448 to
    448.
    """
    step = torch.as_tensor(scale, dtype=values.dtype, device=values.device)
    return rounding.levels(values / step, -128 if rounding.dtype == INT8.dtype else -rounding.largest).mul_(step)


def dynamic_round_trip(values: Tensor) -> Tensor:
    """DynamicQuantizeLinear and back: uint8 over the range of this tensor, zero included."""
    least, most = torch.aminmax(values)
    low, high = least.clamp(max=0), most.clamp(min=0)
    step = torch.where(high > low, (high - low) / 255, 1.0)
    zero = (-low / step).clamp(0, 255).round()
    return (values / step).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(step)


def _weight_levels(weight: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """What is stored, `(O, I)` still in float32, and its scales, `(O,)` or ()."""
    rounding = replace(rounding, largest=rounding.largest_weight)
    scales = rounding.scales(weight.abs().amax(dim=1 if rounding.per_channel else (0, 1)))
    return rounding.levels(weight.float() / scales.reshape(-1, 1), -rounding.largest), scales
