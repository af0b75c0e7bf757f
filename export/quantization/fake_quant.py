"""PyTorch made to compute what a quantised graph computes, attention products included, and what INT8 attention
needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention
from torch import Tensor, nn

from mae_deploy.models.quantization.rounding import (
    INT8,
    AttentionScales,
    Rounding,
    dynamic_round_trip,
    linear_of,
    rounded_weight,
    static_round_trip,
)
from mae_deploy.models.vit import BlockWithQKV


def macs_per_token(model: nn.Module, name: str) -> int:
    """Multiply-accumulates of one Linear for one token."""
    return linear_of(model, name).weight.numel()


@contextmanager
def fake_quantized(
    model: nn.Module,
    scales: Mapping[str, float | None],
    attention_scales: Mapping[str, AttentionScales] | None = None,
    *,
    corrections: Mapping[str, Tensor] | None = None,
    rounding: Rounding = INT8,
) -> Iterator[nn.Module]:
    """The model with these Linears rounded as in the exported graph; restored afterwards. Its tensors are replaced, not
    written to.

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
            block = model.get_submodule(name.removesuffix(".attn"))
            assert isinstance(block, BlockWithQKV)
            block.forward = partial(_block, block, block.forward, parts, rounding)  # type: ignore[method-assign]
            stack.callback(delattr, block, "forward")
        yield model


def _replace(stack: ExitStack, module: nn.Module, name: str, value: Tensor) -> None:
    """Put another parameter in the place of one until the stack is left."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _round_input(scale: float | None, rounding: Rounding, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return dynamic_round_trip(inputs[0]) if scale is None else static_round_trip(inputs[0], scale, rounding)


def _block(
    block: BlockWithQKV, forward: Any, scales: AttentionScales, rounding: Rounding, tokens: Tensor, **given: Any
) -> Tensor:
    """A block with every operand of its attention's two products rounded, queries and keys as they are multiplied:
    `(B, T, D) -> (B, T, D)`.
    """
    attention = cast(Attention, block.attn)
    q, k, v = forward(tokens, inner="only_qkv", **given).unbind(1)
    q, k, v = (
        static_round_trip(part, scale, rounding)
        for part, scale in zip((q * attention.scale, k, v), scales, strict=True)
    )
    shares = static_round_trip((q @ k.transpose(-2, -1)).softmax(dim=-1), rounding.softmax_scale, rounding)
    return block.behind_attention(tokens, shares @ v)
