"""Wrong outputs of every kind against the tolerance of every precision, on features as encoders give them; and the
right ones, which pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from mae_deploy.images.read import Array
from mae_deploy.runtime.parity.compare import compare
from mae_deploy.runtime.tolerance import TOLERANCES, Tolerance
from tests.runtime.tiny_bundle import N, golden_inputs, reference

PRECISIONS = {"fp32": (0.08, 125.0), "fp16": (0.08, 60.0), "bf16": (0.08, 45.0), "int8": (0.4, 32.0)}
"""Share of the norm by which images differ (an INT8 encoder bears no small one), and the noise in dB of a right engine,
as measured on ViT-S and ViT-B."""

CHANNELS = 768


def realistic(share: float, seed: int = 0) -> Array:
    """Features `(8, 5, 768)` as encoders give them: most of the norm is common to all images, and a few channels are
    outliers.
    """
    rng = np.random.default_rng(seed)
    common = rng.choice([-1.0, 1.0], size=CHANNELS)
    common[[3, 500]] *= 12
    own = rng.normal(size=(8, 5, CHANNELS))
    scale = share / math.sqrt(1 - share**2) * np.linalg.norm(common) / math.sqrt(CHANNELS)
    values: Array = common + scale * own
    return values.astype(np.float32)


def with_noise(values: Array, decibels: float) -> Array:
    noise = np.random.default_rng(1).normal(size=values.shape)
    noise *= np.linalg.norm(values) / np.linalg.norm(noise) * 10 ** (-decibels / 20)
    return (values + noise).astype(np.float32)


def one_value(values: Array, value: float) -> Array:
    values = values.copy()
    values[3, 2, 1] = value
    return values


def dead_channel(values: Array) -> Array:
    values = values.copy()
    values[..., 500] = 0
    return values


DEFECTS: dict[str, Callable[[Array], Array]] = {
    "NaN": lambda x: one_value(x, math.nan),
    "Inf": lambda x: one_value(x, math.inf),
    "sign flip": lambda x: -x,
    "zeros": np.zeros_like,
    "constant output": lambda x: np.broadcast_to(x.mean(axis=0), x.shape),
    "one constant sample": lambda x: np.concatenate([x[:-1], x[:-1].mean(axis=0, keepdims=True)]),
    "shuffled batch": lambda x: np.roll(x, 1, axis=0),
    "tokens off by one": lambda x: np.roll(x, 1, axis=1),
    "transposed": lambda x: x.transpose(0, 2, 1).reshape(x.shape),
    "dead channel": dead_channel,
    "scaled by 1.01": lambda x: x * np.float32(1.01),
    "scaled by 1.05": lambda x: x * np.float32(1.05),
    "swapped outputs": lambda x: x[:, [1, 0, 2, 3, 4]],
    "saturated": lambda x: np.clip(x, -np.abs(x).max() / 2, np.abs(x).max() / 2),
}

PLAIN_COSINE_PASSES = {
    "fp32": {"scaled by 1.01", "scaled by 1.05"},
    "fp16": {"scaled by 1.01", "scaled by 1.05"},
    "bf16": {"scaled by 1.01", "scaled by 1.05"},
    "int8": {"scaled by 1.05"},
}
"""What the cosine alone would let through."""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_right_engine_passes(precision: str) -> None:
    share, decibels = PRECISIONS[precision]
    assert (
        compare(realistic(share), with_noise(realistic(share), decibels), "tokens").failures(TOLERANCES[precision])
        == []
    )


def test_one_percent_of_scale_is_within_the_noise_of_int8() -> None:
    """It is at 40 dB, and a right INT8 engine at 32."""
    expected = realistic(PRECISIONS["int8"][0])
    assert compare(expected, DEFECTS["scaled by 1.01"](expected), "tokens").passes(TOLERANCES["int8"])


@pytest.mark.parametrize(
    ("precision", "defect"),
    [case for case in itertools.product(PRECISIONS, DEFECTS) if case != ("int8", "scaled by 1.01")],
)
def test_every_defect_fails(precision: str, defect: str) -> None:
    expected, tolerance = realistic(PRECISIONS[precision][0]), TOLERANCES[precision]
    result = compare(expected, DEFECTS[defect](expected), "tokens")
    assert not result.passes(tolerance)
    assert result.passes(Tolerance(cosine=tolerance.cosine)) == (defect in PLAIN_COSINE_PASSES[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_saturation_fails(precision: str) -> None:
    expected = realistic(PRECISIONS[precision][0]) * np.float32(7000)
    saturated = np.clip(expected, -65504, 65504)
    assert 65504 < np.abs(expected).max() < 100000
    assert not compare(expected, saturated, "block_5").passes(TOLERANCES[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cls_and_pooled_swapped_fail(precision: str) -> None:
    tokens = realistic(PRECISIONS[precision][0])
    assert not compare(tokens[:, 0], tokens[:, 1:].mean(axis=1), "cls").passes(TOLERANCES[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ids_keep_off_by_one_fail_in_every_precision(precision: str) -> None:
    inputs = golden_inputs(visible=True)
    expected = reference(**inputs)
    found = reference(inputs["images"], (inputs["ids_keep"] + 1) % N)
    assert all(not compare(expected[name], found[name], name).passes(TOLERANCES[precision]) for name in expected)


@pytest.mark.parametrize(("share", "honest"), [(0.03, False), (0.3, True)])
def test_features_that_barely_differ_are_no_excuse(share: float, honest: bool) -> None:
    """INT8 at 32 dB is right where images differ by 30 % of the norm, and cannot tell them apart where they differ by 3
    %.
    """
    expected = realistic(share)
    result = compare(expected, with_noise(expected, 32), "cls")
    assert result.sqnr_db == pytest.approx(32, abs=0.1)
    assert result.passes(TOLERANCES["int8"]) == honest
    assert honest or result.centred_cosine < 0.8
