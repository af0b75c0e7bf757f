"""What holds of eight-bit numbers, whatever was rounded to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mae_deploy.models.quantization.rounding import (
    FP8,
    INT8,
    INT8_WEIGHTS_7,
    Rounding,
    dynamic_round_trip,
    quantize_weight,
    static_round_trip,
    weight_round_trip,
)

FINITE = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
WEIGHTS = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=FINITE)
ROUNDINGS = pytest.mark.parametrize("rounding", [INT8, INT8_WEIGHTS_7], ids=["int8", "int8-w7"])


@ROUNDINGS
@given(weight=WEIGHTS)
def test_a_weight_is_off_by_half_a_step_of_its_row(rounding: Rounding, weight: np.ndarray) -> None:
    """1e-6 of a step more: the division and the product are rounded, too."""
    stored, scales = quantize_weight(weight, rounding=rounding)
    assert stored.dtype == np.int8
    assert scales.shape == (len(weight),)
    assert np.abs(stored.astype(int)).max() <= rounding.largest_weight
    steps = scales.astype(np.float64)[:, None]
    assert (np.abs(stored * steps - weight) <= steps * (0.5 + 1e-4)).all()


@ROUNDINGS
@given(weight=WEIGHTS)
def test_what_was_rounded_stays(rounding: Rounding, weight: np.ndarray) -> None:
    """1e-6 of each row's largest: its scale is the quotient of what a product was rounded to."""
    once = weight_round_trip(torch.tensor(weight), rounding)
    twice = weight_round_trip(once, rounding)
    assert ((twice - once).abs() <= 1e-6 * once.abs().amax(dim=1, keepdim=True)).all()


@given(weight=WEIGHTS)
def test_signs_and_zeros_stay(weight: np.ndarray) -> None:
    for rounding in (INT8, FP8):
        rounded = weight_round_trip(torch.tensor(weight), rounding).numpy()
        assert (rounded * np.sign(weight) >= 0).all()
        assert (rounded[weight == 0] == 0).all()
        assert np.array_equal(weight_round_trip(torch.tensor(-weight), rounding).numpy(), -rounded)


@given(values=WEIGHTS, scale=st.floats(2.0**-20, 2.0**20, width=32))
def test_static_rounding_is_clamped_and_monotonic(values: np.ndarray, scale: float) -> None:
    rounded = static_round_trip(torch.tensor(values), scale).numpy()
    levels = np.rint(rounded / np.float32(scale))
    assert np.array_equal(levels * np.float32(scale), rounded)
    assert levels.min() >= -128
    assert levels.max() <= 127
    order = np.argsort(values, axis=None, kind="stable")
    assert (np.diff(rounded.flatten()[order]) >= 0).all()
    within = np.abs(values) <= 127 * scale
    assert (np.abs(rounded - values)[within] <= 0.5001 * scale).all()


@given(values=WEIGHTS)
def test_dynamic_rounding_covers_its_range(values: np.ndarray) -> None:
    """One step: the zero point is rounded, which shifts all by up to half a step, and each value by half a step."""
    rounded = dynamic_round_trip(torch.tensor(values)).numpy().astype(np.float64)
    step = (max(values.max(), 0.0) - min(values.min(), 0.0)) / 255
    assert (np.abs(rounded - values) <= step * 1.001).all()
    assert (rounded[values == 0] == 0).all()
