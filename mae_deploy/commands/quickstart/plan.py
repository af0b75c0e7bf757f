"""What the quickstart does, stage by stage, and how long that takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mae_deploy.progress import console, heading
from mae_deploy.reporting.tables import Column, Row, Table

_RATE = 90.0
"""GFLOP/s at which one thread of the machine multiplied matrices on which the seconds of `stages` were measured."""

_SIZE = 768


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the quickstart."""

    title: str
    seconds: float
    """On a thread of the machine with `_RATE`, with nothing beside it."""


def stages(*, seeds: int, engines: int) -> list[Stage]:
    """All of it, in order."""
    return [
        Stage("pretrain a masked autoencoder on 1,400 digits without labels", 75),
        Stage("distil its features into a smaller student, still without labels", 30),
        Stage("learn from few labels: fine-tune, distil, and both networks from scratch", 47 * seeds),
        Stage("export to ONNX and check against PyTorch", 2),
        Stage("time ViT-S and ViT-B: all patches or a quarter, FP32 or INT8", 32 * engines),
        Stage("follow a stream of made frames: whole, or what changed", 22),
        Stage("draw pictures and write the report", 4),
    ]


@dataclass
class Plan:
    """The stages with the seconds expected here, and those that they took."""

    stages: list[Stage]
    slowness: float
    """Seconds here for one of `Stage.seconds`."""
    rows: list[Row] = field(default_factory=list)
    """Of each finished stage its title and both."""

    @classmethod
    def for_this_machine(cls, *, seeds: int, engines: int) -> Plan:
        """The plan, by a third of a second of matrix products."""
        return cls(stages(seeds=seeds, engines=engines), _RATE / _measured_rate())

    def show(self) -> None:
        """Print it, on stderr."""
        planned = [self._planned(stage) for stage in self.stages]
        rows = [
            {"number": number, "stage": stage.title, "planned": seconds}
            for number, (stage, seconds) in enumerate(zip(self.stages, planned, strict=True), 1)
        ]
        total = sum(planned) / 60
        columns = (Column("", "number"), Column("stage", "stage"), Column("about", "planned", "{:.0f} s"))
        note = f"About {total:.0f} min in all, if nothing else runs here; a killed run goes on where it was."
        console.print(Table("Quickstart", columns, rows, [note]))

    @contextmanager
    def next(self) -> Iterator[None]:
        """Do the next stage within."""
        stage = self.stages[len(self.rows)]
        heading(f"{len(self.rows) + 1}/{len(self.stages)} {stage.title}")
        started = time.monotonic()
        yield
        taken = time.monotonic() - started
        self.rows.append({"stage": stage.title, "planned_seconds": self._planned(stage), "seconds": round(taken, 1)})

    def _planned(self, stage: Stage) -> float:
        return round(self.slowness * stage.seconds)


def _measured_rate() -> float:
    """GFLOP/s of the fastest of some products of matrices; by CPU time, so that what else runs counts for less."""
    a = torch.ones(_SIZE, _SIZE)
    seconds = []
    for _ in range(20):
        started = time.process_time()
        torch.matmul(a, a)
        seconds.append(time.process_time() - started)
    return 2 * _SIZE**3 / min(seconds) / 1e9
