"""How far one engine's output is from another's: the comparator of every parity check, in NumPy and float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mae_deploy.errors import ConfigError
from mae_deploy.preprocess import Array

_LARGEST = 1e150
"""Beyond it squares overflow float64; no output of an encoder comes near, so it counts as infinite."""

_FLAT = 1e-6
"""A sample that differs from the mean by less than this share of its norm does so by float32's rounding only."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """What an output must meet; None leaves a measure unjudged."""

    cosine: float = 0.99999
    """The least cosine of a sample."""
    max_abs: float = 1e-4
    """The largest difference of a value."""
    centred_cosine: float | None = None
    """The least cosine of a sample once the mean over the samples is removed."""
    sqnr_db: float | None = None
    """The least signal-to-noise ratio in dB."""
    top1_agreement: float | None = None
    """The least share of samples with the same most likely class (logits only)."""

    def __post_init__(self) -> None:
        if not (0 < self.cosine <= 1 and 0 <= self.max_abs < math.inf):
            raise ConfigError(f"tolerance: cosine {self.cosine} must be in (0, 1], max_abs {self.max_abs} at least 0 and finite")

    def to_dict(self) -> dict[str, float]:
        """The limits that are set, as a manifest holds them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One output against its reference; without a `reason`, all measures are numbers."""

    name: str
    reason: str | None = None
    """Why the arrays cannot be compared; such a comparison fails any tolerance, and its measures are NaN."""
    cosine: float = math.nan
    """The worst sample's."""
    centred_cosine: float = math.nan
    """The worst sample's, with the reference's mean over the samples removed from both: what tells samples apart.
    With one sample, or where a sample is no different from the mean, the plain cosine."""
    max_abs: float = math.nan
    max_relative: float = math.nan
    """`max_abs` over the reference's largest magnitude."""
    sqnr_db: float = math.nan
    """10 log10(sum of reference² / sum of error²) over all samples; infinite where nothing differs."""
    top1_agreement: float | None = None
    """Share of samples with the same largest value; logits only."""

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What misses the tolerance, a line each; empty where all is met."""
        if self.reason is not None:
            return [f"{self.name}: {self.reason}"]
        found = []
        for measure in ("cosine", "centred_cosine", "sqnr_db", "top1_agreement"):
            value, least = getattr(self, measure), getattr(tolerance, measure)
            if value is not None and least is not None and not value >= least:
                found.append(f"{self.name}: {measure} {value:.7g} is below {least:.7g}")
        if not self.max_abs <= tolerance.max_abs:
            found.append(f"{self.name}: max_abs {self.max_abs:.3g} is above {tolerance.max_abs:.3g}")
        return found

    def passes(self, tolerance: Tolerance) -> bool:
        """Whether the output meets the tolerance."""
        return not self.failures(tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite measure (`sqnr_db` where nothing differs) and one that was not computed are null."""
        plain = dataclasses.asdict(self)
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in plain.items()}


def compare(reference: Array, candidate: Array, name: str) -> Comparison:
    """Compare two arrays `(B, ...)` of one shape, sample by sample; the candidate's dtype does not matter.

    NaN, infinity, another shape or no samples at all give a comparison that fails, with the reason.
    """
    reason = _reason(reference, candidate)
    if reason is not None:
        return Comparison(name=name, reason=reason)
    B = len(reference)
    expected = reference.astype(np.float64).reshape(B, -1)
    found = candidate.astype(np.float64).reshape(B, -1)
    cosines = _cosines(expected, found)
    error = found - expected
    max_abs = float(np.abs(error).max())
    return Comparison(
        name=name,
        cosine=float(cosines.min()),
        centred_cosine=float(_centred_cosines(expected, found, cosines).min()),
        max_abs=max_abs,
        max_relative=_ratio(max_abs, float(np.abs(expected).max())),
        sqnr_db=_decibels(float(np.square(expected).sum()), float(np.square(error).sum())),
        top1_agreement=float((expected.argmax(1) == found.argmax(1)).mean()) if name == "logits" else None,
    )


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
            return f"{label} has {int(bad.sum())} NaN or infinite values"
    return None


def _cosines(a_BF: npt.NDArray[np.float64], b_BF: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The cosine of each row; 1 for two zero rows, 0 for one."""
    a_norm, b_norm = np.linalg.norm(a_BF, axis=1), np.linalg.norm(b_BF, axis=1)
    product = a_norm * b_norm
    zero = product == 0
    cosines: npt.NDArray[np.float64] = np.clip(np.einsum("bf,bf->b", a_BF, b_BF) / np.where(zero, 1.0, product), -1.0, 1.0)
    cosines[zero] = a_norm[zero] == b_norm[zero]
    return cosines


def _centred_cosines(expected_BF: npt.NDArray[np.float64], found_BF: npt.NDArray[np.float64], plain_B: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # The reference's mean is removed from both: each one's own mean would hide a constant offset of the candidate.
    mean = expected_BF.mean(axis=0)
    centred = expected_BF - mean
    flat = np.linalg.norm(centred, axis=1) <= _FLAT * np.linalg.norm(expected_BF, axis=1)
    return np.where(flat, plain_B, _cosines(centred, found_BF - mean))


def _ratio(value: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if value == 0 else math.inf
    return value / scale


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
