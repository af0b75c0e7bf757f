"""Which mean and standard deviation pixels can have: what cannot be is most often another unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mae_deploy.errors import ConfigError

_WIDEST = 255
"""Divisors from which on pixels are numbers of a file of at most 16 bits; below, floating-point ones of any size."""


def check_statistics(mean: Sequence[float], std: Sequence[float], pixel_max: float | None) -> None:
    """Whether pixels that were divided by `pixel_max`, or by 255, can have these.

    Raises:
        ConfigError: with the unit that was probably meant.
    """
    for name, values in (("mean", mean), ("std", std)):
        if not all(map(math.isfinite, values)):
            raise ConfigError(f"--{name} {_listed(values)} must be finite numbers")
    if wrong := [channel for channel, value in enumerate(std) if value <= 0]:
        only = f" of channel {wrong[0]} (counted from 0)" if len(std) > 1 else ""
        raise ConfigError(
            f"--std {_listed(std)}: the deviation{only} must be above 0, as pixels are divided by it",
            hint="a channel that is constant tells nothing: leave it out; mae-deploy data stats prints mean and std",
        )
    divisor = 255 if pixel_max is None else pixel_max
    if pixel_max is not None and pixel_max < _WIDEST:
        return
    # Sentinel-2's reflectance goes beyond its 10000, but not beyond 16 bits.
    limit = 1.0 if pixel_max is None else max(1.0, 65535 / pixel_max)
    for name, values in (("mean", mean), ("std", std)):
        if max(values, default=0) <= limit and (name == "std" or pixel_max is not None or min(values, default=0) >= 0):
            continue
        known = f"in [0, {limit:g}]" if pixel_max is None else f"at most {limit:g}"
        raise ConfigError(
            f"--{name} {_listed(values)} is not {known}: pixels are divided by {divisor:g} first",
            hint=f"for numbers of undivided pixels, give --{name} {_listed([value / divisor for value in values])}"
            if min(values) >= 0 and max(values) / divisor <= limit
            else "mae-deploy data stats prints mean and std",
        )


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
