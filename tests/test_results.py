"""Results go to stdout, what to do next to stderr, and neither is more than it has to be."""

from __future__ import annotations

import pytest

from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.tables import facts_table
from mae_deploy.results import Result, show


def test_what_to_do_next_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result({"a": 1}, facts_table("", {"a": 1}), then=next_command("export", "my run", out="b[1]"))
    show(result, as_json=False)
    said = capsys.readouterr()
    assert said.out == "a  1\n"
    assert said.err == "Next: mae-deploy export 'my run' --out 'b[1]'\n"
    show(result, as_json=True)
    said = capsys.readouterr()
    assert said.out == '{\n  "a": 1\n}\n'
    assert said.err == ""


def test_a_terminal_of_no_columns_hides_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    show(Result({"size": 7}), as_json=False)
    assert "size  7" in capsys.readouterr().out


def test_lines_of_a_table_end_where_their_text_does(capsys: pytest.CaptureFixture[str]) -> None:
    show(Result({}, facts_table("Title", {"short": "a", "name": "much longer"})), as_json=False)
    assert capsys.readouterr().out == "Title\nshort  a\nname   much longer\n"
