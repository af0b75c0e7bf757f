"""What makes a model easier to round before it is rounded; the FP32 function stays what it is.

SmoothQuant divides the channels of an activation that are too large for a common scale, and multiplies the weights that
read them. Bias correction makes up for the mean error of the rounded weights.
SmoothQuant, Xiao et al. 2023: https://arxiv.org/abs/2211.10438 (equation 4)
Bias correction, Nagel et al. 2019: https://arxiv.org/abs/1906.04721 (section 4.2)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mae_deploy.images.read import Array
from mae_deploy.models.quantization.activations import ActivationStats
from mae_deploy.models.quantization.layers import layer_before, layers_read
from mae_deploy.models.quantization.rounding import INT8, Rounding, rounded_weight

Divisors = dict[str, Array]
"""For each Linear what the channels of its input are divided by, float64 `(D,)`."""

_LEAST = 1e-5
"""Channels that are smaller than this share of the largest count as this large, as in the authors' code."""

_SIGMAS = 4.0
"""Standard deviations within which an activation is taken to lie, where none was measured."""


def assumed_absmax(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Array]:
    """Without calibration: how large the inputs of Linears are by their weights alone, float64 `(D,)` each; those that
    no layer before them takes a division for are passed over.

    What LayerNorm gives is taken as `N(bias, weight²)` in every channel, and v, and SwiGLU's halves, as what follows
    from it.
    """
    return {name: likely_absmax(tensors, name).numpy() for name in names if layer_before(tensors, name)}


def likely_absmax(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The same of one Linear, on the device of the tensors, of which those of `layers_read` are read."""
    before, *norms = layers_read(tensors, name)
    deviation, mean = _weight_and_bias(tensors, norms[0] if norms else before)
    deviation = deviation.abs()
    if norms:
        weight, bias = _weight_and_bias(tensors, before)
        first = 2 * len(bias) // 3 if before.endswith("qkv") else 0  # of v
        weight, bias = weight[first:], bias[first:]
        deviation, mean = (weight * deviation).square().sum(dim=1).sqrt(), weight @ mean + bias
    found = _SIGMAS * deviation + mean.abs()
    # A gate that seems shut by its weights may open for registers: its magnitude counts, not its sign.
    return found.chunk(2)[0] * found.chunk(2)[1] if before.endswith("fc1") else found


def smoothing_divisors(tensors: Mapping[str, Tensor], absmax: Mapping[str, Array], alpha: float) -> Divisors:
    """SmoothQuant's factors, `absmax(x)^alpha / absmax(w)^(1 - alpha)` a channel, with geometric mean 1.

    Args:
        absmax: of the inputs of Linears, `(D,)` each, measured or assumed; those that no layer before them takes a
            division for are passed over.
        alpha: 0 moves all difficulty to the activations, 1 to the weights.
    """
    names = [name for name in absmax if layer_before(tensors, name)]
    return {
        name: smoothing_divisor(tensors[f"{name}.weight"], torch.from_numpy(absmax[name]), alpha).numpy()
        for name in names
    }


def smoothing_divisor(weight: Tensor, absmax: Tensor, alpha: float) -> Tensor:
    """The same of one Linear, `(O, D), (D,) -> (D,)` in float64; nothing waits for the device."""
    columns = weight.abs().amax(dim=0).double()
    used = (absmax > 0) & (columns > 0)
    inputs, columns = (
        torch.where(used, torch.maximum(values, _LEAST * values.max()), 1.0) for values in (absmax, columns)
    )
    logarithm = alpha * inputs.log() - (1 - alpha) * columns.log()  # 0 where nothing comes through
    return torch.where(used, (logarithm - logarithm.sum() / used.sum().clamp(min=1)).exp(), 1.0)


def smooth(tensors: Mapping[str, Tensor], divisors: Divisors) -> dict[str, Tensor]:
    """The state dict with these divisions folded in; it computes the same. Tensors that do not change are shared."""
    smoothed = dict(tensors)
    for name, divisor in divisors.items():
        factor = torch.from_numpy(divisor)
        smoothed[f"{name}.weight"] = _times(smoothed[f"{name}.weight"], factor)
        before = layer_before(tensors, name)
        assert before is not None
        bias, weight = (smoothed[f"{before}.{part}"] for part in ("bias", "weight"))
        rows = torch.cat([torch.ones(len(bias) - len(factor)), factor])  # of norms all, of qkv v, of fc1 the value
        smoothed[f"{before}.bias"] = _times(bias, 1 / rows)
        smoothed[f"{before}.weight"] = _times(weight, 1 / rows.reshape(-1, *[1] * (weight.ndim - 1)))
    return smoothed


def smoothed_stats(stats: Mapping[str, ActivationStats], divisors: Divisors) -> dict[str, ActivationStats]:
    """The statistics that the smoothed state dict would have given."""
    return {**stats, **{name: stats[name].divided_by(divisor) for name, divisor in divisors.items()}}


def bias_corrections(
    tensors: Mapping[str, Tensor], stats: Mapping[str, ActivationStats], rounding: Rounding = INT8
) -> dict[str, Tensor]:
    """For each Linear what its rounded weights take from its output on average, `(W - W_rounded) E[x]`, `(O,)`.

    Args:
        stats: of the same state dict: after smoothing, `smoothed_stats`.

    Raises:
        CheckFailed: a weight that is not finite.
    """
    found = {}
    for name, entry in stats.items():
        weight = tensors[f"{name}.weight"]
        lost = (weight - rounded_weight(weight, f"{name}.weight", rounding)).double() @ torch.from_numpy(entry.mean)
        found[name] = lost.to(weight.dtype)
    return found


def correct_biases(
    tensors: Mapping[str, Tensor], corrections: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """The state dict with the corrections added to the biases of these Linears, those that will be in INT8."""
    return {**tensors, **{f"{name}.bias": tensors[f"{name}.bias"] + corrections[name] for name in names}}


def _weight_and_bias(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """In float64."""
    return tensors[f"{layer}.weight"].double(), tensors[f"{layer}.bias"].double()


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    """In float64, rounded once."""
    return (tensor.double() * factor).to(tensor.dtype)
