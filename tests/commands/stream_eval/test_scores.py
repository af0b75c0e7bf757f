"""Temporal ratios, the probe and average precision against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest

from mae_deploy.commands.stream_eval.scores import Probe, Signal, average_precision, decibels


def test_energy_is_the_mean_deviation_from_the_mean() -> None:
    rng = np.random.default_rng(0)
    # A large constant, which loses all digits where squares are subtracted from squares in float32.
    frames = (1000 + rng.normal(size=(7, 3, 5))).astype(np.float32)
    signal = Signal()
    for frame in frames:
        signal.add({"tokens": frame})
    expected = np.square(frames - frames.mean(axis=0)).sum(axis=(1, 2)).mean()
    assert signal.energy("tokens") == pytest.approx(expected, rel=1e-4)
    assert signal.names == ["tokens"]


@pytest.mark.parametrize(("signal", "error", "expected"), [(1, 1, 0), (1, 0.1, 10), (1, 0, 99), (0, 1, -99)])
def test_decibels(signal: float, error: float, expected: float) -> None:
    assert decibels(signal, error) == pytest.approx(expected)


def test_average_precision() -> None:
    labels = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3.0, 2.0, 1.0]), labels) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.zeros(4), labels) == pytest.approx(0.5)  # no order at all: the share of positives
    assert average_precision(np.array([4.0, 1.0, 3.0, 2.0]), labels) == 1
    assert average_precision(np.zeros(4), np.zeros(4, bool)) is None


def test_the_probe_finds_a_direction_and_can_be_made_again() -> None:
    rng = np.random.default_rng(0)
    direction, probe = rng.normal(size=11), Probe()
    for _ in range(3):
        tokens = rng.normal(size=(50, 11)) + 5
        probe.add(tokens, (tokens - 5) @ direction > 1)
    probe.fit()
    tokens = rng.normal(size=(200, 11)) + 5
    labels = (tokens - 5) @ direction > 1
    assert (average_precision(probe.scores(tokens), labels) or 0) > 0.95
    np.testing.assert_array_equal(Probe(np.array(probe.weights.tolist())).scores(tokens), probe.scores(tokens))
