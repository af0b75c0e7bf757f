"""How far a measured figure may be from the truth: exact intervals of shares and of the difference of two classifiers
on the same images, of the mean over a few seeds, and the bootstrap of a ratio of latencies. NumPy alone, as a device
has no SciPy.

Clopper and Pearson 1934: https://doi.org/10.1093/biomet/26.4.404; McNemar 1947: https://doi.org/10.1007/BF02295996;
Efron 1979: https://doi.org/10.1214/aos/1176344552
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.timing import Timing

CONFIDENCE = 0.95
"""Of every interval: in at least so many of 100 repetitions it holds the truth."""

_UPPER, _LOWER = 0.15, 0.35
"""Of a difference, the parts of what is left to chance that the upper end of the one share and the lower end of the
other have, on each side: so a loss without gains is taken for a smaller one in less than 1 of 100 cases."""

_RESAMPLES = 2000

Interval = tuple[float, float]
"""The lower and the upper end."""


def share_interval(count: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Clopper's and Pearson's interval of the share of which `count` of `total` independent images are."""
    tail = (1 - confidence) / 2
    return _lower(count, total, tail), _upper(count, total, tail)


def difference_interval(lost: int, gained: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """By how much the share of right answers falls: `lost - gained` of `total` images, which both classifiers saw.

    Only images count that one of the two has right and the other wrong. Both shares are bounded by Clopper and Pearson,
    and all bounds hold together with the confidence, whatever the shares are and however they depend on one another
    (Bonferroni).
    """
    upper, lower = _UPPER * (1 - confidence), _LOWER * (1 - confidence)
    return (
        _lower(lost, total, lower) - _upper(gained, total, upper),
        _upper(lost, total, upper) - _lower(gained, total, lower),
    )


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided probability of a split as uneven as this where both classifiers are right equally often."""
    total = lost + gained
    return min(1.0, 2 * _at_most(_log_ways(min(lost, gained), total), total, 0.5)) if total else 1.0


def images_needed(limit: float) -> int | None:
    """The least number of images with which a `difference_interval` of at most `limit` can be shown, if not one of them
    is lost; None where no number can.
    """
    if limit <= 0:
        return None
    return math.ceil(math.log(_UPPER * (1 - CONFIDENCE)) / math.log1p(-limit)) if limit < 1 else 1


def images_to_show(limit: float, lost: int, gained: int, total: int) -> int | None:
    """About how many images would show that the difference is at most `limit`, were the shares to stay what they are on
    these; None where more do not help.
    """
    more = (total * factor for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128))
    scaled = ((number, round(lost * number / total), round(gained * number / total)) for number in more)
    return next((n for n, b, c in scaled if difference_interval(b, c, n)[1] <= limit), None)


def ratio_interval(timing: Timing, baseline: Timing, confidence: float = CONFIDENCE) -> Interval:
    """The bootstrap's interval of `timing.ratio(baseline)`: rounds are drawn again, both calls of a round together, as
    what slows the machine slows both.

    Raises:
        ValueError: the two were not timed in the same rounds.
    """
    pairs = np.array([timing.seconds, baseline.seconds])
    rounds = np.random.default_rng(0).integers(0, pairs.shape[1], (_RESAMPLES, pairs.shape[1]))
    mine, other = np.median(pairs[:, rounds], axis=2)
    low, high = np.quantile(mine / other, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's interval of the mean of what a few seeds gave; of one seed there is none.

    Raises:
        ValueError: fewer than two values.
    """
    mean = statistics.fmean(values)
    half = _student(len(values) - 1, confidence) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _student(degrees: int, confidence: float) -> float:
    """Student's t of which that share is between -t and t: bisection of its closed form (Abramowitz and Stegun 26.7.3
    and 26.7.4).
    """

    def share(angle: float) -> float:
        sine, cosine = math.sin(angle), math.cos(angle)
        term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
        for power in range(2 + degrees % 2, degrees + 1, 2):
            total += term
            term *= cosine**2 * (power - 1) / power
        return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _lower(count: int, total: int, tail: float) -> float:
    return 1 - _upper(total - count, total, tail)


def _upper(count: int, total: int, tail: float) -> float:
    """The share at which `count` or fewer of `total` have the probability `tail`, rounded up: bisection."""
    if count >= total:
        return 1.0
    ways, low, high = _log_ways(count, total), 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(ways, total, middle) > tail else (low, middle)
    return high


def _at_most(ways: Array, total: int, share: float) -> float:
    """The probability of as many of `total` as `ways` counts, or fewer, each with the probability `share`, strictly
    between 0 and 1.
    """
    found = np.arange(len(ways))
    logs = ways + found * math.log(share) + (total - found) * math.log1p(-share)
    most = logs.max()
    return float(np.exp(most) * np.exp(logs - most).sum())


def _log_ways(count: int, total: int) -> Array:
    """The logarithms of in how many ways 0 to `count` of `total` are chosen, float64 `(1 + count,)`."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    found = np.arange(count + 1)
    ways: Array = logs[total] - logs[found] - logs[total - found]
    return ways
