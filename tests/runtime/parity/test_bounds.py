"""Intervals against SciPy's, and how often the gates that use them err."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binomtest, t

from mae_deploy.runtime.parity.bounds import (
    difference_interval,
    images_needed,
    images_to_show,
    mcnemar,
    mean_interval,
    ratio_interval,
    share_interval,
)
from mae_deploy.runtime.parity.certificate import Classes, Speed
from mae_deploy.runtime.timing import Timing

PLANTED = 500


@pytest.mark.parametrize("total", [1, 7, 128, 20_011])
def test_shares_are_those_of_clopper_and_pearson(total: int) -> None:
    for count in {0, 1, total // 3, total - 1, total}:
        low, high = share_interval(count, total)
        assert low == pytest.approx(beta.ppf(0.025, count, total - count + 1) if count else 0, abs=1e-9)
        assert high == pytest.approx(beta.ppf(0.975, count + 1, total - count) if count < total else 1, abs=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 11, 30])
def test_the_interval_of_a_mean_is_students(seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(50, 3, seeds)
    expected = t.interval(0.95, seeds - 1, values.mean(), values.std(ddof=1) / seeds**0.5)
    assert mean_interval(list(values)) == pytest.approx(expected)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 9), (9, 3), (7, 7), (0, 11), (40, 13)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_the_difference_is_bounded_by_both_shares() -> None:
    low, high = difference_interval(5, 2, 1000)
    assert high == pytest.approx(beta.ppf(0.9925, 6, 995) - beta.ppf(0.0175, 2, 999))
    assert difference_interval(2, 5, 1000) == pytest.approx((-high, -low))


@pytest.mark.parametrize("limit", [0.002, 0.01, 0.3])
def test_as_many_images_as_are_needed_and_not_one_less(limit: float) -> None:
    needed = images_needed(limit)
    assert needed is not None
    assert difference_interval(0, 0, needed)[1] <= limit < difference_interval(0, 0, needed - 1)[1]
    assert images_needed(0) is None
    assert [images_needed(1), images_needed(1.5)] == [1, 1]


def test_how_many_more_images_would_do() -> None:
    assert difference_interval(3, 2, 400)[1] > 0.01
    needed = images_to_show(0.01, 3, 2, 400)
    assert needed is not None
    assert difference_interval(round(3 * needed / 400), round(2 * needed / 400), needed)[1] <= 0.01
    assert images_to_show(0.01, 8, 0, 400) is None
    # Of none lost 487 are needed; the first of 2, 3, 4, 6, 8, 12 … times as many that shows it.
    assert [images_to_show(0.01, 0, 0, total) for total in (244, 200, 122, 90, 61, 41)] == [
        488,
        600,
        488,
        540,
        488,
        492,
    ]
    # 4 and 8 of 100 are 8 and 16 of 200, which may be a loss of 4.3 points, and 12 and 24 of 300, of 2.6.
    assert images_to_show(0.03, 4, 8, 100) == 300


def test_a_ratio_of_medians_is_bounded_by_rounds_drawn_again() -> None:
    """What slows a round slows both calls, and does not widen the interval."""
    noise = np.random.default_rng(1).lognormal(0, 0.5, 31)
    together = ratio_interval(Timing(tuple(0.7 * noise)), Timing(tuple(noise)))
    assert together == pytest.approx((0.7, 0.7))
    low, high = ratio_interval(Timing(tuple(0.7 * noise)), Timing(tuple(np.roll(noise, 1))))
    assert low < 0.7 < high


# --- how often a gate errs -------------------------------------------------------------------------------------------


def accepted(rates: tuple[float, float], images: int, max_drop: float, *, labelled: bool = True) -> int:
    """How many of 500 quantisations with these rates of images lost and gained pass the gate on so many images."""
    drawn = np.random.default_rng(0).multinomial(images, (*rates, 1 - sum(rates)), size=PLANTED)
    outcomes, counts = np.unique(drawn, axis=0, return_counts=True)
    passed = 0
    for (lost, gained, _), count in zip(outcomes, counts, strict=True):
        reference, found, right = np.zeros((3, images), np.int64)
        found[:lost] = 1
        reference[lost : lost + gained] = 1
        classes = Classes(reference, found, right if labelled else None)
        passed += int(count) * classes.rule(max_drop).passed
    return passed


@pytest.mark.parametrize(
    ("lost", "gained", "images", "max_drop"),
    [
        (0.0105, 0.0, 974, 1.0),  # just beyond the budget, where a mean accepts every other one
        (0.0155, 0.005, 974, 1.0),
        (0.021, 0.0, 1500, 2.0),
        (0.0501, 0.0, 192, 5.0),
    ],
)
def test_bad_quantisations_do_not_pass(lost: float, gained: float, images: int, max_drop: float) -> None:
    assert accepted((lost, gained), images, max_drop) <= PLANTED // 100


def test_nor_without_labels() -> None:
    assert accepted((0.0105, 0.0), 974, 1.0, labelled=False) <= PLANTED // 100


@pytest.mark.parametrize(("rate", "images"), [(0.0, 487), (0.001, 974), (0.003, 2500)])
def test_good_ones_do(rate: float, images: int) -> None:
    assert accepted((rate, rate), images, 1.0) >= 0.9 * PLANTED


@pytest.mark.parametrize(("truth", "most", "least"), [(1.02, 1, 0), (0.85, 100, 95)])
def test_what_is_slower_does_not_pass_for_faster(truth: float, most: int, least: float) -> None:
    """Rounds that a shared machine slows by up to half, each call of them by 5 %."""
    rng = np.random.default_rng(3)
    passed = 0
    for _ in range(100):
        shared = 1 + 0.5 * rng.random(31) * (rng.random(31) < 0.3)
        mine, other = (shared * rng.lognormal(0, 0.05, 31) for _ in range(2))
        speed = Speed(timing=Timing(tuple(truth * mine)), baseline=Timing(tuple(other)))
        passed += speed.rule(1.0).passed
    assert least <= passed <= most
