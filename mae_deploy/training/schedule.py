"""Linear warm-up and half-cycle cosine, by fractional epoch (paper, appendix A)."""

from __future__ import annotations

import math


def learning_rate(epoch: float, *, peak: float, min_lr: float, warmup_epochs: float, epochs: int) -> float:
    """The learning rate at a fractional epoch, counted from 0."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def resolve_warmup(warmup_epochs: float | None, *, paper: float, epochs: int) -> float:
    """What was asked for, else the paper's number but at most a tenth of the run."""
    return min(paper, epochs / 10) if warmup_epochs is None else warmup_epochs
