"""Curves and bars of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_deploy.errors import import_optional
from mae_deploy.reporting.tables import Figures


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """One line of the picture."""

    title: str
    key: str
    flat: bool = False
    """The same value wherever it stands: a dashed line to compare with."""


def draw_curves(
    path: Path, rows: Sequence[Figures], curves: Sequence[Curve], *, label: str, values: Sequence[Any]
) -> None:
    """Figures in per cent against the values of a setting, with a band from the lowest to the highest seed.

    Args:
        values: one for each row; where all are numbers they are the axis, else names at equal distances.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figure = import_optional("matplotlib.figure", extra="train").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = list(values) if numbers else list(range(len(values)))
    for index, curve in enumerate(curves):
        points = [
            (place, row[curve.key], *row[f"{curve.key}_range"])
            for place, row in zip(places, rows, strict=True)
            if row.get(curve.key) is not None
        ]
        if not points:
            continue
        x, mean, least, most = zip(*sorted(points), strict=True)
        axes.plot(
            x, mean, color=f"C{index}", label=curve.title, **({"linestyle": "--"} if curve.flat else {"marker": "o"})
        )
        axes.fill_between(x, least, most, color=f"C{index}", alpha=0.15)
    axes.set(xlabel=label, ylabel="top-1, %")
    axes.set_xticks(places, [str(value) for value in values])
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves), fontsize="small")
    figure.savefig(path, dpi=150, format="png")


def draw_bars(path: Path, rows: Sequence[Figures], bars: Sequence[Curve]) -> None:
    """Figures in per cent, a group of bars for each row, with a line from the lowest to the highest seed.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figure = import_optional("matplotlib.figure", extra="train").Figure(
        figsize=(2 + 1.2 * len(rows), 4), layout="constrained"
    )
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for index, bar in enumerate(bars):
        places = [place + width * (index - (len(bars) - 1) / 2) for place in range(len(rows))]
        errors = [[abs(row[bar.key] - row[f"{bar.key}_range"][side]) for row in rows] for side in (0, 1)]
        axes.bar(places, [row[bar.key] for row in rows], width, yerr=errors, capsize=2, label=bar.title)
    axes.set(ylabel="top-1, %")
    axes.set_xticks(range(len(rows)), [row["name"].replace("$", r"\$") for row in rows], rotation=20, ha="right")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(bars), fontsize="small")
    figure.savefig(path, dpi=150, format="png")
