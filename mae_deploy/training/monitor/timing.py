"""Where a step's time goes: to its named parts, such as a teacher, to the network that is trained, to waiting for
data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


class StepTimer:
    """Seconds of the named parts of one step; on a GPU between events on its stream, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what the block takes to a part."""
        if not self._cuda:
            before = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._spans.append((name, first, last))

    def seconds(self) -> dict[str, float]:
        """Seconds by part; on a GPU once the step's own numbers have arrived: its events have passed by then."""
        for name, first, last in self._spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        self._spans.clear()
        return self._seconds


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step took, as it is shown and logged."""

    images: int
    """Of all processes."""
    seconds: float
    """From the launch of the step before to that of this one."""
    waited: float
    """Of them, those in which there was no batch."""
    parts: dict[str, float]
    """Seconds of the named parts."""

    @property
    def student(self) -> float:
        """Seconds of the rest: forward and backward pass and update. On a GPU, which works on while the host waits, an
        estimate.
        """
        return max(self.seconds - self.waited - sum(self.parts.values()), 0.0)

    def metrics(self) -> dict[str, float]:
        """Numbers of a line in `metrics.jsonl`."""
        found = {
            "images_per_second": round(self.images / self.seconds, 2),
            "data_wait": round(self.waited / self.seconds, 4),
        }
        timed = self.parts | {"student": self.student} if self.parts else {}
        return found | {f"{name}_seconds": round(seconds, 6) for name, seconds in timed.items()}

    def note(self) -> str:
        """Words beside the bar: `412 img/s  teacher 35% (1180 img/s)  student 680 img/s  wait 4%`."""
        words = [f"{self.images / self.seconds:.0f} img/s"]
        words += [
            f"{name} {seconds / self.seconds:.0%} ({self.images / seconds:.0f} img/s)"
            for name, seconds in self.parts.items()
            if seconds > 0
        ]
        if self.parts and self.student > 0:
            words.append(f"student {self.images / self.student:.0f} img/s")
        return "  ".join([*words, f"wait {self.waited / self.seconds:.0%}"])
