"""What a run says while it works: a bar on a terminal, a line now and then elsewhere, nothing from the other
processes.
"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mae_deploy import progress as module
from mae_deploy.progress import notice, percentage, progress


def test_a_log_file_gets_a_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3, done=1) as bar:
        bar.advance(1, "loss 2")
        assert capsys.readouterr().err == ""
        bar.advance(1, "loss 1")
    assert capsys.readouterr().err == "train  3/3  loss 1  0 s left\n"


def test_and_one_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mae_deploy.progress.time.monotonic", lambda: now)
    with progress("train", 1000) as bar:
        for _ in range(40):
            now += 1
            bar.advance()
    # After more than 15 seconds each; a second a step is left for each step that is left.
    assert capsys.readouterr().err == "train  16/1000    984 s left\ntrain  32/1000    968 s left\n"


@pytest.mark.parametrize("shares", [(0.25, 0.999), (0.25, 1.0), ()])
def test_a_percentage_is_full_at_the_end(shares: tuple[float, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with percentage("build") as report:
        for share in shares:
            report("tactics", share)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("build  100/100 ")


def test_a_percentage_of_what_failed_is_not_full(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with percentage("build") as report:
            report("tactics", 0.5)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert capsys.readouterr().err == ""


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 2, enabled=False) as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=out, force_terminal=True, width=120))
    with progress("train", 4, done=1) as bar:
        bar.advance(3, "loss 1")
    assert "4/4" in out.getvalue()
    assert "loss 1" in out.getvalue()


def test_a_notice_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """Markup of rich's in a file name, and a line far wider than a terminal."""
    text = "[red]a[/blue].png: " + "x" * 300
    notice("skipped", text)
    assert capsys.readouterr().err == f"skipped {text}\n"
