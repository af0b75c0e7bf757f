"""What comparisons and sweeps found: as tables in the terminal and in Markdown, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mae_deploy.files import atomic_path, write_json, write_text

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class FigureColumn:
    """One column: its title, the figure that it shows, and how; where seeds differ, their range stands beside the
    mean.
    """

    title: str
    key: str
    form: str = "{}"
    scale: float = 1

    def cell(self, row: Figures) -> str:
        """The figure as text; a dash where there is none."""
        value = row.get(self.key)
        if value is None:
            return "-"
        least, most = row.get(f"{self.key}_range", (value, value))
        spread = f" ({self._shown(least)} to {self._shown(most)})" if least != most else ""
        return self._shown(value) + spread

    def _shown(self, value: Any) -> str:
        return self.form.format(value * self.scale if isinstance(value, float | int) else value)


def mean_of(found: Sequence[dict[str, float]]) -> Figures:
    """The mean of each figure over the seeds, `KEY_range` (smallest and largest) and `KEY_by_seed` beside it."""
    row: Figures = {}
    for key in found[0]:
        values = [figures[key] for figures in found]
        row |= {key: statistics.mean(values), f"{key}_range": [min(values), max(values)], f"{key}_by_seed": values}
    return row


def shown_columns(columns: Sequence[FigureColumn], rows: Sequence[Figures]) -> list[FigureColumn]:
    """Those in which something stands."""
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def rich_table(title: str, columns: Sequence[FigureColumn], rows: Sequence[Figures]) -> Table:
    """For the terminal."""
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column.title, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(column.cell(row)) for column in columns))
    return table


def markdown_table(columns: Sequence[FigureColumn], rows: Sequence[Figures]) -> str:
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


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Two columns: what, and its value; facts within a fact stand in lines of their own. Values are shown as they are:
    a path may hold brackets.
    """
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for name, value in facts.items():
        text = (
            "\n".join(f"{key}: {inner}" for key, inner in value.items()) if isinstance(value, Mapping) else str(value)
        )
        table.add_row(name, Text(text, overflow="fold"))
    return table
