"""The comparator itself: hand-computed values, and outputs that are wrong in every way that must not pass."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import Array
from mae_deploy.runtime.parity import Comparison, Tolerance, compare
from tests.runtime.tiny_bundle import N, golden_inputs, reference

B, S, D = 5, 7, 13
FP32 = Tolerance()


def features(seed: int = 0, shape: tuple[int, ...] = (B, S, D)) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_identical_arrays_pass_and_are_plain_json() -> None:
    result = compare(features(), features(), "tokens")
    assert (result.max_abs, result.max_relative, result.sqnr_db) == (0, 0, math.inf)
    assert result.cosine == pytest.approx(1, abs=1e-15)
    assert result.centred_cosine == pytest.approx(1, abs=1e-15)
    assert result.failures(Tolerance(cosine=0.999999, max_abs=0, centred_cosine=0.999999, sqnr_db=200)) == []
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["sqnr_db"] is None
    assert record["reason"] is None


def test_hand_computed() -> None:
    expected = np.array([[3.0, 4.0], [5.0, 0.0]])
    found = np.array([[4.0, 3.0], [5.0, 0.0]])
    result = compare(expected, found, "logits")
    assert result.cosine == pytest.approx(24 / 25)
    assert result.max_abs == 1
    assert result.max_relative == pytest.approx(1 / 5)
    assert result.sqnr_db == pytest.approx(10 * math.log10(50 / 2))
    # The reference's mean is (4, 2): the first sample is (-1, 2) and becomes (0, 1), the second stays (1, -2).
    assert result.centred_cosine == pytest.approx(2 / math.sqrt(5))
    assert result.top1_agreement == 0.5


def test_top1_is_for_logits_only() -> None:
    assert compare(features(), features(), "cls").top1_agreement is None
    agreeing = compare(features(shape=(B, D)), features(shape=(B, D)), "logits")
    assert agreeing.top1_agreement == 1
    shifted = compare(features(shape=(B, D)), np.roll(features(shape=(B, D)), 1, axis=1), "logits")
    assert shifted.top1_agreement == 0
    assert "logits: top1_agreement 0 is below 0.99" in shifted.failures(Tolerance(cosine=1e-9, max_abs=1e9, top1_agreement=0.99))


def test_float32_rounding_passes() -> None:
    expected = features()
    assert compare(expected, expected + np.float32(1e-6), "tokens").passes(FP32)


def test_the_limits_are_inclusive_and_bind() -> None:
    expected = np.ones((2, 3))
    found = expected + 0.25
    assert compare(expected, found, "cls").passes(Tolerance(max_abs=0.25))
    assert compare(expected, found, "cls").failures(Tolerance(max_abs=0.2)) == ["cls: max_abs 0.25 is above 0.2"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "output"])
def test_one_value_that_is_not_finite_fails_any_tolerance(value: float, side: str) -> None:
    clean, broken = features(), features()
    broken[3, 2, 1] = value
    result = compare(broken, clean, "tokens") if side == "reference" else compare(clean, broken, "tokens")
    assert not result.passes(Tolerance(cosine=1e-9, max_abs=1e300))
    assert result.reason == f"the {side} has 1 NaN or infinite values"
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["cosine"] is None


def test_the_same_nan_on_both_sides_is_no_agreement() -> None:
    broken = features()
    broken[0, 0, 0] = np.nan
    assert not compare(broken, broken.copy(), "tokens").passes(FP32)


def test_values_whose_squares_overflow_fail() -> None:
    huge = np.full((2, 3), 1e200)
    assert compare(huge, huge, "cls").reason == "the reference has 6 NaN or infinite values"


def test_float16_overflow_fails() -> None:
    expected = np.full((2, 3), 70000.0, np.float32)
    with np.errstate(over="ignore"):
        overflown = expected.astype(np.float16)
    assert not compare(expected, overflown, "cls").passes(Tolerance(max_abs=1e9))


@pytest.mark.parametrize("shape", [(B, D, S), (S, B, D), (B, S * D), (B, S, D, 1), (1, S, D), (B, S, 1), ()])
def test_another_shape_fails_and_is_not_broadcast(shape: tuple[int, ...]) -> None:
    result = compare(features(), np.ones(shape), "tokens")
    assert not result.passes(FP32)
    assert "shape" in (result.reason or "")


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), ()])
def test_nothing_to_compare_fails(shape: tuple[int, ...]) -> None:
    assert not compare(np.ones(shape), np.ones(shape), "cls").passes(FP32)


@pytest.mark.parametrize("dtype", [object, "U1", np.complex64])
def test_what_is_no_number_fails(dtype: object) -> None:
    result = compare(np.ones((2, 3)), np.ones((2, 3)).astype(dtype), "cls")  # type: ignore[call-overload]
    assert "not numbers" in (result.reason or "")


def test_transposed_tokens_of_one_shape_fail() -> None:
    square = features(shape=(B, D, D))
    assert not compare(square, square.transpose(0, 2, 1), "tokens").passes(FP32)


@pytest.mark.parametrize("order", [[1, 0, 2, 3, 4], [4, 3, 2, 1, 0], [1, 2, 3, 4, 0]])
def test_a_shuffled_batch_fails(order: list[int]) -> None:
    assert not compare(features(), features()[order], "tokens").passes(FP32)


def test_two_swapped_tokens_of_one_sample_fail() -> None:
    found = features()
    found[2, [3, 4]] = found[2, [4, 3]]
    assert not compare(features(), found, "tokens").passes(FP32)


def test_ids_keep_off_by_one_fail_on_every_output() -> None:
    inputs = golden_inputs(visible=True)
    expected = reference(**inputs)
    found = reference(inputs["images"], (inputs["ids_keep"] + 1) % N)
    assert all(not compare(expected[name], found[name], name).passes(FP32) for name in expected)


def test_one_bad_sample_among_many_is_not_averaged_away() -> None:
    expected = features(shape=(997, D))
    found = expected.copy()
    found[500] = -found[500]
    assert compare(expected, found, "cls").cosine == pytest.approx(-1)


def test_a_scaled_output_has_the_right_cosine_and_fails() -> None:
    result = compare(features(), features() * np.float32(1.1), "tokens")
    assert result.cosine > 0.99999
    assert result.sqnr_db == pytest.approx(20, abs=1e-3)
    assert not result.passes(FP32)


def test_plain_cosine_flatters_where_the_centred_one_does_not() -> None:
    expected = features(shape=(B, D)) * 0.01 + 1
    flattened = np.broadcast_to(expected.mean(axis=0), expected.shape)
    result = compare(expected, flattened, "cls")
    assert result.cosine > 0.999
    assert result.centred_cosine < 0.01
    assert any("centred_cosine" in line for line in result.failures(Tolerance(cosine=0.9, max_abs=1, centred_cosine=0.995)))


def test_a_constant_offset_is_not_centred_away() -> None:
    expected = features(shape=(B, D))
    assert compare(expected, expected + np.float32(0.5), "cls").centred_cosine < 0.95


@pytest.mark.parametrize("samples", [1, 3])
def test_without_variance_the_centred_cosine_is_the_plain_one(samples: int) -> None:
    expected = np.repeat(features(shape=(1, D)), samples, axis=0)
    found = expected + np.float32(0.1)
    result = compare(expected, found, "cls")
    assert result.centred_cosine == result.cosine
    assert 0 < result.cosine < 1


@pytest.mark.parametrize(
    ("expected", "found", "cosine"),
    [([0.0, 0.0], [0.0, 0.0], 1.0), ([0.0, 0.0], [1.0, 0.0], 0.0), ([1.0, 0.0], [0.0, 0.0], 0.0)],
    ids=["both", "reference", "output"],
)
def test_zero_vectors(expected: list[float], found: list[float], cosine: float) -> None:
    result = compare(np.array([expected]), np.array([found]), "cls")
    assert (result.cosine, result.centred_cosine) == (cosine, cosine)
    assert result.passes(FP32) == (cosine == 1)


def test_an_all_zero_output_fails() -> None:
    result = compare(features(), np.zeros_like(features()), "tokens")
    assert (result.cosine, result.sqnr_db) == (0, 0)
    assert not result.passes(FP32)


def test_noise_where_the_reference_is_zero() -> None:
    result = compare(np.zeros((2, 3)), np.full((2, 3), 1e-6), "cls")
    assert (result.max_relative, result.sqnr_db) == (math.inf, -math.inf)
    assert result.failures(Tolerance(cosine=1e-9, sqnr_db=30))


def test_float16_is_compared_in_float64() -> None:
    expected = np.full((2, 3), 0.1, np.float32)
    assert compare(expected, expected.astype(np.float16), "cls").max_abs == pytest.approx(abs(float(np.float16(0.1)) - float(np.float32(0.1))), rel=1e-12)


def test_a_comparison_without_measures_passes_nothing() -> None:
    assert len(Comparison(name="cls").failures(Tolerance(cosine=1e-9, max_abs=1e9))) == 2


@pytest.mark.parametrize(("cosine", "max_abs"), [(0, 1), (1.1, 1), (math.nan, 1), (1, -1), (1, math.inf), (1, math.nan)])
def test_tolerances_that_judge_nothing_are_refused(cosine: float, max_abs: float) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        Tolerance(cosine=cosine, max_abs=max_abs)


def test_a_tolerance_is_written_without_what_it_does_not_judge() -> None:
    assert Tolerance(sqnr_db=30).to_dict() == {"cosine": 0.99999, "max_abs": 1e-4, "sqnr_db": 30}
