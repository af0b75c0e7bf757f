"""A stream while it runs: a live panel on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """What is shown of a stream."""

    def __init__(self, title: str, video: Video, record: Record) -> None:
        self._title, self._video, self._record = title, video, record
        self.label = ""
        """A classifier's, now."""
        self.patches = 0.0
        """Share of the patches that were computed of the last frame."""

    def __rich__(self) -> Panel:
        record, counts, grid = self._record, self._video.counts, Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        total = self._video.num_frames
        of = f" of {total}" if total else ""
        grid.add_row("frames", f"{record.frames}{of}, {record.recent_rate:.1f} a second")
        filled = round(self.patches * _BAR)
        bar = Text.assemble(("█" * filled, "yellow"), ("░" * (_BAR - filled), "dim"))
        grid.add_row("patches", Text.assemble(bar, f" {self.patches:4.0%} now, {record.patches:.0%} on average"))
        grid.add_row("latency", f"{latency(record)} ms (p50, p95, p99)")
        grid.add_row("drift", drift(record))
        problems = {"dropped": counts.dropped, "corrupt": counts.corrupt, "lost": counts.lost}
        grid.add_row(
            "source",
            Text.assemble(*((f"{name} {count}   ", "bold red" if count else "") for name, count in problems.items())),
        )
        if self.label:
            grid.add_row("label", Text(self.label, "bold green"))
        if record.last_event:
            grid.add_row("last event", record.last_event)
        return Panel(grid, title=self._title, title_align="left", border_style="dim")

    def line(self) -> str:
        """The same for a log."""
        record, counts = self._record, self._video.counts
        label = f"  {self.label}" if self.label else ""
        return (
            f"stream  frame {record.frames}  {record.recent_rate:.1f} frames/s  {record.patches:.0%} of the patches"
            f"  {latency(record)} ms  dropped {counts.dropped}  drift: {drift(record)}{label}"
        )


@contextmanager
def shown(view: View) -> Iterator[Callable[[], None]]:
    """Show it; yields what is called after each frame."""
    if console.is_terminal:
        with Live(view, console=console, refresh_per_second=4, transient=True):
            yield lambda: None
        return
    printed = time.monotonic()

    def line() -> None:
        nonlocal printed
        if (now := time.monotonic()) - printed > _LINE_SECONDS:
            printed = now
            console.print(view.line(), highlight=False, soft_wrap=True)

    yield line


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
