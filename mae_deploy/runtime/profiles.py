"""The sizes of batches and patches that a TensorRT engine is built for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mae_deploy.errors import ConfigError

Range = tuple[int, int, int]
"""Smallest, usual and largest."""

Profile = dict[str, Range]
"""The sizes that one optimisation profile is for: `{"B": (1, 8, 32), "K": (20, 49, 196)}`; a graph of all patches has
no K."""

_PROFILE_HINT = "write min,opt,max for B, K or both, such as 'B:1,8,32 K:20,49,196'; several are separated by ';'"


def read_profiles(text: str | None) -> list[Profile]:
    """`B:1,1,1 K:49,49,49; B:8,32,64 K:20,49,196` as profiles; none for None.

    Raises:
        ConfigError: it is not written so.
    """
    return [] if text is None else [_read_profile(part, text) for part in text.split(";")]


def covering(profiles: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """The smallest, usual and largest size over all profiles; usual is that of the first."""
    names = profiles[0]
    return {
        name: [min(p[name][0] for p in profiles), profiles[0][name][1], max(p[name][2] for p in profiles)]
        for name in names
    }


def batch_that_fits(profiles: Sequence[Mapping[str, Sequence[int]]], batch: int, keep: int | None) -> int | None:
    """How many samples at a time an engine of these profiles takes, where it is given `batch` of them with `keep`
    patches each.

    `batch` itself if a profile holds it, or there are no profiles; else the largest batch below it, else the smallest
    above it, which has to be filled up. None: no profile holds `keep`.
    """
    if not profiles:
        return batch
    ranges = [
        profile["B"]
        for profile in profiles
        if keep is None or "K" not in profile or profile["K"][0] <= keep <= profile["K"][2]
    ]
    if not ranges:
        return None
    below = [min(most, batch) for least, _, most in ranges if least <= batch]
    return max(below) if below else min(least for least, _, _ in ranges)


def _read_profile(text: str, whole: str) -> Profile:
    found: Profile = {}
    for part in text.split():
        match = re.fullmatch(r"([BK]):(\d+),(\d+),(\d+)", part)
        numbers = [int(number) for number in match.groups()[1:]] if match else []
        if match is None or not 1 <= numbers[0] <= numbers[1] <= numbers[2] or match[1] in found:
            raise ConfigError(f"--profile '{whole}' is not min,opt,max", hint=_PROFILE_HINT)
        found[match[1]] = (numbers[0], numbers[1], numbers[2])
    if not found:
        raise ConfigError(f"--profile '{whole}' is not min,opt,max", hint=_PROFILE_HINT)
    return found
