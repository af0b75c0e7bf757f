"""Top-1, top-5, per class and confusion, counted batch by batch in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from mae_deploy.errors import CheckFailed
from mae_deploy.images.read import Array


class Accuracy:
    """What a classifier got right, in whole numbers.

    Args:
        unranked: a score that says nothing of its class (k-NN: no neighbour has it); such a class is never among the
            first five.
    """

    def __init__(self, num_classes: int, *, unranked: float | None = None) -> None:
        self.confusion: Array = np.zeros((num_classes, num_classes), np.int64)
        """Rows are the true classes, columns the ones found."""
        self.in_top5: Array = np.zeros(num_classes, np.int64)
        self.wrong: list[int] = []
        """The images whose class was not found, numbered as they were counted."""
        self.unranked = unranked

    def add(self, scores: Array, labels: Array) -> None:
        """Count one batch: `(B, classes)` scores of any scale, `(B,)` labels. Equal scores rank in the order of the
        classes.

        Raises:
            CheckFailed: a score is NaN or infinite.
        """
        if not np.isfinite(scores).all():
            raise CheckFailed(
                "the scores have NaN or infinite values",
                hint="the weights are damaged, or the arithmetic overflows: try --precision fp32",
            )
        found = scores.argmax(axis=1)
        self.wrong += (self.count + np.flatnonzero(found != labels)).tolist()
        np.add.at(self.confusion, (labels, found), 1)
        own = scores[np.arange(len(labels)), labels][:, None]
        before = np.arange(scores.shape[1])[None] < labels[:, None]
        rank = ((scores > own) | ((scores == own) & before)).sum(axis=1)
        right = rank < 5
        if self.unranked is not None:
            right &= own[:, 0] != self.unranked
        np.add.at(self.in_top5, labels[right], 1)

    @property
    def count(self) -> int:
        """Images counted."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Per cent of the images whose class was found."""
        return 100.0 * int(np.trace(self.confusion)) / self.count

    @property
    def top5(self) -> float:
        """Per cent of the images whose class is among the five with the highest scores."""
        return 100.0 * int(self.in_top5.sum()) / self.count

    def summary(self) -> dict[str, Any]:
        """Top-1 and top-5."""
        return {"top1": self.top1, "top5": self.top5}

    def per_class(self, names: tuple[str, ...]) -> dict[str, dict[str, float | int | None]]:
        """Number of images and top-1 of each class; None where it has no image."""
        totals, right = self.confusion.sum(axis=1), self.confusion.diagonal()
        return {
            name: {"images": int(total), "top1": 100.0 * int(found) / int(total) if total else None}
            for name, total, found in zip(names, totals, right, strict=True)
        }
