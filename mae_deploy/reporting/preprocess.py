"""What is told of a preprocessing, which decides predictions: crop, filter, mean and deviation, and who says so."""

from __future__ import annotations

from typing import Any

from mae_deploy.config import from_dict
from mae_deploy.images.preprocess import Preprocess

PREPROCESS_FROM = "preprocess_from"
"""Key of a provenance for what told the preprocessing of an imported model, or changed it at export."""


def preprocess_facts(spec: Preprocess, provenance: dict[str, Any]) -> dict[str, str]:
    """Rows of a table of facts."""
    share = "" if spec.crop_mode == "letterbox" else f", {spec.crop_pct:.4g} of the resized image"
    told = provenance.get(PREPROCESS_FROM)
    return {
        "crop": f"{spec.crop_mode}{share}",
        "interpolation": spec.interpolation,
        "mean": _numbers(spec.mean),
        "std": _numbers(spec.std),
        **({} if spec.pixel_max is None else {"pixel max": f"{spec.pixel_max:g}"}),
        **({} if told is None else {"preprocessing": told}),
    }


def report_facts(report: dict[str, Any]) -> dict[str, Any]:
    """An import's report with these rows for its `preprocess`."""
    spec = from_dict(Preprocess, report["preprocess"])
    rest = {name: value for name, value in report.items() if name not in ("preprocess", PREPROCESS_FROM)}
    return {**rest, **preprocess_facts(spec, report)}


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
