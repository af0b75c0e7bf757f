"""A penalty on heavy tails: one range has to hold a whole tensor, so a few large numbers leave coarse steps to all
others.

Kurtosis regularisation of activations beside quantisation-aware training, Nrusimha et al. 2024:
https://arxiv.org/abs/2404.03605 Kurtosis as a measure of how well a tensor can be rounded, Shkolnik et al. 2020:
https://arxiv.org/abs/2002.07686
"""

from __future__ import annotations

import math

from torch import Tensor

NORMAL = 3.0
"""Kurtosis of a normal distribution."""

_LEAST = 1e-15
"""Variance of a tensor that counts as constant; its square is still a float32."""


def tail_penalty(values: Tensor) -> Tensor:
    """By how much the logarithm of the kurtosis of all numbers is above a normal distribution's, a float32 scalar; 0
    where it is not.

    The authors add up kurtosis itself; its logarithm lets a layer of 300 not drown one of 10.
    """
    values = values.float()
    squares = (values - values.mean()).square()
    kurtosis = squares.square().mean().clamp(min=_LEAST**2).log() - 2 * squares.mean().clamp(min=_LEAST).log()
    return (kurtosis - math.log(NORMAL)).relu()
