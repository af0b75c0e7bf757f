"""Timing that survives a shared machine: the candidates take turns, and medians are compared."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np

from mae_deploy.errors import ConfigError

K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """The durations of one candidate's calls, in seconds, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return self.percentile(50)

    def percentile(self, percent: float) -> float:
        """The duration, in seconds, that this share of the calls does not exceed (linear between two calls)."""
        return float(np.percentile(self.seconds, percent))

    def ratio(self, baseline: Timing) -> float:
        """This median over the baseline's: 0.25 takes a quarter of its time."""
        return self.median / baseline.median

    def to_dict(self) -> dict[str, float]:
        """Median, percentiles and extremes in milliseconds, and the number of calls."""
        marks = {"min_ms": 0, "p50_ms": 50, "p95_ms": 95, "p99_ms": 99, "max_ms": 100}
        return {
            **{name: self.percentile(percent) * 1000 for name, percent in marks.items()},
            "calls": len(self.seconds),
        }


def measure(
    functions: Mapping[K, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    after_call: Callable[[], object] | None = None,
) -> dict[K, Timing]:
    """Time functions in turns, so that what slows the machine for a while slows all of them alike.

    The order is another one in each round: in A B A B …, whatever comes back as often as a round would meet one alone.

    Args:
        functions: what to call, by name.
        repeats: timed rounds.
        warmup: rounds before them, not timed.
        clock: gives seconds.
        after_call: called after every call, warm-up included, while the clock stands; shows progress.

    Raises:
        ConfigError: no functions, no repeats, or a negative warm-up.
    """

    def timed(function: Callable[[], object]) -> float:
        start = clock()
        function()
        return clock() - start

    return take_turns(
        {name: partial(timed, function) for name, function in functions.items()},
        repeats=repeats,
        warmup=warmup,
        after_call=after_call,
    )


def take_turns(
    functions: Mapping[K, Callable[[], float]],
    *,
    repeats: int,
    warmup: int,
    after_call: Callable[[], object] | None = None,
) -> dict[K, Timing]:
    """As `measure`, for functions that return the seconds that they took, by another clock.

    Raises:
        ConfigError: as `measure`.
    """
    if not functions or repeats < 1 or warmup < 0:
        raise ConfigError(f"nothing to time: {len(functions)} functions, {repeats} repeats, {warmup} warm-up rounds")
    seconds: dict[K, list[float]] = {name: [] for name in functions}
    order, chance = list(functions), random.Random(0)
    for turn in range(warmup + repeats):
        if turn >= warmup:
            chance.shuffle(order)
        for name in order:
            seconds[name].append(functions[name]())
            if after_call is not None:
                after_call()
    return {name: Timing(tuple(values[warmup:])) for name, values in seconds.items()}
