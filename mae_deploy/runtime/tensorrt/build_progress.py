"""How far a TensorRT build is, from the phases within phases that its progress monitor tells."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """Takes what a progress monitor tells, from any thread, and reports the phase at work and the share of the whole,
    from 0 to 1.

    The steps of a phase that has a parent are a part of the parent's current step. What a report raises, a Ctrl-C
    included, ends the build at its next step instead of unwinding through TensorRT: it stays in `error`.

    rich shows several tasks, but none is a part of another: what phases add up to, and a line for a log file, is
    reckoned here.
    """

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self.error: BaseException | None = None
        self._report = report
        self._phases: dict[str, _Phase] = {}
        self._share = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, number: int) -> bool:
        """Step `number`, from 0, of a phase is done; returns whether to go on."""
        try:
            with self._lock:
                if name in self._phases:
                    self._phases[name].done = number + 1
                roots = [root for root, phase in self._phases.items() if phase.parent not in self._phases]
                self._share = max([self._share, *(self._share_of(root) for root in roots)])
                if self.error is None:
                    self._report(name, self._share)
        except BaseException as error:
            self.error = error
        return self.error is None

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(name, None)

    def _share_of(self, name: str) -> float:
        phase = self._phases[name]
        inner = max(
            (self._share_of(child) for child, found in self._phases.items() if found.parent == name), default=0.0
        )
        return min((phase.done + inner) / phase.steps, 1.0)
