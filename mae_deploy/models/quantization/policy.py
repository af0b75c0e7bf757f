"""How a model's Linears are made ready and which ranges their inputs get: what an export does, and what a student is
trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mae_deploy.models.quantization.activations import ActivationStats, activation_scales
from mae_deploy.models.quantization.histogram import Method
from mae_deploy.models.quantization.rounding import INT8, Rounding
from mae_deploy.models.quantization.smoothing import Divisors, assumed_absmax, smoothing_divisors


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What decides about smoothing and ranges. The defaults are those of `mae-deploy export`."""

    static: bool
    """Whether the inputs of Linears have ranges that are known beforehand; else they are found at run time."""
    smooth_alpha: float | None = 0.5
    """SmoothQuant's alpha; None: no smoothing."""
    method: Method = "mse"
    """How static ranges are chosen."""
    percentile: float = 99.99
    """Share of the values within the range, for the method percentile."""
    rounding: Rounding = INT8

    def divisors(
        self, tensors: Mapping[str, Tensor], names: Sequence[str], stats: Mapping[str, ActivationStats] | None
    ) -> Divisors:
        """What the channels of the inputs are divided by first.

        Args:
            tensors: the model's state dict.
            names: the Linears.
            stats: of their inputs; None where nothing was measured: by the weights alone.
        """
        if self.smooth_alpha is None:
            return {}
        absmax = {name: stats[name].absmax for name in names} if stats else assumed_absmax(tensors, names)
        return smoothing_divisors(tensors, absmax, self.smooth_alpha)

    def scales(self, names: Sequence[str], stats: Mapping[str, ActivationStats]) -> dict[str, float | None]:
        """For each Linear the scale of its input, or None for a range found at run time.

        Args:
            stats: of the inputs after the division; not read where ranges are found at run time.
        """
        if not self.static:
            return dict.fromkeys(names)
        found = activation_scales(stats, self.method, self.percentile, self.rounding)
        return {name: found[name] for name in names}


_FUSED_HEAD_DIMS = (16, 32, 64)


_FUSED_TOKENS = 512


def reason_against_int8_attention(head_dim: int, num_tokens: int) -> str | None:
    """Why no engine fuses INT8 attention of this shape (TensorRT's conditions), or None if one can.

    Args:
        num_tokens: the largest T, CLS included.
    """
    if head_dim not in _FUSED_HEAD_DIMS:
        return (
            f"the head dimension is {head_dim}; INT8 attention is fused for {', '.join(map(str, _FUSED_HEAD_DIMS))}"
            " only"
        )
    if num_tokens > _FUSED_TOKENS:
        return f"there are up to {num_tokens} tokens; INT8 attention is fused up to {_FUSED_TOKENS}"
    return None
