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
    assert capsys.readouterr().err == "train  16/1000  16 min left\ntrain  32/1000  16 min left\n"


def test_at_80_columns_the_bar_keeps_steps_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 120):
        written = io.StringIO()
        terminal = Console(file=written, force_terminal=True, width=width, color_system=None)
        monkeypatch.setattr(module, "console", terminal)
        monkeypatch.setattr(module, "draws", lambda: True)
        with progress("distil features", 160_000, done=159_999) as bar:
            bar.advance(1, "loss 2.4842  top-1 41.67 %  1391 img/s  teacher 26% (1206 img/s)  wait 17%")
        last = next(line for line in reversed(written.getvalue().splitlines()) if "distil" in line)
        assert "160000/160000" in last
        assert "0:00:00" in last  # what is left of the time
        assert "loss 2.4842" in last
        assert len(last) <= width + len("\x1b[2K")


def test_a_log_gets_lines_that_a_terminal_does_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress("train", 3) as bar:
        bar.report("epoch 1/3")
    with progress("train", 3, enabled=False) as bar:
        bar.report("epoch 1/3")
    assert capsys.readouterr().err == "train  epoch 1/3\n"
    written = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=written, force_terminal=True, width=80))
    monkeypatch.setattr(module, "draws", lambda: True)
    with progress("train", 3) as bar:
        bar.report("epoch 1/3")
    assert "epoch" not in written.getvalue()


def test_of_several_processes_one_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    notice("data:", "11 images")
    notice("skipped step", "7", own=True)
    assert capsys.readouterr().err == "skipped step 7\n"


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


def test_bars_are_for_somebody_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("CI", "TERM", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "console", Console(file=Terminal()))
    assert module.draws()
    monkeypatch.setenv("CI", "true")
    assert not module.draws()
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert not module.draws()
    monkeypatch.delenv("TERM")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert module.draws()
    monkeypatch.setattr(module, "console", Console(file=io.StringIO()))
    assert not module.draws()  # a log with colours is still a log
