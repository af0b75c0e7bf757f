"""At which image size, and on how many of its patches, an encoder meets a latency: found by measuring."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from mae_deploy.models.config import EncoderConfig

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """How an encoder runs."""

    image_size: tuple[int, int]
    num_patches: int
    """Of an image of this size, N."""
    keep: int
    """Patches that the encoder sees, up to N."""

    @property
    def whole(self) -> bool:
        """Whether it sees all of them."""
        return self.keep == self.num_patches

    def __str__(self) -> str:
        height, width = self.image_size
        patches = f"all {self.keep}" if self.whole else f"{self.keep} of {self.num_patches}"
        return f"{patches} patches at {height}x{width}"


Timed = Callable[[Mapping[K, OperatingPoint], bool], Mapping[K, float]]
"""Seconds of each, measured in turns; for good, or as quickly as a search needs."""


def fewer_tokens(point: OperatingPoint, least: int = 1) -> list[OperatingPoint]:
    """The same images and fewer of their patches, from the fewest on; the last is the point itself."""
    return [replace(point, keep=keep) for keep in range(least, point.keep + 1)]


def smaller_images(config: EncoderConfig) -> list[OperatingPoint]:
    """Smaller images of the same form to the nearest patch, from the smallest on, all of their patches; the last is the
    encoder's own size.
    """
    rows, columns = config.grid_size
    found: dict[tuple[int, int], OperatingPoint] = {}
    for side in range(1, max(rows, columns) + 1):
        grid = (max(1, round(side * rows / max(rows, columns))), max(1, round(side * columns / max(rows, columns))))
        size = (grid[0] * config.patch, grid[1] * config.patch)
        N = grid[0] * grid[1] * config.num_groups
        found[size] = OperatingPoint(size, N, N)
    return list(found.values())


def fit(
    ladders: Mapping[K, Sequence[OperatingPoint]], seconds: float, timed: Timed[K]
) -> dict[K, tuple[OperatingPoint | None, float]]:
    """For each ladder, which grows slower from point to point, the last point within the time, and what it takes; None
    and what the first takes, where that is too slow.

    Bisection by quick measurements, all ladders in turns; what it finds is measured for good, and where it is too slow
    then, the ladder is stepped down by as much, until it is not.
    """
    fits, fails = dict.fromkeys(ladders, -1), {key: len(points) for key, points in ladders.items()}
    while middles := {key: (fits[key] + fails[key]) // 2 for key in ladders if fails[key] - fits[key] > 1}:
        for key, took in timed({key: ladders[key][index] for key, index in middles.items()}, False).items():
            (fits if took <= seconds else fails)[key] = middles[key]
    found: dict[K, tuple[OperatingPoint | None, float]] = {}
    asked = {key: max(0, index) for key, index in fits.items()}
    while asked:
        for key, took in timed({key: ladders[key][index] for key, index in asked.items()}, True).items():
            index = asked.pop(key)
            if took <= seconds:
                found[key] = ladders[key][index], took
            elif index == 0:
                found[key] = None, took
            else:
                asked[key] = min(index - 1, int(index * seconds / took))
    return found
