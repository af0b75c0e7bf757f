"""Progress on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)
"""Where everything but results goes."""

_LINE_SECONDS = 15.0


def notice(label: str, text: str) -> None:
    """A line with a yellow label; the text may hold anything, such as a file name that looks like markup."""
    console.print(Text.assemble((label, "yellow"), " ", text), soft_wrap=True)


def heading(text: str) -> None:
    """A line in bold above what follows."""
    console.print(Text(text, style="bold"))


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
            console.print(
                f"{self._title}  {self._done}/{self._total}  {note}  {left:.0f} s left", highlight=False, soft_wrap=True
            )


@contextmanager
def progress(title: str, total: int, *, done: int = 0, enabled: bool = True) -> Iterator[Bar]:
    """Show `total` steps of work, `done` of them behind us."""
    if not enabled or not console.is_terminal:
        bar = Bar(title, total if enabled else -1, done, None, None)
        if not enabled:
            bar._printed = float("inf")
        yield bar
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
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
