"""The comparator itself: hand-computed values, and outputs that are wrong in every way that must not pass."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.images.read import Array
from mae_deploy.runtime.parity.compare import Comparison, compare
from mae_deploy.runtime.tolerance import TOLERANCES, Tolerance
from tests.runtime.tiny_bundle import N, golden_inputs, reference

B, S, D = 5, 7, 13
FP32 = TOLERANCES["fp32"]


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


def softmax(logits: Array) -> Array:
    exponents = np.exp(logits)
    shares: Array = exponents / exponents.sum(axis=1, keepdims=True)
    return shares


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
    assert shifted.failures(Tolerance(cosine=1e-9, top1_agreement=0.99))[1:] == [
        "logits: top1_agreement 0 is below 0.8"
    ]


def test_probabilities_are_compared_as_their_logits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (B, D))
    found = logits + rng.normal(0, 0.05, (B, D))
    centred = [values - values.mean(axis=1, keepdims=True) for values in (logits, found)]
    as_logits = compare(centred[0], centred[1], "logits")
    as_probs = compare(softmax(logits), softmax(found).astype(np.float32), "probs")
    assert as_probs.sqnr_db == pytest.approx(as_logits.sqnr_db, abs=0.01)
    assert as_probs.max_abs == pytest.approx(as_logits.max_abs, rel=1e-3)
    assert as_probs.top1_agreement == as_logits.top1_agreement
    # A sure classifier that is no more sure is found, though 0.99 and 0.5 are near as logarithms.
    sure, unsure = np.full((B, 1000), 1e-9), np.full((B, 1000), 1e-9)
    sure[:, 3], unsure[:, 3], unsure[:, 4] = 1, 0.51, 0.49
    assert compare(sure, unsure, "probs").sqnr_db < 10
    # What FP16 cannot hold makes no difference.
    small = np.full((B, 1000), 1e-7)
    small[:, 3] = 1
    assert compare(sure, small, "probs").sqnr_db > 100
    assert not compare(softmax(logits), logits, "probs").passes(Tolerance(cosine=0.99))


@pytest.mark.parametrize(
    ("samples", "differ", "limit", "passes"),
    [(8, 1, 0.99, True), (8, 2, 0.99, False), (8, 1, 1, False), (300, 3, 0.99, True), (300, 4, 0.99, False)],
)
def test_one_of_few_samples_may_have_another_class(samples: int, differ: int, limit: float, passes: bool) -> None:
    expected = np.tile([2.0, 1.0], (samples, 1))
    found = expected.copy()
    found[:differ] = [1.0, 2.0]
    assert compare(expected, found, "logits").passes(Tolerance(max_abs=1, top1_agreement=limit)) == passes


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
    assert any(
        "centred_cosine" in line for line in result.failures(Tolerance(cosine=0.9, max_abs=1, centred_cosine=0.995))
    )


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
    assert compare(expected, expected.astype(np.float16), "cls").max_abs == pytest.approx(
        abs(float(np.float16(0.1)) - float(np.float32(0.1))), rel=1e-12
    )


def test_a_comparison_without_measures_passes_nothing() -> None:
    assert len(Comparison(name="cls").failures(Tolerance(cosine=1e-9, max_abs=1e9))) == 2


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *(("cosine", limit) for limit in (0, 1.1, math.nan)),
        *(("centred_cosine", limit) for limit in (-1, 1.1)),
        *(("max_abs", limit) for limit in (-1, math.inf, math.nan)),
        ("max_relative", -1),
        ("sqnr_db", math.inf),
        ("top1_agreement", 0),
    ],
)
def test_limits_that_judge_nothing_are_refused(name: str, limit: float) -> None:
    with pytest.raises(ConfigError, match=f"tolerance: {name} {limit}"):
        Tolerance(**{"max_abs": 1.0, name: limit})


def test_a_tolerance_must_judge_every_output() -> None:
    for limits in ({}, {"top1_agreement": 0.99}):
        with pytest.raises(ConfigError, match="no measure covers every output"):
            Tolerance(**limits)


def test_a_tolerance_is_written_without_what_it_does_not_judge() -> None:
    assert Tolerance(sqnr_db=30, max_abs=0).to_dict() == {"sqnr_db": 30, "max_abs": 0}


@pytest.mark.parametrize(
    ("scale", "error", "passes"), [(1500, 1e-3, True), (1500, 2e-2, False), (1e-6, 1e-7, True), (1, 2e-4, False)]
)
def test_an_absolute_and_a_relative_limit_must_both_be_missed(scale: float, error: float, passes: bool) -> None:
    """The error is far below 1e-5 of 1,500, where float32 ends at 1e-4; and far below 1e-4 where the values are
    tiny.
    """
    expected = np.array([[scale, scale / 2]])
    result = compare(expected, expected + error * np.array([1, 0]), "block_3")
    assert (result.failures(Tolerance(max_abs=1e-4, max_relative=1e-5)) == []) == passes
    if not passes:
        assert result.failures(Tolerance(max_abs=1e-4, max_relative=1e-5)) == [
            f"block_3: max_abs {error:.3g} is above 0.0001 and max_relative {error / scale:.3g} is above 1e-05"
        ]


# --- padding and flat samples ----------------------------------------------------------------------------------------


def ragged_tokens(lengths: tuple[int, ...] = (7, 1, 4, 3, 7)) -> tuple[Array, Array]:
    """Tokens `(B, S, D)` with zeros behind each row's end, and which of them are real."""
    real = np.arange(S) < np.array(lengths)[:, None]
    return (features() + 1) * real[..., None], real


def test_padding_does_not_flatter_the_centred_cosine() -> None:
    """One token of one sample is garbage, and six are zero on both sides: less a mean they would still agree."""
    expected, _ = ragged_tokens()
    found = expected.copy()
    found[1, 0] = features(9)[1, 0]
    alone = compare(expected[:, :1], found[:, :1], "tokens")
    assert compare(expected, found, "tokens").centred_cosine == pytest.approx(alone.centred_cosine, abs=0.02)
    assert alone.centred_cosine < 0.5


def test_noise_in_padding_is_judged() -> None:
    expected, real = ragged_tokens()
    noisy = compare(expected, np.where(real[..., None], expected, 0.5), "tokens")
    assert noisy.centred_cosine < 0.9
    assert not noisy.passes(FP32)


def test_longer_padding_changes_no_measure() -> None:
    expected, real = ragged_tokens()
    found = expected + 0.01 * features(3) * real[..., None]
    padding = ((0, 0), (0, 5), (0, 0))
    plain, longer = (
        compare(expected, found, "tokens"),
        compare(np.pad(expected, padding), np.pad(found, padding), "tokens"),
    )
    for measure in ("cosine", "centred_cosine", "max_abs", "max_relative", "sqnr_db"):
        assert getattr(longer, measure) == pytest.approx(getattr(plain, measure), rel=1e-12), measure


def test_rows_that_one_sample_alone_has_are_left_out_of_the_centred_cosine() -> None:
    """Less the mean, which is that sample's own row, nothing but noise would be left of them."""
    expected, real = ragged_tokens((7, 2, 2, 2, 2))
    found = expected + 0.03 * features(3) * real[..., None]
    shared = compare(expected[:, :2], found[:, :2], "tokens").centred_cosine
    assert compare(expected, found, "tokens").centred_cosine == pytest.approx(shared, rel=1e-12)
    assert shared > 0.995


@pytest.mark.parametrize("engine", ["right", "collapsed"])
def test_a_sample_near_the_mean_is_judged_as_if_it_stood_farther_off(engine: str) -> None:
    """Two classes, and one image at the border between them: what INT8 leaves of its distance to the mean is noise."""
    expected = np.array([[3.0, -3.0], [-3.1, 3.0], [2.9, -3.1], [-2.8, 3.1], [0.02, -0.01]])
    noise = 0.03 * np.random.default_rng(0).normal(size=expected.shape) * 3
    found = expected + noise if engine == "right" else np.broadcast_to(expected.mean(axis=0), expected.shape)
    result = compare(expected, found, "logits")
    centred = expected[4] - expected.mean(axis=0), found[4] - expected.mean(axis=0)
    own = centred[0] @ centred[1] / max(1e-9, np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    assert own < 0.9
    assert (result.centred_cosine > 0.995) == (engine == "right")
    assert result.centred_cosine > 0.995 or result.centred_cosine < 0.1


def test_a_sample_that_leaves_the_mean_is_found() -> None:
    expected = np.array([[3.0, -3.0], [-3.0, 3.0], [3.0, 3.0], [-3.0, -3.0], [0.0, 0.01]])
    found = expected.copy()
    found[4] = [2.0, 2.0]
    assert compare(expected, found, "cls").centred_cosine < 0.8
