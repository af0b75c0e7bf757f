"""How large the largest integer is: an activation's range, chosen from the histogram of its magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mae_deploy.images.read import Array

Method = Literal["mse", "minmax", "percentile", "entropy"]

LEVELS = 128
"""Magnitudes of a symmetric int8: 0 to 127."""

_SMALLEST = 1 / 64
"""The least share of the range that mse tries."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Magnitudes in n equal bins from 0 to `limit`."""

    counts: Array
    """float64 `(n,)`, n a multiple of 128."""
    limit: float
    """The largest magnitude."""

    def threshold(self, method: Method, percentile: float = 99.99) -> float:
        """The magnitude that the largest integer stands for; what is larger is clipped.

        minmax: the largest magnitude. percentile: so many per cent are within. mse: the least squared error of rounding
            and clipping together.
        entropy: the least KL divergence of the rounded distribution from the original one, as in TensorRT's calibrator.
        """
        if method == "minmax" or self.counts.sum() == 0:
            return self.limit
        if method == "percentile":
            return self._percentile(percentile)
        return self._least_squares() if method == "mse" else self._least_divergence()

    def _percentile(self, percentile: float) -> float:
        cumulative = np.cumsum(self.counts)
        wanted = percentile / 100 * cumulative[-1]
        full = int(np.searchsorted(cumulative, wanted))  # bins that are within as a whole; of the next one, a part
        part = (wanted - (cumulative[full] - self.counts[full])) / self.counts[full]
        return float((full + part) * self.limit / len(self.counts))

    def _least_squares(self) -> float:
        n = len(self.counts)
        occupied = self.counts > 0
        centres, counts = ((np.arange(n) + 0.5) * self.limit / n)[occupied], self.counts[occupied]

        def error(threshold: float) -> float:
            step = threshold / (LEVELS - 1)
            rounded = np.rint(centres / step).clip(max=LEVELS - 1) * step
            return float(counts @ np.square(centres - rounded))

        return _least(error, self.limit * np.geomspace(1, _SMALLEST, 161))

    def _least_divergence(self) -> float:
        n = min(len(self.counts), 16 * LEVELS)
        counts = self.counts.reshape(n, -1).sum(axis=1)

        def divergence(end: float) -> float:
            kept = counts[: int(end)]
            level = np.arange(len(kept)) * LEVELS // len(kept)
            held = np.bincount(level, kept, LEVELS) / np.maximum(np.bincount(level, kept > 0, LEVELS), 1)
            clipped = kept.copy()
            clipped[-1] += counts[len(kept) :].sum()
            return _divergence(clipped, np.where(kept > 0, held[level], 0))

        ends = np.arange(n, LEVELS - 1, -8)
        return _least(divergence, ends.astype(np.float64)) * self.limit / n


def _least(score: Callable[[float], float], candidates: Array) -> float:
    """The candidate of the least score; of equals, the first."""
    return float(candidates[int(np.argmin([score(float(candidate)) for candidate in candidates]))])


def _divergence(p: Array, q: Array) -> float:
    """KL(p, q) of two histograms, normalised here; infinite where q rules out what p has."""
    if q.sum() == 0 or ((p > 0) & (q == 0)).any():
        return float("inf")
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    return float(p @ np.log(p / q))
