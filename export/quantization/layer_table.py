"""The table of a quantised model's Linears, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_deploy.files import write_json
from mae_deploy.models.quantization.activations import ActivationStats
from mae_deploy.reporting import plots

_ROW_INCHES = 0.17


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """One Linear."""

    layer: str
    macs_share: float
    """Its share of the multiply-accumulates of all Linears in the table."""
    noise_db: float
    """Noise over signal of the worst output when it alone is in eight bits, in dB."""
    precision: str
    """int8 or fp8, or the precision that it is left in."""
    scale: float | None = None
    """Of its input; None where the range is found at run time."""
    absmax: float | None = None
    """Of its input on the calibration images; None without calibration."""
    outlier_ratio: float | None = None
    """absmax over root mean square."""


def table_rows(
    noise: Mapping[str, float],
    cost: Mapping[str, float],
    scales: Mapping[str, float | None],
    stats: Mapping[str, ActivationStats],
    chosen: Collection[str],
    *,
    precision: str = "int8",
    otherwise: str = "fp32",
) -> list[LayerRow]:
    """A row for each Linear.

    Args:
        noise: as `export.sensitivity.sensitivities` gives it.
        cost: multiply-accumulates, in any unit.
        stats: of the inputs as they are quantised; empty without calibration.
        chosen: the Linears in eight bits, in `precision`; the others are in the precision `otherwise`.
    """
    total = math.fsum(cost.values())
    return [
        LayerRow(
            layer=name,
            macs_share=cost[name] / total,
            noise_db=10 * math.log10(ratio) if ratio > 0 else -math.inf,
            precision=precision if name in chosen else otherwise,
            scale=scales[name],
            absmax=float(stats[name].absmax.max()) if name in stats else None,
            outlier_ratio=stats[name].outlier_ratio if name in stats else None,
        )
        for name, ratio in noise.items()
    ]


def write_table(stem: Path, rows: Sequence[LayerRow]) -> list[Path]:
    """Write `stem.json` and `stem.png`; returns both.

    Raises:
        MissingDependency: matplotlib is not installed; nothing is written.
    """
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".png")]
    _draw(files[1], rows)
    write_json(files[0], [_plain(row) for row in rows])
    return files


def _plain(row: LayerRow) -> dict[str, Any]:
    """JSON has no infinity: no noise at all is null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(row).items()
    }


def _draw(path: Path, rows: Sequence[LayerRow]) -> None:
    """Bars of noise and of cost, a line for each Linear from top to bottom."""
    eight_bits, otherwise = plots.COLOURS[:2]
    colours = [eight_bits if row.precision in ("int8", "fp8") else otherwise for row in rows]
    places = range(len(rows))
    finite = [row.noise_db for row in rows if math.isfinite(row.noise_db)]
    floor = math.floor(min(finite, default=0.0)) - 5
    with plots.figure(path, 10, 1.4 + _ROW_INCHES * len(rows)) as drawn:
        noise, cost = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        noise.barh(places, [max(row.noise_db, floor) - floor for row in rows], left=floor, color=colours)
        cost.barh(places, [100 * row.macs_share for row in rows], color=colours)
        noise.set_yticks(places, [f"{row.layer}  {row.precision}" for row in rows], fontsize="x-small")
        noise.set_ylim(len(rows) - 0.4, -0.6)
        noise.set_xlabel("noise over signal of the worst output, this Linear alone in eight bits, dB")
        cost.set_xlabel("multiply-accumulates, %")
        for axes in (noise, cost):
            axes.yaxis.grid(False)
        counts = ", ".join(f"{count} {name}" for name, count in _tally(rows).items())
        drawn.suptitle(f"Precision by layer: {counts}")


def _tally(rows: Sequence[LayerRow]) -> dict[str, int]:
    """How many Linears are in which precision."""
    names = [row.precision for row in rows]
    return {name: names.count(name) for name in dict.fromkeys(names)}
