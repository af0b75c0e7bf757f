"""A report in a folder: page, data and picture; without matplotlib, and after a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_deploy.errors import MissingDependency
from mae_deploy.reporting.markdown import Page, Picture, write_report
from mae_deploy.reporting.tables import Column, Table


def page(draw: Callable[[Path], None] | None) -> Page:
    return Page(
        title="A title",
        command="mae-deploy compare 'a b'",
        parts=[
            "A sentence.",
            Table("A table", (Column("k", "k"),), [{"k": 5}], ["A note."]),
            *([] if draw is None else [Picture("a picture", draw)]),
        ],
    )


WITHOUT_PICTURE = """# A title

```sh
mae-deploy compare 'a b'
```

A sentence.

## A table

| k |
| --: |
| 5 |

A note.
"""


def draw(path: Path) -> None:
    path.write_bytes(b"PNG")


def test_three_files(tmp_path: Path) -> None:
    write_report(tmp_path / "out", "compare", {"rows": [1]}, page(draw))
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {
        "compare.json": json.dumps({"rows": [1]}, indent=2) + "\n",
        "compare.md": WITHOUT_PICTURE + "\n![a picture](compare.png)\n",
        "compare.png": "PNG",
    }


def test_a_folder_with_files_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_report(tmp_path, "report", {}, page(None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "run"]
    assert (tmp_path / "report.md").read_text() == WITHOUT_PICTURE


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(_: Path) -> None:
        raise MissingDependency("no matplotlib", hint="pip install 'mae-deploy[plot]'")

    write_report(tmp_path / "out", "compare", {}, page(missing))
    assert (tmp_path / "out" / "compare.md").read_text() == WITHOUT_PICTURE
    assert capsys.readouterr().err == "no picture: no matplotlib; pip install 'mae-deploy[plot]'\n"


def test_a_folder_of_its_own_is_whole_or_not_there(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise ValueError("cannot draw")

    with pytest.raises(ValueError, match="cannot draw"):
        write_report(tmp_path / "out", "compare", {}, page(fail))
    assert not list(tmp_path.iterdir())


def test_pictures_stand_where_they_belong_and_have_names(tmp_path: Path) -> None:
    parts: list[str | Table | Picture] = [Picture("first", draw, "a"), "Between.", Picture("second", draw, "b")]
    write_report(tmp_path, "report", {}, Page(title="A title", command="c", parts=parts))
    assert (
        (tmp_path / "report.md").read_text().endswith("![first](report-a.png)\n\nBetween.\n\n![second](report-b.png)\n")
    )


def test_html_is_one_file_and_shows_markup_as_text(tmp_path: Path) -> None:
    table = Table("", (Column("k <b>", "k"),), [{"k": "one\ntwo <script>"}])
    made = Page(title="A & B", command="c", parts=["**bold** <i>", table, Picture("p", draw)])
    write_report(tmp_path, "report", {}, made, html=True)
    text = (tmp_path / "report.html").read_text()
    assert "<title>A &amp; B</title>" in text
    assert "<strong>bold</strong> &lt;i&gt;" in text
    assert "<td>one<br>two &lt;script&gt;</td>" in text
    assert '<img src="data:image/png;base64,UE5H" alt="p"><figcaption>p</figcaption>' in text
    assert "<script" not in text
