"""The table in the terminal and in Markdown: what stands in its cells, which columns it leaves out, how narrow it can
be.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from mae_deploy.reporting.tables import Column, Table, facts_table, mean_of, numbered, stacked
from tests.reporting.printed import cells


def printed(view: Any, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(view)
    return out.getvalue()


COLUMNS = (
    Column("name", "name"),
    Column("top-1, %", "top1", "{:.1f} %", 100),
    Column("sizes", "sizes"),
    Column("never", "never"),
)
ROWS: list[dict[str, Any]] = [
    {"name": "a[/x]|b", "top1": 0.5, "sizes": [3, 5]},
    {"name": "c", "top1": None, "sizes": []},
    {"name": "d", "top1": float("nan")},
]


def test_a_terminal_shows_words_and_no_python() -> None:
    text = printed(Table("a title", COLUMNS, ROWS, ["a note"]))
    lines = [line.rstrip() for line in text.splitlines()]
    assert (lines[0], lines[-1]) == ("a title", "a note")
    assert lines[1].split() == ["name", "top-1,", "%", "sizes"]
    assert [line.split() for line in lines[3:-1]] == [
        ["a[/x]|b", "50.0", "%", "3,", "5"],
        ["c", "-", "-"],
        ["d", "-", "-"],
    ]


def test_markdown_escapes_bars_and_aligns_numbers() -> None:
    assert Table("a title", COLUMNS, ROWS, ["a note"]).to_markdown() == (
        "| name | top-1, % | sizes |\n| --- | --: | --- |\n"
        "| a[/x]\\|b | 50.0 % | 3, 5 |\n| c | - | - |\n| d | - | - |\n\na note"
    )


@pytest.mark.parametrize("width", [40, 80])
def test_names_are_folded_and_numbers_are_not(width: int) -> None:
    rows = [{"name": f"runs/{'x' * 100}/last", "rate": 1234567.25, "spread": 1.5, "spread_range": [1.25, 1.75]}]
    columns = (Column("name", "name"), Column("images/s", "rate", "{:.2f}"), Column("of all", "spread", "{:.2f}"))
    text = printed(Table("", columns, rows), width)
    assert max(map(len, text.splitlines())) <= width
    assert "1234567.25" in text
    assert text.count("x") == 100


def test_a_mean_has_its_range_where_seeds_differ() -> None:
    row = mean_of([{"top1": 50.0, "loss": 2.0}, {"top1": 51.0, "loss": 2.0}])
    assert row["top1_by_seed"] == [50.0, 51.0]
    assert Column("", "top1", "{:.1f}").cell(row) == "50.5 (50.0 to 51.0)"
    assert Column("", "loss", "{:.1f}").cell(row) == "2.0"
    intervals = {"top1_interval": [44.1, 56.9], "loss_interval": [2.0, 2.0]}
    assert Column("", "top1", "{:.1f}").cell({**row, **intervals}) == "50.5 ± 6.4"
    assert Column("", "loss", "{:.1f}").cell({**row, **intervals}) == "2.0"


def test_facts_have_no_header_and_inner_facts_have_lines() -> None:
    table = facts_table(
        "a[/x]", {"kind": "mae", "metrics": {"top1": 51.25, "seeds": [0, 1]}, "classes": None, "files": []}
    )
    lines = [line.split() for line in printed(table).splitlines()]
    assert lines == [
        ["a[/x]"],
        ["kind", "mae"],
        ["metrics", "top1:", "51.25"],
        ["seeds:", "0,", "1"],
        ["classes", "-"],
        ["files", "-"],
    ]
    assert table.to_markdown().splitlines()[:4] == [
        "|  |  |",
        "| --- | --- |",
        "| kind | mae |",
        "| metrics | top1: 51.25<br>seeds: 0, 1 |",
    ]


def test_tables_below_one_another() -> None:
    rows = numbered([{"name": "a"}, {"name": "b"}])
    tables = [Table(title, (Column("#", "number"), Column("name", "name")), rows) for title in ("first", "second")]
    text = printed(stacked(tables))
    assert cells(text) == [["1", "a"], ["2", "b"]] * 2
    assert "\n\nsecond\n" in text


def test_a_colour_is_the_cells_own() -> None:
    out = io.StringIO()
    table = Table(
        "", (Column("result", "result", colour={"ok": "green", "miss": "red"}.__getitem__),), [{"result": "miss"}]
    )
    Console(file=out, force_terminal=True, color_system="standard").print(table)
    assert "\x1b[31mmiss" in out.getvalue()
