"""The one table: rows of figures under columns, in the terminal and in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.text import Text

from mae_deploy.results import as_text
from mae_deploy.text import printable, shortened

_LONGEST = 4000
"""Characters of a value that a table shows: a terminal takes minutes to lay out millions."""

Row = Mapping[str, Any]
"""Figures by their keys."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, the figure that it shows, and how."""

    title: str
    key: str
    form: str = ""
    """As `str.format` takes it, such as `{:.2f}`; empty: as words."""
    scale: float = 1
    colour: Callable[[str], str] | None = None
    """rich's name of a cell's colour in the terminal, by its text."""

    def cell(self, row: Row) -> str:
        """The figure as text, beside a mean half its interval, else the range over the seeds; a dash where there is
        none.
        """
        value = row.get(self.key)
        low, high = row.get(f"{self.key}_interval", (0.0, 0.0))
        if low < high:
            return f"{self._text(value)} ± {self._text((high - low) / 2)}"
        least, most = map(self._text, row.get(f"{self.key}_range", (value, value)))
        return self._text(value) + (f" ({least} to {most})" if least != most else "")

    def coloured(self, row: Row) -> Text:
        """The cell for the terminal."""
        text = self.cell(row)
        return Text(text, "" if self.colour is None else self.colour(text))

    def _text(self, value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if not self.form:
            return shortened(as_text(value), _LONGEST)
        return self.form.format(value * self.scale if isinstance(value, float | int) else value)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns, without the columns in which nothing stands."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    """Sentences below it."""

    def __rich__(self) -> Group:
        """For the terminal: the title at the terminal's width, numbers on the right and never broken."""
        columns = self._columns
        table = rich.table.Table(
            box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=_has_titles(columns)
        )
        for column in columns:
            if self._is_number(column):
                table.add_column(column.title, justify="right", min_width=self._longest_word(column))
            else:
                table.add_column(column.title, overflow="fold")
        for row in self.rows:
            table.add_row(*(column.coloured(row) for column in columns))
        title = [Text(printable(self.title), "bold")] if self.title else []
        return Group(*title, table, *(Text(printable(note)) for note in self.notes))

    def to_markdown(self) -> str:
        """The table and its notes, without the title, which is a heading of the page."""
        columns = self._columns
        lines = [
            [column.title for column in columns],
            ["--:" if self._is_number(column) else "---" for column in columns],
            *([_escaped(column.cell(row)) for column in columns] for row in self.rows),
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join([table, *self.notes])

    @property
    def _columns(self) -> list[Column]:
        return [column for column in self.columns if any(column.cell(row) not in ("", "-") for row in self.rows)]

    def _is_number(self, column: Column) -> bool:
        values = [value for row in self.rows if (value := row.get(column.key)) is not None]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    def _longest_word(self, column: Column) -> int:
        texts = [column.title, *(column.cell(row) for row in self.rows)]
        return max(len(word) for text in texts for word in text.split())


def facts_table(title: str, values: Mapping[str, Any], notes: Sequence[str] = ()) -> Table:
    """A table without a header: what, and its value, in words; facts within a fact stand in lines of their own."""
    rows = [{"what": name, "value": _lines(value)} for name, value in values.items()]
    return Table(title, (Column("", "what"), Column("", "value")), rows, notes)


def numbered(rows: Sequence[Row]) -> list[Row]:
    """The rows with their `number`, from 1, by which a second table goes on with them."""
    return [{"number": number, **row} for number, row in enumerate(rows, start=1)]


def stacked(tables: Sequence[Table]) -> Group:
    """Tables below one another in the terminal, an empty line between them."""
    first, *others = tables
    return Group(first, *(part for table in others for part in (Text(), table)))


def mean_of(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean of each figure over the seeds, `KEY_range` (smallest and largest) and `KEY_by_seed` beside it."""
    row: dict[str, Any] = {}
    for key in found[0]:
        values = [figures[key] for figures in found]
        row |= {key: statistics.mean(values), f"{key}_range": [min(values), max(values)], f"{key}_by_seed": values}
    return row


def _lines(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        return "\n".join(f"{name}: {shortened(as_text(inner), _LONGEST)}" for name, inner in value.items())
    return shortened(as_text(value), _LONGEST)


def _has_titles(columns: Sequence[Column]) -> bool:
    return any(column.title for column in columns)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
