"""Weights of the objectives over a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mae_deploy.distill.config import Schedule


@dataclass(frozen=True, slots=True)
class Weight:
    """An objective's weight: a number, and what it is multiplied by over the run."""

    value: float
    schedule: Schedule | None = None
    """Points (share of the run, factor) with straight lines between them, the first and last factor before and after;
    None: 1 throughout."""

    def at(self, done: float) -> float:
        """The weight where a share of the run's steps is done."""
        if self.schedule is None:
            return self.value
        shares, factors = zip(*self.schedule, strict=True)
        return self.value * float(np.interp(done, shares, factors))
