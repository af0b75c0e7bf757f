"""INT8 arithmetic: rounding of weights and activations, and PyTorch made to compute what the quantised graph computes.

Weights are symmetric int8 per output channel. Activations are one number range a tensor: static (symmetric int8, the scale known beforehand)
or dynamic (uint8, the range found at run time). Both are ONNX's own definitions, QuantizeLinear and DynamicQuantizeLinear.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from timm.layers import Attention
from torch import Tensor, nn

from mae_deploy.errors import CheckFailed

Array = npt.NDArray[Any]

AttentionScales = tuple[float, float, float]
"""Scales of q (already times 1 / sqrt(d)), k and v."""

SOFTMAX_SCALE = 1 / 127
"""Attention's shares are at most 1."""

_FUSED_HEAD_DIMS = (16, 32, 64)
_FUSED_TOKENS = 512

_ELIGIBLE = re.compile(r"(decoder_)?blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))")


def quantize_weight(weight: Array, name: str = "a weight") -> tuple[Array, Array]:
    """Symmetric int8 per output channel: `(O, I) -> int8 (O, I), float32 scales (O,)` with `weight ≈ integers * scale`, scale = absmax / 127.

    Raises:
        CheckFailed: NaN or infinity; the message has the name.
    """
    if not np.isfinite(weight).all():
        raise CheckFailed(f"{name} has NaN or infinite values and cannot be quantised")
    scales = np.abs(weight).max(axis=1).astype(np.float32) / np.float32(127)
    # Rows of zeros, and those so small that the scale has no full precision, become zeros: what they add is below float32's smallest number.
    scales[scales < np.finfo(np.float32).tiny] = 1
    return np.rint(weight / scales[:, None]).clip(-127, 127).astype(np.int8), scales


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


def static_round_trip(values: Tensor, scale: float) -> Tensor:
    """QuantizeLinear and DequantizeLinear with int8 and zero point 0: round half to even, clamp to -128 to 127."""
    step = torch.tensor(scale, dtype=values.dtype, device=values.device)
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
            _replace(stack, linear, "weight", rounded_weight(linear.weight, f"{name}.weight"))
            if corrections:
                _replace(stack, linear, "bias", linear.bias + corrections[name].to(linear.bias.device))
            stack.callback(linear.register_forward_pre_hook(partial(_round_input, scale)).remove)
        for name, parts in (attention_scales or {}).items():
            attention = cast(Attention, model.get_submodule(name))
            attention.forward = partial(_attention, attention, parts)  # type: ignore[method-assign]
            stack.callback(delattr, attention, "forward")
        yield model


def rounded_weight(weight: Tensor, name: str) -> Tensor:
    """A weight through `quantize_weight` and back, `(O, I)`.

    Raises:
        CheckFailed: NaN or infinity.
    """
    integers, scales = quantize_weight(weight.detach().float().cpu().numpy(), name)
    return torch.from_numpy(integers * scales[:, None]).to(weight.device, weight.dtype)


def _replace(stack: ExitStack, module: nn.Module, name: str, value: Tensor) -> None:
    """Put another parameter in the place of one until the stack is left."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _round_input(scale: float | None, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return dynamic_round_trip(inputs[0]) if scale is None else static_round_trip(inputs[0], scale)


def _attention(attention: Attention, scales: AttentionScales, tokens: Tensor, **_: Any) -> Tensor:
    """Attention written out with every operand of its two products rounded: `(B, T, D) -> (B, T, D)`."""
    B, T, D = tokens.shape
    q, k, v = attention.qkv(tokens).reshape(B, T, 3, attention.num_heads, D // attention.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = (static_round_trip(part, scale) for part, scale in zip((q * attention.scale, k, v), scales, strict=True))
    shares = static_round_trip((q @ k.transpose(-2, -1)).softmax(dim=-1), SOFTMAX_SCALE)
    return attention.proj((shares @ v).transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]
