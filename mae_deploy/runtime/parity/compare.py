"""How far one engine's output is from another's: the comparator of every parity check, in NumPy and float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mae_deploy.images.read import Array
from mae_deploy.runtime.manifest import CLASS_OUTPUTS
from mae_deploy.runtime.tolerance import Tolerance

_LARGEST = 1e150
"""Beyond it squares overflow float64; no output of an encoder comes near, so it counts as infinite."""

_LEAST_PROBABILITY = 1e-6
"""Below it, FP16 has no digits left."""

_NOT_FINITE = "NaN or infinite values"

_FLAT = 1e-6
"""Samples that differ from their mean by less than this share of their norm do so by float32's rounding only."""

_NEAR = 0.5
"""A sample nearer to the mean than this share of the typical distance is compared as if it stood there (see
`Comparison.centred_cosine`)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One output against its reference; without a `reason`, all measures are numbers."""

    name: str
    reason: str | None = None
    """Why the arrays cannot be compared; such a comparison fails any tolerance, and its measures are NaN."""
    num_samples: int = 1
    num_values: int = 0
    """Of all samples."""
    cosine: float = math.nan
    """The worst sample's."""
    centred_cosine: float = math.nan
    """The worst sample's, with the reference's mean over the samples removed from both: what tells samples apart.

    Where no sample differs from the mean by more than float32's rounding (one sample, or constant outputs), the plain
    cosine. Features that differ by a few percent of their norm are not an excuse: noise of that size hides what tells
    the images apart. One sample that happens to lie near the mean of others that do not is: all that is left of it may
    be noise. It is compared as if it stood at half the typical distance: both vectors get one more, equal component
    that brings the reference there. In rows of tokens and in maps, a value that is 0 on both sides is padding: it is
    left out, and so is one that no other sample has."""
    max_abs: float = math.nan
    max_relative: float = math.nan
    """`max_abs` over the reference's largest magnitude."""
    sqnr_db: float = math.nan
    """10 log10(sum of reference² / sum of error²) over all samples; infinite where nothing differs."""
    worst_sqnr_db: float = math.nan
    """The worst sample's."""
    channel_sqnr_db: float = math.nan
    """The worst channel's: the signal of all channels on average over the error of the one that is off most."""
    top1_agreement: float | None = None
    """Share of samples with the same largest value; logits and probs only."""

    @property
    def not_finite(self) -> bool:
        """Whether it cannot be compared because of NaN or infinite values."""
        return self.reason is not None and self.reason.endswith(_NOT_FINITE)

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What misses the tolerance, a line each; empty where all is met."""
        if self.reason is not None:
            return [f"{self.name}: {self.reason}"]
        found = []
        for measure in ("cosine", "centred_cosine", "sqnr_db", "top1_agreement"):
            value, least = getattr(self, measure), getattr(tolerance, measure)
            if measure == "top1_agreement" and least is not None:
                least = self.least_agreement(least)
            if value is not None and least is not None and not value >= least:
                found.append(f"{self.name}: {measure} {value:.7g} is below {least:.7g}")
        limits = [
            (name, getattr(self, name), most)
            for name in ("max_abs", "max_relative")
            if (most := getattr(tolerance, name)) is not None
        ]
        if limits and not any(value <= most for _, value, most in limits):
            found.append(
                f"{self.name}: "
                + " and ".join(f"{name} {value:.3g} is above {most:.3g}" for name, value, most in limits)
            )
        return found

    def least_agreement(self, least: float) -> float:
        """The least top-1 agreement on so many samples: unless it is 1, one may always differ."""
        return least if least == 1 else min(least, (self.num_samples - 1) / self.num_samples)

    def passes(self, tolerance: Tolerance) -> bool:
        """Whether the output meets the tolerance."""
        return not self.failures(tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite measure (`sqnr_db` where nothing differs) and one that was not computed are
        null.
        """
        plain = dataclasses.asdict(self)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in plain.items()
        }


def compare(reference: Array, candidate: Array, name: str) -> Comparison:
    """Compare two arrays `(B, ...)` of one shape, sample by sample; the candidate's dtype does not matter.

    NaN, infinity, another shape or no samples at all give a comparison that fails, with the reason. Probabilities are
    compared as the logits that they stand for.
    """
    reason = _reason(reference, candidate)
    if reason is not None:
        return Comparison(name=name, reason=reason)
    B = len(reference)
    expected = reference.astype(np.float64).reshape(B, -1)
    found = candidate.astype(np.float64).reshape(B, -1)
    if name == "probs":
        expected, found = _centred_logits(expected), _centred_logits(found)
    cosines = _cosines(*_sums(expected, found))
    error = found - expected
    signal_B, noise_B = np.square(expected).sum(axis=1), np.square(error).sum(axis=1)
    max_abs = float(np.abs(error).max())
    return Comparison(
        name=name,
        num_samples=B,
        num_values=reference.size,
        cosine=float(cosines.min()),
        centred_cosine=float(_centred_cosines(expected, found, cosines, has_padding=reference.ndim > 2).min()),
        max_abs=max_abs,
        max_relative=_ratio(max_abs, float(np.abs(expected).max())),
        sqnr_db=_decibels(float(signal_B.sum()), float(noise_B.sum())),
        worst_sqnr_db=min(
            _decibels(float(signal), float(noise)) for signal, noise in zip(signal_B, noise_B, strict=True)
        ),
        channel_sqnr_db=_decibels(float(signal_B.sum()), _worst_channel(error.reshape(reference.shape))),
        top1_agreement=float((expected.argmax(1) == found.argmax(1)).mean()) if name in CLASS_OUTPUTS else None,
    )


def _worst_channel(error: Array) -> float:
    """The sum of error² of the channel that is off most, times the number of channels: of maps `(B, D, H, W)` the
    second axis, else the last.
    """
    channels = np.moveaxis(error, 1 if error.ndim == 4 else -1, 0)
    channels = channels.reshape(len(channels), -1)
    return float(np.einsum("cf,cf->c", channels, channels).max() * len(channels))


def _centred_logits(probs_BC: Array) -> Array:
    """The logits of probabilities, less their mean: a softmax keeps them up to a constant for each sample. As
    probabilities, the same error of the logits would be many dB more or less, by how sure the classifier is.
    """
    logits = np.log(np.maximum(probs_BC, _LEAST_PROBABILITY))
    centred: Array = logits - logits.mean(axis=1, keepdims=True)
    return centred


def _reason(reference: Array, candidate: Array) -> str | None:
    if reference.shape != candidate.shape:
        return f"shape {candidate.shape}, the reference has {reference.shape}"
    if reference.ndim == 0 or reference.size == 0:
        return f"nothing to compare in shape {reference.shape}"
    for label, array in (("the reference", reference), ("the output", candidate)):
        if array.dtype.kind not in "fiub":
            return f"{label} is {array.dtype}, not numbers"
        bad = ~(np.abs(array.astype(np.float64)) <= _LARGEST)
        if bad.any():
            return f"{label} has {int(bad.sum())} {_NOT_FINITE}"
    return None


def _sums(a_BF: Array, b_BF: Array) -> tuple[Array, Array, Array]:
    """Of each row: the sums of a², a b and b²."""
    return np.einsum("bf,bf->b", a_BF, a_BF), np.einsum("bf,bf->b", a_BF, b_BF), np.einsum("bf,bf->b", b_BF, b_BF)


def _cosines(aa_B: Array, ab_B: Array, bb_B: Array) -> Array:
    """The cosine of each row from its sums; 1 for two zero rows, 0 for one."""
    product = np.sqrt(aa_B) * np.sqrt(bb_B)
    zero = product == 0
    cosines: Array = np.clip(ab_B / np.where(zero, 1.0, product), -1.0, 1.0)
    cosines[zero] = aa_B[zero] == bb_B[zero]
    return cosines


def _centred_cosines(expected_BF: Array, found_BF: Array, plain_B: Array, *, has_padding: bool) -> Array:
    # Padding is the same on both sides: less the mean it would still be, and flatter the figure.
    absent = (expected_BF == 0) & (found_BF == 0) & has_padding
    counts_F = len(absent) - absent.sum(axis=0)
    absent |= counts_F < 2
    # The reference's mean is removed from both: each one's own mean would hide a constant offset of the candidate.
    mean_F = expected_BF.sum(axis=0) / np.maximum(counts_F, 1)
    expected, found = expected_BF - mean_F, found_BF - mean_F
    expected[absent] = found[absent] = 0.0
    aa_B, ab_B, bb_B = _sums(expected, found)
    if aa_B.sum() <= _FLAT**2 * np.vdot(expected_BF, expected_BF):
        return plain_B
    sizes_B = (~absent).sum(axis=1)
    typical_B = aa_B.sum() * sizes_B / sizes_B.sum()
    missing_B = np.maximum(_NEAR**2 * typical_B - aa_B, 0.0)
    return _cosines(aa_B + missing_B, ab_B + missing_B, bb_B + missing_B)


def _ratio(value: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if value == 0 else math.inf
    return value / scale


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
