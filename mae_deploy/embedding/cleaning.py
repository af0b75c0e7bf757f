"""What to clean a collection of: images that are nearly the same as others, and those that are like no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mae_deploy.embedding.neighbours import Exact, Neighbours, Tick
from mae_deploy.images.read import Array

_BLOCK = 256
_CANDIDATES = 32
"""Neighbours of an image among which an index looks for the one that it repeats."""


class Duplicate(NamedTuple):
    """An image that repeats another one, which stays."""

    place: int
    like: int
    cosine: float


def duplicates(found: Neighbours, threshold: float, tick: Tick = lambda _: None) -> list[Duplicate]:
    """Images whose cosine to an earlier one that stays is at least `threshold`, each with the nearest such one.

    Exact with `Exact`; with an index, of each image its 32 nearest ones are looked at.
    """
    stays = np.ones(len(found.rows), bool)
    repeated = list[Duplicate]()
    for place, earlier, cosines in _earlier(found, threshold, tick):
        kept = stays[earlier]
        if kept.any():
            best = int(np.argmax(np.where(kept, cosines, -np.inf)))
            stays[place] = False
            repeated.append(Duplicate(place, int(earlier[best]), float(cosines[best])))
    return repeated


def _earlier(found: Neighbours, threshold: float, tick: Tick) -> Iterator[tuple[int, Array, Array]]:
    """Each image that has near ones before it, with these in order, and their cosines."""
    rows = found.rows
    for first in range(0, len(rows), _BLOCK):
        part = rows[first : first + _BLOCK]
        if isinstance(found, Exact):
            cosines = part @ rows[: first + len(part)].T
            near = cosines >= threshold
            for row in np.nonzero(near.any(axis=1))[0].tolist():
                (places,) = np.nonzero(near[row, : first + row])
                yield first + row, places, cosines[row, places]
        else:
            places, cosines = found.nearest(part, _CANDIDATES)
            for row in range(len(part)):
                order = np.argsort(places[row])
                chosen = order[(places[row, order] < first + row) & (cosines[row, order] >= threshold)]
                yield first + row, places[row, chosen], cosines[row, chosen]
        tick(len(part))


def outliers(found: Neighbours, k: int, count: int, tick: Tick = lambda _: None) -> list[tuple[int, float]]:
    """The images that are farthest from their k nearest others, farthest first: place, and 1 minus the mean cosine."""
    _, cosines = found.others(k, tick)
    distances = 1 - cosines.mean(axis=1)
    farthest = np.argsort(-distances, kind="stable")[:count]
    return [(int(place), float(distances[place])) for place in farthest]
