"""What a bundle is worth beside FP32, measured on one machine: accuracy and speed with their intervals, the worst
image, and the rules that were applied. `export` and `verify --certificate` write the same record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from mae_deploy import __version__
from mae_deploy.images.read import Array
from mae_deploy.machine import cpu_features, cpu_name
from mae_deploy.runtime.engines.base import Engine
from mae_deploy.runtime.parity.bounds import (
    CONFIDENCE,
    difference_interval,
    images_to_show,
    mcnemar,
    ratio_interval,
    share_interval,
)
from mae_deploy.runtime.parity.compare import Comparison
from mae_deploy.runtime.timing import Timing, measure
from mae_deploy.runtime.tolerance import Tolerance

_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 5.0, 15, 61
"""How long two graphs are timed in turns: more rounds narrow the interval."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit and what was found."""

    name: str
    limit: float
    value: float
    """The figure, or the end of its interval, that is judged."""
    kind: Literal["at_least", "at_most", "below"]

    @property
    def passed(self) -> bool:
        """Whether it is met; NaN meets no limit."""
        if self.kind == "at_least":
            return self.value >= self.limit
        return self.value < self.limit if self.kind == "below" else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is infinite is null."""
        value = self.value if math.isfinite(self.value) else None
        return {"rule": self.name, self.kind: self.limit, "value": value, "passed": self.passed}


@dataclass(frozen=True, slots=True)
class Classes:
    """The most likely class of each image, by FP32 and by what is certified."""

    reference: Array
    """int64 `(S,)`."""
    found: Array
    """int64 `(S,)`."""
    labels: Array | None
    """int64 `(S,)`; None where the right classes are not known."""

    def __len__(self) -> int:
        """How many images."""
        return len(self.found)

    @property
    def top1(self) -> tuple[float, float] | None:
        """Accuracy in per cent of FP32 and of what is certified; None without labels."""
        if self.labels is None:
            return None
        right = [float(100 * (classes == self.labels).mean()) for classes in (self.reference, self.found)]
        return right[0], right[1]

    @property
    def lost(self) -> int:
        """Images that FP32 alone has right; without labels, those that get another class."""
        differs = self.reference != self.found
        return int((differs if self.labels is None else differs & (self.reference == self.labels)).sum())

    @property
    def gained(self) -> int:
        """Images that FP32 alone has wrong; 0 without labels."""
        return 0 if self.labels is None else int(((self.found == self.labels) & (self.reference != self.labels)).sum())

    @property
    def interval(self) -> tuple[float, float]:
        """Of the loss in points: of accuracy, without labels of agreement."""
        low, high = difference_interval(self.lost, self.gained, len(self))
        return 100 * low, 100 * high

    def rule(self, max_drop: float) -> Rule:
        """The budget, judged on the upper end of the interval."""
        return Rule(f"points of {self._what} lost, upper end", max_drop, self.interval[1], "at_most")

    def failure(self, max_drop: float) -> str | None:
        """What is said where the budget is not shown to be met; None where it is."""
        if self.rule(max_drop).passed:
            return None
        loss, high = 100 * (self.lost - self.gained) / len(self), self.interval[1]
        if self.top1 is None:
            found = f"{self.lost} of {len(self)} images get another class than in FP32, {loss:.2f} %"
        else:
            reference, found_top1 = self.top1
            found = f"top-1 is {found_top1:.2f}, {loss:.2f} points below FP32's {reference:.2f}"
        said = f"{found}; --max-drop {max_drop:g}"
        if loss > max_drop:
            return said
        said += f", and it may be {high:.2f} with {CONFIDENCE:.0%} confidence"
        needed = images_to_show(max_drop / 100, self.lost, self.gained, len(self))
        more = "" if needed is None else f": about {needed} would do, if they are like these"
        return f"{said}; {len(self)} images are too few to show it{more}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        differing = int((self.reference != self.found).sum())
        agreement = [1 - end for end in reversed(share_interval(differing, len(self)))]
        found: dict[str, Any] = {
            "images": len(self),
            "labelled": self.labels is not None,
            "agreement": 1 - differing / len(self),
            "agreement_interval": agreement,
        }
        if self.top1 is not None:
            found |= {
                "fp32_top1": self.top1[0],
                "top1": self.top1[1],
                "lost": self.lost,
                "gained": self.gained,
                "drop": self.top1[0] - self.top1[1],
                "drop_interval": list(self.interval),
                "mcnemar_p": mcnemar(self.lost, self.gained),
            }
        return found

    @property
    def _what(self) -> str:
        return "agreement" if self.labels is None else "top-1"


def classes_of(reference: Array, found: Array, labels: Array | None) -> Classes:
    """From logits or probabilities `(S, C)`."""
    return Classes(reference.argmax(axis=1), found.argmax(axis=1), labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Two graphs timed in turns."""

    timing: Timing
    baseline: Timing
    baseline_name: str = "fp32"

    @property
    def ratio(self) -> float:
        """This graph's median over the baseline's."""
        return self.timing.ratio(self.baseline)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the ratio."""
        return ratio_interval(self.timing, self.baseline)

    def rule(self, max_latency: float) -> Rule:
        """The budget, judged on the upper end of the interval."""
        name = f"share of {self.baseline_name.upper()}'s latency, upper end"
        return Rule(name, max_latency, self.interval[1], "below")

    def words(self) -> str:
        """`0.71 of FP32's latency, 0.69 to 0.74, 9.30 against 13.10 ms`, the interval with the confidence."""
        low, high = self.interval
        mine, other = (1000 * timing.median for timing in (self.timing, self.baseline))
        return f"{self.ratio:.2f} of {self.baseline_name.upper()}'s latency, {mine:.2f} against {other:.2f} ms" + (
            f" ({low:.2f} to {high:.2f} with {CONFIDENCE:.0%} confidence)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "baseline": self.baseline_name,
            "ratio": self.ratio,
            "ratio_interval": list(self.interval),
            "ms": 1000 * self.timing.median,
            "baseline_ms": 1000 * self.baseline.median,
            "rounds": len(self.timing.seconds),
        }


def time_both(calls: Mapping[str, Callable[[], object]], mine: str, baseline: str) -> Speed:
    """Time two calls in turns, for about so many seconds as `_SECONDS`, which is settled before anything counts."""
    trial = measure(calls, repeats=1, warmup=2)
    round_seconds = sum(timing.median for timing in trial.values())
    rounds = min(max(int(_SECONDS / round_seconds), _LEAST_ROUNDS), _MOST_ROUNDS)
    found = measure(calls, repeats=rounds, warmup=1)
    return Speed(timing=found[mine], baseline=found[baseline], baseline_name=baseline)


def certificate(
    engine: Engine,
    *,
    precision: str,
    images: str,
    comparisons: Sequence[Comparison],
    tolerance: Tolerance,
    classes: Classes | None,
    speed: Speed | None,
    max_drop: float | None,
    max_latency: float | None,
) -> dict[str, Any]:
    """The record, as plain JSON values.

    Args:
        engine: what was measured.
        images: where they come from.
        comparisons: each output with FP32's.
        classes: of a classifier.
        speed: None where it was not measured.
        max_drop: the budget in points; None without.
        max_latency: the budget as a share of the baseline's latency; None without.
    """
    rules = [rule for comparison in comparisons for rule in _output_rules(comparison, tolerance)]
    if classes is not None and max_drop is not None:
        rules.append(classes.rule(max_drop))
    if speed is not None and max_latency is not None:
        rules.append(speed.rule(max_latency))
    outputs = [
        {name: value for name, value in comparison.to_dict().items() if name != "reason"} for comparison in comparisons
    ]
    return {
        "mae_deploy_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "passed": all(rule.passed for rule in rules),
        "confidence": CONFIDENCE,
        "precision": precision,
        "engine": engine.name,
        "engine_version": engine.version,
        "device": engine.device,
        "cpu": cpu_name(),
        "instructions": list(cpu_features() or ()),
        "threads": engine.options.num_threads,
        "images": images,
        "outputs": outputs,
        "classes": None if classes is None else classes.to_dict(),
        "speed": None if speed is None else speed.to_dict(),
        "rules": [rule.to_dict() for rule in rules],
    }


_WORDS = {
    "cosine": "cosine, worst image",
    "centred_cosine": "centred cosine, worst image",
    "sqnr_db": "SQNR in dB",
    "top1_agreement": "top-1 agreement",
}


def _output_rules(comparison: Comparison, tolerance: Tolerance) -> list[Rule]:
    """The limits of the tolerance that an output must meet each."""
    found = []
    for name, words in _WORDS.items():
        value, limit = getattr(comparison, name), getattr(tolerance, name)
        if value is not None and limit is not None:
            if name == "top1_agreement":
                limit = comparison.least_agreement(limit)
            found.append(Rule(f"{comparison.name}: {words}", limit, value, "at_least"))
    shares = [
        getattr(comparison, name) / limit
        for name in ("max_abs", "max_relative")
        if (limit := getattr(tolerance, name)) is not None
    ]
    if shares:  # one of the two is enough
        found.append(Rule(f"{comparison.name}: largest difference, of what is allowed", 1, min(shares), "at_most"))
    return found
