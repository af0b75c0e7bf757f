"""What is remembered of a stream while it runs, in memory that does not grow with its frames."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_deploy.runtime.streams.stream import Seen
from mae_deploy.runtime.video import Frame

_FEWEST, _MOST = 1e-5, 1e3
"""Seconds of the shortest and the longest time that is told from others."""
_STEPS = 2048
"""A step is 0.9 %."""
_POINTS = 1000
"""Of the curves; twice as many are merged two by two."""
_EVENTS = 200
_RECENT = 5.0
"""Seconds over which the rate is told."""


class Times:
    """A distribution of times, to 1 %."""

    def __init__(self) -> None:
        self._counts = np.zeros(_STEPS, np.int64)
        self._scale = (_STEPS - 1) / np.log(_MOST / _FEWEST)

    def add(self, seconds: float) -> None:
        """Count one."""
        place = self._scale * np.log(max(seconds, _FEWEST) / _FEWEST)
        self._counts[min(_STEPS - 1, round(place))] += 1

    def milliseconds(self, share: float) -> float | None:
        """What so large a share of the times does not exceed; None without any."""
        total = self._counts.sum()
        if not total:
            return None
        place = int(np.searchsorted(np.cumsum(self._counts), share * total))
        return float(1000 * _FEWEST * np.exp(place / self._scale))


@dataclass(slots=True)
class Point:
    """The mean of some frames after one another."""

    frame: float
    patches: float
    """Share of all that were computed."""
    milliseconds: float


class Record:
    """Figures of a stream until now."""

    def __init__(self, num_patches: int) -> None:
        self._num_patches = num_patches
        self._started = time.monotonic()
        self._ended: float | None = None
        self._recent: deque[float] = deque(maxlen=512)
        self.frames = 0
        self.times = Times()
        self.points: list[Point] = []
        self.step = 1
        """How many frames a point is the mean of."""
        self.whole: Counter[str] = Counter()
        """Why frames were computed whole, and how often."""
        self.audits: list[tuple[int, float]] = []
        """Frame and decibels of the last ones."""
        self.num_audits = 0
        self.worst: float | None = None
        self.labels: list[dict[str, Any]] = []
        """Changes of the label: the last ones."""
        self.num_labels = 0
        self.events: list[dict[str, Any]] = []
        """What happened to the source: the last ones."""
        self.last_event = ""
        self._patches = self._cost = 0.0
        self._sums = np.zeros(3)
        self._summed = 0

    def add(self, frame: Frame, seen: Seen, seconds: float) -> None:
        """Take a frame, computed in so many seconds."""
        share = len(seen.keep) / self._num_patches
        self.frames += 1
        self._recent.append(time.monotonic())
        self._patches += share
        self._cost += seen.cost
        self.times.add(seconds)
        self._extend(np.array([frame.index, share, 1000 * seconds]))
        if seen.event is not None:
            self.whole[seen.event] += 1
            self.last_event = f"{seen.event} at frame {frame.index}"
        if seen.snr is not None:
            self.num_audits += 1
            self.worst = seen.snr if self.worst is None else min(self.worst, seen.snr)
            self.audits = [*self.audits[1 - _POINTS :], (frame.index, seen.snr)]
        for event in frame.events:
            self.events = [*self.events[1 - _EVENTS :], {"frame": frame.index, "time": frame.time, "event": event}]
            self.last_event = f"{event} at frame {frame.index}"

    def add_label(self, frame: Frame, name: str, share: float) -> None:
        """The label has changed."""
        self.num_labels += 1
        row = {"frame": frame.index, "time": frame.time, "label": name, "probability": round(share, 4)}
        self.labels = [*self.labels[1 - _EVENTS :], row]

    @property
    def seconds(self) -> float:
        """From the beginning to the end, or until now."""
        return (self._ended or time.monotonic()) - self._started

    @property
    def ended(self) -> bool:
        """Whether no frame comes any more."""
        return self._ended is not None

    def end(self) -> None:
        """No frame comes any more."""
        self._ended = time.monotonic()

    @property
    def rate(self) -> float:
        """Frames a second from beginning to end."""
        return self.frames / max(self.seconds, 1e-9)

    @property
    def recent_rate(self) -> float:
        """Frames a second of the last seconds."""
        now = time.monotonic()
        since = max(now - _RECENT, self._recent[0] if len(self._recent) == self._recent.maxlen else self._started)
        return sum(at >= since for at in self._recent) / max(now - since, 1e-9)

    @property
    def patches(self) -> float:
        """Mean share of the patches that were computed."""
        return self._patches / max(1, self.frames)

    @property
    def cost(self) -> float:
        """Mean of the operations, as a share of those of a whole frame."""
        return self._cost / max(1, self.frames)

    def _extend(self, values: Any) -> None:
        self._sums += values
        self._summed += 1
        if self._summed < self.step:
            return
        self.points.append(Point(*(self._sums / self._summed).tolist()))
        self._sums[:], self._summed = 0, 0
        if len(self.points) == 2 * _POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [
                Point(
                    (one.frame + two.frame) / 2,
                    (one.patches + two.patches) / 2,
                    (one.milliseconds + two.milliseconds) / 2,
                )
                for one, two in pairs
            ]
            self.step *= 2
