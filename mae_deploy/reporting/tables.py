"""What comparisons and sweeps found: as tables in the terminal and in Markdown, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mae_deploy.errors import import_optional
from mae_deploy.files import atomic_path, write_json, write_text
from mae_deploy.options import flags_of

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, the figure that it shows, and how; where seeds differ, their range stands beside the mean."""

    title: str
    key: str
    form: str = "{}"
    scale: float = 1

    def cell(self, row: Row) -> str:
        """The figure as text; a dash where there is none."""
        value = row.get(self.key)
        if value is None:
            return "-"
        least, most = row.get(f"{self.key}_range", (value, value))
        spread = f" ({self._shown(least)} to {self._shown(most)})" if least != most else ""
        return self._shown(value) + spread

    def _shown(self, value: Any) -> str:
        return self.form.format(value * self.scale if isinstance(value, float | int) else value)


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """One line of the picture."""

    title: str
    key: str
    flat: bool = False
    """The same value wherever it stands: a dashed line to compare with."""


def mean_of(found: Sequence[dict[str, float]]) -> Row:
    """The mean of each figure over the seeds, `KEY_range` (smallest and largest) and `KEY_by_seed` beside it."""
    row: Row = {}
    for key in found[0]:
        values = [figures[key] for figures in found]
        row |= {key: statistics.mean(values), f"{key}_range": [min(values), max(values)], f"{key}_by_seed": values}
    return row


def shown_columns(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Those in which something stands."""
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def rich_table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """For the terminal."""
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column.title, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(column.cell(row)) for column in columns))
    return table


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """For a page."""
    lines = [[column.title for column in columns], ["--:" if index else "---" for index in range(len(columns))]]
    lines += [[column.cell(row).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_files(folder: Path, stem: str, report: dict[str, Any], page: str, draw: Callable[[Path], None]) -> None:
    """Write `stem.json`, `stem.md` and `stem.png` into a folder, each in one step."""
    with atomic_path(folder / f"{stem}.png") as aside:
        draw(aside)
    write_text(folder / f"{stem}.md", page)
    write_json(folder / f"{stem}.json", report)


def draw_curves(path: Path, rows: Sequence[Row], curves: Sequence[Curve], *, label: str, values: Sequence[Any]) -> None:
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
        points = [(place, row[curve.key], *row[f"{curve.key}_range"]) for place, row in zip(places, rows, strict=True) if row.get(curve.key) is not None]
        if not points:
            continue
        x, mean, least, most = zip(*sorted(points), strict=True)
        axes.plot(x, mean, color=f"C{index}", label=curve.title, **({"linestyle": "--"} if curve.flat else {"marker": "o"}))
        axes.fill_between(x, least, most, color=f"C{index}", alpha=0.15)
    axes.set(xlabel=label, ylabel="top-1, %")
    axes.set_xticks(places, [str(value) for value in values])
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves), fontsize="small")
    figure.savefig(path, dpi=150, format="png")


def draw_bars(path: Path, rows: Sequence[Row], bars: Sequence[Curve]) -> None:
    """Figures in per cent, a group of bars for each row, with a line from the lowest to the highest seed.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figure = import_optional("matplotlib.figure", extra="train").Figure(figsize=(2 + 1.2 * len(rows), 4), layout="constrained")
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


def command_line(name: str, config: Any) -> str:
    """The command that makes these settings; what has its default is left out."""
    words = ["mae-deploy", name]
    options: list[str] = []
    for flag in flags_of(type(config)):
        value, default = config, _default_of(type(config), flag.path)
        for part in flag.path:
            value = getattr(value, part)
        if flag.argument:
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
        elif value != default and value is not None:
            options += _option(flag.name, value, repeated=flag.kind == list[str])
    return shlex.join([*words, *options])


def _default_of(cls: type, path: tuple[str, ...]) -> Any:
    field = next(field for field in dataclasses.fields(cls) if field.name == path[0])
    found = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    for part in path[1:]:
        found = getattr(found, part)
    return found


def _option(name: str, value: Any, *, repeated: bool) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if repeated:
        return [word for item in value for word in (name, item)]
    return [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
