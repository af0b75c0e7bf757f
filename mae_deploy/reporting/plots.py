"""Plots in one style: size of a panel, letters, colours that colour-blind people tell apart; no display is needed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_deploy.errors import import_optional
from mae_deploy.files import atomic_path
from mae_deploy.reporting.tables import Row

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d31", "#5f6368")
"""Okabe and Ito's, without yellow and black, which do not stand out from a page: https://jfly.uni-koeln.de/color/"""

PANEL = (6.0, 4.0)
"""Width and height of one pair of axes in inches."""

_DPI = 150

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.markersize": 5,
    "legend.frameon": False,
    # A `$` in a path is not the beginning of a formula.
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line, or one bar of each group."""

    title: str
    key: str
    flat: bool = False
    """The same value wherever it stands: a dashed line to compare with."""


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of a size in inches to draw on, written as PNG in one step.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figures = import_optional("matplotlib.figure", extra="plot")
    matplotlib = importlib.import_module("matplotlib")
    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}):
        drawn = figures.Figure(figsize=(width, height), layout="constrained")
        yield drawn
        with atomic_path(path) as aside:
            drawn.savefig(aside, dpi=_DPI, format="png")


def line_style(index: int) -> dict[str, str]:
    """Colour and marker that tell a line from many others."""
    return {"color": f"C{index % len(COLOURS)}", "marker": "os^v"[index // len(COLOURS) % 4]}


def legend_below(drawn: Any, axes: Any, *, columns: int = 1) -> None:
    """What the axes show, named below the figure."""
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def draw_curves(path: Path, rows: Sequence[Row], curves: Sequence[Curve], *, label: str, values: Sequence[Any]) -> None:
    """Figures in per cent against the values of a setting, with a band from the lowest to the highest seed.

    Args:
        values: one for each row; where all are numbers they are the axis, else names at equal distances.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = list(values) if numbers else list(range(len(values)))
    with figure(path, *PANEL) as drawn:
        axes = drawn.subplots()
        for index, curve in enumerate(curves):
            points = [
                (place, row[curve.key], *row[f"{curve.key}_range"])
                for place, row in zip(places, rows, strict=True)
                if row.get(curve.key) is not None
            ]
            if not points:
                continue
            x, mean, least, most = zip(*sorted(points), strict=True)
            line = {"linestyle": "--"} if curve.flat else {"marker": "o"}
            axes.plot(x, mean, color=f"C{index}", label=curve.title, **line)
            axes.fill_between(x, least, most, color=f"C{index}", alpha=0.15)
        axes.set(xlabel=label, ylabel="top-1, %")
        axes.set_xticks(places, [str(value) for value in values])
        legend_below(drawn, axes, columns=len(curves))


def draw_bars(path: Path, rows: Sequence[Row], bars: Sequence[Curve]) -> None:
    """Figures in per cent, a group of bars for each row, with a line from the lowest to the highest seed.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    width = 0.8 / len(bars)
    with figure(path, 2 + 1.2 * len(rows), PANEL[1]) as drawn:
        axes = drawn.subplots()
        for index, bar in enumerate(bars):
            places = [place + width * (index - (len(bars) - 1) / 2) for place in range(len(rows))]
            errors = [[abs(row[bar.key] - row[f"{bar.key}_range"][side]) for row in rows] for side in (0, 1)]
            axes.bar(places, [row[bar.key] for row in rows], width, yerr=errors, capsize=2, label=bar.title)
        axes.set(ylabel="top-1, %")
        axes.xaxis.grid(False)
        axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=20, ha="right")
        legend_below(drawn, axes, columns=len(bars))
