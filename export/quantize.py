"""Arithmetic in eight bits: rounding of weights and activations, and PyTorch made to compute what the quantised graph computes.

INT8 weights are symmetric per output channel. Activations are one number range a tensor: static (symmetric int8, the scale known beforehand)
or dynamic (uint8, the range found at run time). FP8 is E4M3, per tensor and static. All are ONNX's own definitions, QuantizeLinear and
DynamicQuantizeLinear.
FP8 formats, Micikevicius et al. 2022: https://arxiv.org/abs/2209.05433
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from timm.layers import Attention
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed

Array = npt.NDArray[Any]

AttentionScales = tuple[float, float, float]
"""Scales of q (already times 1 / sqrt(d)), k and v."""

_FUSED_HEAD_DIMS = (16, 32, 64)
_FUSED_TOKENS = 512

_ELIGIBLE = re.compile(r"(decoder_)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """An eight-bit type of numbers that stand for `stored * scale`."""

    dtype: np.dtype[Any]
    """As it is stored."""
    largest: float
    """The number that the largest magnitude becomes."""
    per_channel: bool
    """Whether each output channel of a weight has its scale. TensorRT multiplies FP8 with one a tensor, but on Hopper from 10.6 on."""

    def scales(self, absmax: npt.ArrayLike) -> Array:
        """The scales of what is within these magnitudes, float32 of any shape."""
        scales: Array = np.asarray(absmax, np.float32) / np.float32(self.largest)
        if self.dtype == FP8.dtype:  # FP16 in the graph, which has all its digits from 6e-5 on; a floating point number loses nothing by a larger scale
            halves: Array = np.maximum(scales, np.finfo(np.float16).tiny).astype(np.float16)
            return halves.astype(np.float32)
        # Rows of zeros, and those so small that the scale has no full precision, become zeros: what they add is below float32's smallest number.
        return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)

    @property
    def softmax_scale(self) -> float:
        """Attention's shares are at most 1."""
        return 1 / self.largest


INT8 = Rounding(dtype=np.dtype(np.int8), largest=127, per_channel=True)
FP8 = Rounding(dtype=np.dtype(ml_dtypes.float8_e4m3fn), largest=448, per_channel=False)

ROUNDINGS = {"int8": INT8, "fp8": FP8}
"""By precision."""


def quantize_weight(weight: Array, name: str = "a weight", rounding: Rounding = INT8) -> tuple[Array, Array]:
    """Symmetric, of the rounding's type: `(O, I) -> (O, I), float32 scales (O,), or () for the whole tensor` with `weight ≈ stored * scale`.

    Raises:
        CheckFailed: NaN or infinity; the message has the name.
    """
    if not np.isfinite(weight).all():
        raise CheckFailed(f"{name} has NaN or infinite values and cannot be quantised")
    scales = rounding.scales(np.abs(weight).max(axis=1 if rounding.per_channel else None))
    stored = weight / (scales[:, None] if rounding.per_channel else scales)
    if rounding.dtype.kind == "i":
        stored = np.rint(stored)
    return stored.clip(-rounding.largest, rounding.largest).astype(rounding.dtype), scales


def eligible_linears(model: nn.Module) -> list[str]:
    """The Linears that INT8 applies to, in order: qkv, proj, fc1 and fc2 of every encoder block, and of every decoder block if there is a decoder."""
    return [name for name, _ in model.named_modules() if _ELIGIBLE.fullmatch(name)]


def macs_per_token(model: nn.Module, name: str) -> int:
    """Multiply-accumulates of one Linear for one token."""
    return linear_of(model, name).weight.numel()


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def attention_obstacle(head_dim: int, num_tokens: int) -> str | None:
    """Why no engine fuses INT8 attention of this shape (TensorRT's conditions), or None if one can.

    Args:
        num_tokens: the largest T, CLS included.
    """
    if head_dim not in _FUSED_HEAD_DIMS:
        return f"the head dimension is {head_dim}; INT8 attention is fused for {', '.join(map(str, _FUSED_HEAD_DIMS))} only"
    if num_tokens > _FUSED_TOKENS:
        return f"there are up to {num_tokens} tokens; INT8 attention is fused up to {_FUSED_TOKENS}"
    return None


def static_round_trip(values: Tensor, scale: float, rounding: Rounding = INT8) -> Tensor:
    """QuantizeLinear and DequantizeLinear with zero point 0: round half to even, clamp to -128 to 127, or to -448 to 448."""
    step = torch.tensor(scale, dtype=values.dtype, device=values.device)
    if rounding is FP8:
        return (values / step).clamp_(-rounding.largest, rounding.largest).to(torch.float8_e4m3fn).to(values.dtype).mul_(step)
    return (values / step).round_().clamp_(-128, 127).mul_(step)


def dynamic_round_trip(values: Tensor) -> Tensor:
    """DynamicQuantizeLinear and back: uint8 over the range of this tensor, zero included."""
    least, most = (bound.item() for bound in torch.aminmax(values))
    low, high = np.float32(min(least, 0.0)), np.float32(max(most, 0.0))
    step = (high - low) / np.float32(255) if high > low else np.float32(1)
    zero = float(np.rint(np.clip(-low / step, 0, 255)))
    return (values / float(step)).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(float(step))


@contextmanager
def fake_quantized(
    model: nn.Module,
    scales: Mapping[str, float | None],
    attention_scales: Mapping[str, AttentionScales] | None = None,
    *,
    corrections: Mapping[str, Tensor] | None = None,
    rounding: Rounding = INT8,
) -> Iterator[nn.Module]:
    """The model with these Linears rounded as in the exported graph; restored afterwards. Its tensors are replaced, not written to.

    Args:
        scales: for each Linear the scale of its input, or None for a range found at each call.
        attention_scales: for each attention, such as `blocks.0.attn`, the scales of q, k and v.
        corrections: for each Linear what is added to its bias meanwhile, `(O,)`.

    Raises:
        CheckFailed: a weight that is not finite.
    """
    with ExitStack() as stack, torch.no_grad():
        for name, scale in scales.items():
            linear = linear_of(model, name)
            _replace(stack, linear, "weight", rounded_weight(linear.weight, f"{name}.weight", rounding))
            if corrections:
                _replace(stack, linear, "bias", linear.bias + corrections[name].to(linear.bias.device))
            stack.callback(linear.register_forward_pre_hook(partial(_round_input, scale, rounding)).remove)
        for name, parts in (attention_scales or {}).items():
            attention = cast(Attention, model.get_submodule(name))
            attention.forward = partial(_attention, attention, parts, rounding)  # type: ignore[method-assign]
            stack.callback(delattr, attention, "forward")
        yield model


def rounded_weight(weight: Tensor, name: str, rounding: Rounding = INT8) -> Tensor:
    """A weight through `quantize_weight` and back, `(O, I)`.

    Raises:
        CheckFailed: NaN or infinity.
    """
    stored, scales = quantize_weight(weight.detach().float().cpu().numpy(), name, rounding)
    return torch.from_numpy(stored.astype(np.float32) * scales.reshape(-1, 1)).to(weight.device, weight.dtype)


def _replace(stack: ExitStack, module: nn.Module, name: str, value: Tensor) -> None:
    """Put another parameter in the place of one until the stack is left."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _round_input(scale: float | None, rounding: Rounding, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return dynamic_round_trip(inputs[0]) if scale is None else static_round_trip(inputs[0], scale, rounding)


def _attention(attention: Attention, scales: AttentionScales, rounding: Rounding, tokens: Tensor, **_: Any) -> Tensor:
    """Attention written out with every operand of its two products rounded: `(B, T, D) -> (B, T, D)`."""
    B, T, D = tokens.shape
    q, k, v = attention.qkv(tokens).reshape(B, T, 3, attention.num_heads, D // attention.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = (static_round_trip(part, scale, rounding) for part, scale in zip((q * attention.scale, k, v), scales, strict=True))
    shares = static_round_trip((q @ k.transpose(-2, -1)).softmax(dim=-1), rounding.softmax_scale, rounding)
    return attention.proj((shares @ v).transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]
