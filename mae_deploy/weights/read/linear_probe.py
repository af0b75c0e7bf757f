"""A linear probe's BatchNorm, folded into the linear layer behind it."""

from __future__ import annotations

from torch import Tensor

from mae_deploy.errors import CheckFailed

EPS = 1e-6
"""Of the original's and mmpretrain's BatchNorm before the head."""


def fold_batch_norm(tensors: dict[str, Tensor], norm: str, linear: str, head: str = "head") -> None:
    """Replace a BatchNorm by its running statistics and a linear layer by one linear layer, in float64.

    `W ((x - mean) / sqrt(var + eps) * g + b) + c = W' x + W (b - mean s) + c` with `s = g / sqrt(var + eps)` and
    `W' = W s`.

    Args:
        norm: its tensors' prefix; it may be without weight and bias, as in a linear probe.
        linear: the layer's prefix.
        head: the prefix of what takes their place.

    Raises:
        CheckFailed: the statistics do not fit the layer.
    """
    tensors.pop(f"{norm}.num_batches_tracked", None)
    taken = [tensors.pop(f"{norm}.{part}", None) for part in ("running_mean", "running_var", "weight", "bias")]
    mean, variance, scale, shift = (None if part is None else part.double() for part in taken)
    weight, bias = (tensors.pop(f"{linear}.{part}", None) for part in ("weight", "bias"))
    if (
        mean is None
        or variance is None
        or weight is None
        or bias is None
        or weight.ndim != 2
        or not mean.shape == variance.shape == weight.shape[1:]
    ):
        raise CheckFailed(f"the BatchNorm {norm} and the linear layer {linear} do not fit each other")
    factor = (variance + EPS).rsqrt()
    if scale is not None:
        factor = factor * scale
    offset = -mean * factor if shift is None else shift - mean * factor
    tensors[f"{head}.weight"] = (weight.double() * factor).float()
    tensors[f"{head}.bias"] = (bias.double() + weight.double() @ offset).float()
