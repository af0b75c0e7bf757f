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
        parts=["A sentence.", Table("A table", (Column("k", "k"),), [{"k": 5}], ["A note."])],
        picture=None if draw is None else Picture("a picture", draw),
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
