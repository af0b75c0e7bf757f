"""A stream while it runs: a live panel on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mae_deploy.commands.stream.record import Record
from mae_deploy.progress import console
from mae_deploy.runtime.video import Video

_LINE_SECONDS = 10.0
_BAR = 24


class View:
    """What is shown of a source."""

    def __init__(self, source: str, video: Video, record: Record) -> None:
        self.source, self._video, self._record = source, video, record
        self.label = ""
        """A classifier's, now."""
        self.patches = 0.0
        """Share of the patches that were computed of the last frame."""
        self.end = ""
        """Why no frame comes any more."""

    def facts(self) -> dict[str, Text | str]:
        """By what it is about."""
        record, counts = self._record, self._video.counts
        total = self._video.num_frames
        of = f" of {total}" if total else ""
        filled = round(self.patches * _BAR)
        bar = Text.assemble(("█" * filled, "yellow"), ("░" * (_BAR - filled), "dim"))
        problems = {"dropped": counts.dropped, "corrupt": counts.corrupt, "lost": counts.lost}
        facts: dict[str, Text | str] = {
            "frames": f"{record.frames}{of}, {record.recent_rate:.1f} a second",
            "patches": Text.assemble(bar, f" {self.patches:4.0%} now, {record.patches:.0%} on average"),
            "latency": f"{latency(record)} ms (p50, p95, p99)",
            "drift": drift(record),
            "source": Text.assemble(
                *((f"{name} {count}   ", "bold red" if count else "") for name, count in problems.items())
            ),
            "label": Text(self.label, "bold green"),
            "last event": self.end or record.last_event,
        }
        return {name: value for name, value in facts.items() if value}

    def row(self) -> list[Text | str]:
        """The same beside other sources."""
        record, counts = self._record, self._video.counts
        lost = " ".join(
            f"{name} {count}"
            for name, count in (("dropped", counts.dropped), ("corrupt", counts.corrupt), ("lost", counts.lost))
            if count
        )
        return [
            short_name(self.source),
            f"{record.frames}",
            f"{record.recent_rate:.1f}",
            f"{self.patches:.0%}",
            latency(record),
            f"{record.audits[-1][1]:.1f}" if record.audits else "-",
            Text(self.label, "bold green"),
            Text.assemble((f"{lost} ", "bold red"), self.end or record.last_event),
        ]

    def line(self) -> str:
        """The same for a log."""
        record, counts = self._record, self._video.counts
        label = f"  {self.label}" if self.label else ""
        return (
            f"frame {record.frames}  {record.recent_rate:.1f} frames/s  {record.patches:.0%} of the patches"
            f"  {latency(record)} ms  dropped {counts.dropped}  drift: {drift(record)}{label}"
        )


class Panels:
    """All sources: one in words, several as rows."""

    def __init__(self, views: Sequence[View], bundle: str) -> None:
        self._views, self._bundle = views, bundle

    def __rich__(self) -> Panel:
        views = self._views
        if len(views) == 1:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for name, value in views[0].facts().items():
                grid.add_row(name, value)
        else:
            grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            for title in ("", "source", "frames", "a second", "patches", "p50 / p95 / p99 ms", "dB", "label", "event"):
                right = title in ("frames", "a second", "patches", "dB")
                grid.add_column(title, justify="right" if right else "left", no_wrap=right)
            for number, view in enumerate(views):
                grid.add_row(str(number), *view.row())
        source = views[0].source if len(views) == 1 else f"{len(views)} sources"
        return Panel(grid, title=f"{source} → {self._bundle}", title_align="left", border_style="dim")

    def lines(self) -> list[str]:
        """For a log."""
        one = len(self._views) == 1
        return [
            f"stream  {'' if one else f'{number} {short_name(view.source)}  '}{view.line()}"
            for number, view in enumerate(self._views)
            if one or not view.end
        ]


@contextmanager
def shown(panels: Panels) -> Iterator[Callable[[], None]]:
    """Show it; yields what is called after each frame."""
    if console.is_terminal:
        with Live(panels, console=console, refresh_per_second=4, transient=True):
            yield lambda: None
        return
    printed = time.monotonic()

    def line() -> None:
        nonlocal printed
        if (now := time.monotonic()) - printed > _LINE_SECONDS:
            printed = now
            for text in panels.lines():
                console.print(text, highlight=False, soft_wrap=True)

    yield line


def short_name(source: str) -> str:
    """A file's own name; anything else is what it is."""
    return source if "://" in source else Path(source).name


def latency(record: Record) -> str:
    """The three percentiles in milliseconds."""
    found = [record.times.milliseconds(share) for share in (0.5, 0.95, 0.99)]
    return " / ".join("-" if value is None else f"{value:.1f}" for value in found)


def drift(record: Record) -> str:
    """What the last audit found."""
    if not record.audits:
        return "no audit yet"
    frame, snr = record.audits[-1]
    return f"{snr:.1f} dB at frame {frame}, worst {record.worst:.1f} dB of {record.num_audits} audits"
