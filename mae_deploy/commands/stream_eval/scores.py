"""How near features are to the true ones: temporal signal-to-noise ratios, and a linear probe; frame by frame, so that
memory does not follow the length of a video.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mae_deploy.images.read import Array

_MOST = 99.0
"""dB, where there is no error."""
_RIDGE = 1e-3
"""Of the probe, as a share of the features' mean variance."""


class Signal:
    """Energy of the true features' deviation from their mean over the frames, of each output."""

    def __init__(self) -> None:
        self._first: dict[str, Array] = {}
        self._total: dict[str, Array] = {}
        self._squares: dict[str, float] = {}
        self._frames = 0

    def add(self, true: Mapping[str, Array]) -> None:
        """One frame's true features."""
        self._frames += 1
        for name, value in true.items():
            if name not in self._first:
                self._first[name] = value.copy()
                self._total[name], self._squares[name] = np.zeros(value.shape), 0.0
            away = value - self._first[name]  # from the first frame: small numbers, whose squares lose nothing
            self._total[name] += away
            self._squares[name] += squared(away)

    def energy(self, name: str) -> float:
        """A frame's, on average."""
        return self._squares[name] / self._frames - squared(self._total[name] / self._frames)

    @property
    def names(self) -> list[str]:
        """The outputs."""
        return list(self._first)


def squared(values: Array) -> float:
    """The sum of squares."""
    flat = values.astype(np.float64, copy=False).ravel()
    return float(flat @ flat)


def decibels(signal: float, error: float) -> float:
    """A ratio of energies, at most 99 dB, and at least -99."""
    if error <= 0:
        return _MOST
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / error), -_MOST, _MOST))


class Probe:
    """A linear classifier of patches, fitted in closed form (ridge regression on 0 and 1)."""

    def __init__(self, weights: Array | None = None) -> None:
        """Begin with nothing, or with the weights `(D + 1,)` of another one."""
        self._weights = weights
        self._gram: Array | None = None
        self._target: Array | float = 0.0

    def add(self, tokens: Array, labels: Array) -> None:
        """A frame's tokens `(N, D)` and labels `(N,)`."""
        rows = _with_one(tokens)
        self._gram = rows.T @ rows + (0 if self._gram is None else self._gram)
        self._target = rows.T @ labels + self._target

    def fit(self) -> None:
        """Find the weights."""
        assert self._gram is not None
        penalty = _RIDGE * np.trace(self._gram) / len(self._gram) * np.eye(len(self._gram))
        penalty[-1, -1] = 0  # the constant is free
        self._weights = np.linalg.solve(self._gram + penalty, self._target)

    @property
    def weights(self) -> Array:
        """`(D + 1,)`, the constant last."""
        assert self._weights is not None
        return self._weights

    def scores(self, tokens: Array) -> Array:
        """`(N,)` float32."""
        found: Array = (_with_one(tokens) @ self.weights).astype(np.float32)
        return found


def average_precision(scores: Array, labels: Array) -> float | None:
    """Mean of the precision at each positive, from the highest score down; equal scores count together. None without
    positives.
    """
    positives = int(labels.sum())
    if not positives:
        return None
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    precision, recall = hits[last] / (last + 1), hits[last] / positives
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def _with_one(tokens: Array) -> Array:
    return np.concatenate([tokens, np.ones((len(tokens), 1))], axis=1, dtype=np.float64)
