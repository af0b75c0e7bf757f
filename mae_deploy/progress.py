"""Progress on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from mae_deploy.text import duration, printable

console = Console(stderr=True)
"""Where everything but results goes."""


def draws() -> bool:
    """Whether bars are drawn: on a terminal that somebody looks at. Not in a log, nor in CI, whose terminal is one, and
    not where colours are forced (`FORCE_COLOR`), which rich takes for a terminal.
    """
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal and not os.environ.get("CI")


_LINE_SECONDS = 15.0

_WIDE = 100
"""Columns of a terminal from which a bar has its full length."""


def notice(label: str, text: str, *, own: bool = False) -> None:
    """A line with a yellow label; the text may hold anything, such as a file name that looks like markup.

    Args:
        own: it is about this process alone; of what all processes of a run say, only the first one's is shown.
    """
    if own or os.environ.get("RANK", "0") == "0":
        console.print(Text.assemble((printable(label), "yellow"), " ", printable(text)), soft_wrap=True)


def heading(text: str) -> None:
    """A line in bold above what follows."""
    console.print(Text(text, style="bold"))


class _Note(ProgressColumn):
    """What stands beside the bar, on one line."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Bar:
    """One task's progress."""

    def __init__(self, title: str, total: int, done: int, progress: Progress | None, task: TaskID | None) -> None:
        self._title, self._total, self._done, self._first = title, total, done, done
        self._progress, self._task = progress, task
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on by some steps; the note stands beside the bar."""
        self._done += steps
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=steps, note=note)
        elif (now := time.monotonic()) - self._printed > _LINE_SECONDS or self._done == self._total:
            self._printed = now
            left = (now - self._started) / max(self._done - self._first, 1) * (self._total - self._done)
            words = [self._title, f"{self._done}/{self._total}", note, f"{duration(left)} left"]
            console.print("  ".join(filter(None, words)), highlight=False, soft_wrap=True)

    def report(self, text: str) -> None:
        """A line of its own in a log; on a terminal, the bar and its note have to do."""
        if self._progress is None and self._total >= 0:
            console.print(f"{self._title}  {text}", highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int, *, done: int = 0, enabled: bool = True) -> Iterator[Bar]:
    """Show `total` steps of work, `done` of them behind us."""
    if not enabled or not draws():
        bar = Bar(title, total if enabled else -1, done, None, None)
        if not enabled:
            bar._printed = float("inf")
        yield bar
        return
    # All but the note keep their width: where there is not enough for all, the note is cut.
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24 if console.width >= _WIDE else 8, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _Note(),
    )
    with Progress(*columns, console=console) as live:
        yield Bar(title, total, done, live, live.add_task(title, total=total, completed=done, note=""))


@contextmanager
def percentage(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar of per cent, moved by calls with what is being done and the share of it all, from 0 to 1; full at the
    end.
    """
    with progress(title, 100) as bar:
        done = 0

        def report(note: str, share: float) -> None:
            nonlocal done
            steps = int(100 * share) - done
            done += steps
            bar.advance(steps, note)

        yield report
        if done < 100:
            bar.advance(100 - done)
