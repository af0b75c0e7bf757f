"""Ranges from histograms that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mae_deploy.images.read import Array
from mae_deploy.models.quantization.histogram import Histogram, Method

METHODS: tuple[Method, ...] = ("mse", "minmax", "percentile", "entropy")


def histogram(values: Array, limit: float, bins: int = 2048) -> Histogram:
    counts, _ = np.histogram(np.abs(values), bins, range=(0, limit))
    return Histogram(counts.astype(np.float64), limit)


def test_minmax_takes_the_largest_magnitude() -> None:
    assert Histogram(np.eye(1, 128)[0], 5.0).threshold("minmax") == 5.0


def test_percentile_cuts_between_bins_and_within_one() -> None:
    counts = np.zeros(128)
    counts[[0, 10, 127]] = 50, 40, 10
    found = Histogram(counts, 12.8)
    assert found.threshold("percentile", 50) == pytest.approx(0.1)
    assert found.threshold("percentile", 70) == pytest.approx(1.05)
    assert found.threshold("percentile", 90) == pytest.approx(1.1)
    assert found.threshold("percentile", 100) == pytest.approx(12.8)


def test_mse_weighs_clipping_against_rounding() -> None:
    """n values evenly over 0 to 1 and m at 2: a range t between has the error n t² / (12 * 127²) + m (2 - t)², least at
    t = 2 / (1 + n / (12 * 127² m)).
    """
    n, m = 500_000, 5
    counts = np.zeros(8192)
    counts[:4096] = n / 4096
    counts[-1] = m
    expected = 2 / (1 + n / (m * 12 * 127**2))
    assert Histogram(counts, 2.0).threshold("mse") == pytest.approx(expected, rel=0.03)  # candidates lie 2.6 % apart
    counts[-1] = 0.01
    assert Histogram(counts, 2.0).threshold("mse") == pytest.approx(
        1.0, rel=0.03
    )  # below 1 it is the evenly spread that is clipped


def test_mse_keeps_everything_where_integers_fit() -> None:
    """All magnitudes are multiples of the step that the whole range gives, to the width of a bin."""
    counts = np.zeros(127 * 128)
    counts[127::128] = counts[128::128] = 1
    assert Histogram(counts, 127.0).threshold("mse") == 127.0


def test_entropy_of_a_normal_distribution_clips_its_tail() -> None:
    values = np.random.default_rng(0).standard_normal(400_000)
    found = histogram(values, float(np.abs(values).max()))
    assert 3 < found.threshold("entropy") < found.limit


def test_entropy_is_the_textbook_search() -> None:
    """Each candidate as a loop over its bins, as TensorRT's calibrator is described."""
    values = np.random.default_rng(1).laplace(size=200_000)
    found = histogram(values, float(np.abs(values).max()), 256)
    counts, best = found.counts, (np.inf, 0)
    for end in range(256, 127, -8):
        p = counts[:end].copy()
        p[-1] += counts[end:].sum()
        q = np.zeros(end)
        for level in range(128):
            members = [index for index in range(end) if index * 128 // end == level and counts[index] > 0]
            for index in members:
                q[index] = sum(counts[index] for index in members) / len(members)
        if (q[p > 0] > 0).all():
            p, q = p / p.sum(), q / q.sum()
            best = min(best, (float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))), -end))
    assert found.threshold("entropy") == pytest.approx(-best[1] * found.limit / 256)
    assert -best[1] < 256


@pytest.mark.parametrize("method", METHODS)
def test_ranges_scale_with_the_values(method: Method) -> None:
    values = np.random.default_rng(2).laplace(size=5000)
    limit = float(np.abs(values).max())
    small, large = (histogram(values * factor, limit * factor).threshold(method, 99) for factor in (1, 1024))
    assert large == pytest.approx(1024 * small)
    assert 0 < small <= limit


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros_has_no_range(method: Method) -> None:
    assert Histogram(np.zeros(8192), 0.0).threshold(method) == 0
