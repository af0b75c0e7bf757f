"""Help pages at the widths of terminals: what stands on them, and that they fit."""

from __future__ import annotations

import re

import pytest

from mae_deploy.cli import main
from mae_deploy.help_page import WIDEST, Entry, page
from tests.test_options import options_of_commands

ENTRIES = [
    Entry("Options", "--out", "Run folder to write.", "PATH", "required"),
    Entry("Common", "--precision", "Arithmetic of the forward pass: [bold] is no markup here.", "auto|fp32|bf16|fp16"),
    Entry("Options", "--resume", "Go on."),
]


def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert page("tool DATA", "One line.\n\nAnother that\n  is broken.", ENTRIES, last="The end.") == (
        "Usage: tool DATA\n"
        "\n"
        "One line.\n"
        "\n"
        "Another that is broken.\n"
        "\n"
        "Options\n"
        "  --out PATH                Run folder to write. [required]\n"
        "  --resume                  Go on.\n"
        "\n"
        "Common\n"
        "  --precision               Arithmetic of the forward pass: [bold] is no\n"
        "    auto|fp32|bf16|fp16     markup here.\n"
        "\n"
        "The end."
    )


def test_headings_have_an_order_and_are_left_out_where_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = page("tool", "", ENTRIES, headings=["Common", "Nothing"])
    assert text.index("Common") < text.index("Options")
    assert "Nothing" not in text


@pytest.mark.parametrize(("columns", "widest"), [(60, 60), (80, 80), (200, WIDEST)])
def test_a_page_is_as_wide_as_the_terminal_and_readable(
    columns: int, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = page("tool", "word " * 100, [Entry("Options", "--a", "word " * 100)]).splitlines()
    assert widest - 6 < max(map(len, lines)) <= widest


def test_the_list_of_commands_fits_a_laptop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 55
    found = re.findall(r"^  ([a-z][a-z-]+(?: [a-z]+)?)  +\S", text, re.MULTILINE)
    assert sorted(found) == sorted(options_of_commands())
    assert [line for line in lines if re.fullmatch(r"[A-Z][a-z ]+", line)] == [
        "Start",
        "Train",
        "Evaluate",
        "Export and deploy",
        "Data",
        "Weights",
        "Options",
    ]


@pytest.mark.parametrize("name", options_of_commands())
def test_help_of_a_command_shows_what_matters_and_says_where_the_rest_is(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert main([*name.split(), "--help-all"]) == 0
    everything = capsys.readouterr().out
    shown, all_of_them = (re.findall(r"^  (--[\w-]+)", found, re.MULTILINE) for found in (text, everything))
    assert 1 <= len([option for option in shown if not option.startswith("--help")]) <= 15, shown
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 90
    assert "Not used" not in everything
    assert "bool" not in everything.casefold()
    known = {option.split("/")[0] for option in options_of_commands()[name]}
    assert set(all_of_them) - {"--help"} <= known
    more = len(set(all_of_them) - set(shown) - {"--help-all"})
    last = text.splitlines()[-1]
    assert last == f"… {more} more options: mae-deploy {name} --help-all" if more else "--help" in text
