"""Which layer before a Linear takes a division of its input's channels, so that the model computes the same."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Shapes = Mapping[str, Tensor]
"""A state dict, or as much of it as the block of the Linear has; of weights only the shape is read."""


def layer_before(tensors: Shapes, name: str) -> str | None:
    """The layer whose last rows are the channels of a Linear's input, or pass a factor on to these; None where there is
    none.

    Before qkv and fc1 stands a norm, before proj that of `attn_norm`, else the rows of v; before fc2 that of
    `mlp_norm`, else of SwiGLU the value that is multiplied with its gate: `silu(g) (x / s) = (silu(g) x) / s`. Other
    activations let no factor through.
    """
    block = name.rsplit(".", 2)[0]
    if name.endswith("qkv"):
        return f"{block}.norm1"
    if name.endswith("proj"):
        return f"{block}.attn.norm" if f"{block}.attn.norm.weight" in tensors else f"{block}.attn.qkv"
    if name.endswith("fc1"):
        return f"{block}.norm2"
    if f"{block}.mlp.norm.weight" in tensors:
        return f"{block}.mlp.norm"
    return f"{block}.mlp.fc1" if is_gated(tensors, block) else None


def is_gated(tensors: Shapes, block: str) -> bool:
    """Whether the MLP's first layer is twice as wide as what its second reads, as SwiGLU's."""
    first, second = (tensors.get(f"{block}.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def layers_read(tensors: Shapes, name: str) -> list[str]:
    """The layers whose weights say how large the input of a Linear is: the one before it, and the norm before that;
    none where nothing takes a division.
    """
    before = layer_before(tensors, name)
    if before is None:
        return []
    further = layer_before(tensors, before) if before.endswith(("qkv", "fc1")) else None
    return [before] if further is None else [before, further]
