"""How a TensorRT engine is to be built: options, and the sizes that it is built for. Nothing is imported here but what every device has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mae_deploy.errors import ConfigError

Range = tuple[int, int, int]
"""Smallest, usual and largest."""

Profile = dict[str, Range]
"""The sizes that one optimisation profile is for: `{"B": (1, 8, 32), "K": (20, 49, 196)}`; a graph of all patches has no K."""

_PROFILE_HINT = "write min,opt,max for B, K or both, such as 'B:1,8,32 K:20,49,196'; several are separated by ';'"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """TensorRT."""

    workspace: int = 4096
    """Memory in MiB that a kernel may work in; a GPU with less gives what it has."""
    optimization_level: int | None = None
    """From 0 (short build) to 5 (long build, every kernel tried); default: TensorRT's own, 3."""
    timing_cache: str = "auto"
    """Folder where timings of kernels are kept for the next build, in a file for each TensorRT version, GPU and set of options;
    auto: ~/.cache/mae-deploy/tensorrt; off: none."""
    hardware_compatible: Literal["none", "same", "ampere"] = "none"
    """Which other GPUs the engine also runs on, at a cost in speed: none; same: all of this compute capability (TensorRT 10.9 or later);
    ampere: all from compute capability 8.0 on."""
    version_compatible: bool = False
    """Let later TensorRT versions of the same major run the engine."""
    strip: bool = False
    """Leave the weights out of the engine file and take them from the bundle's graph when it is loaded (TensorRT 10 or later)."""
    refit: bool = False
    """Let other weights be put into the engine later."""

    def __post_init__(self) -> None:
        if self.workspace < 1:
            raise ConfigError(f"--workspace {self.workspace} must be at least 1 MiB")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"--optimization-level {self.optimization_level} must be within 0 and 5")


def read_profiles(text: str | None) -> list[Profile]:
    """`B:1,1,1 K:49,49,49; B:8,32,64 K:20,49,196` as profiles; none for None.

    Raises:
        ConfigError: it is not written so.
    """
    return [] if text is None else [_read_profile(part, text) for part in text.split(";")]


def covering(profiles: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """The smallest, usual and largest size over all profiles; usual is that of the first."""
    names = profiles[0]
    return {name: [min(p[name][0] for p in profiles), profiles[0][name][1], max(p[name][2] for p in profiles)] for name in names}


def batch_that_fits(profiles: Sequence[Mapping[str, Sequence[int]]], batch: int, keep: int | None) -> int | None:
    """How many samples at a time an engine of these profiles takes, where it is given `batch` of them with `keep` patches each.

    `batch` itself if a profile holds it; else the largest batch below it, else the smallest above it, which has to be filled up.
    None: no profile holds `keep`.
    """
    ranges = [profile["B"] for profile in profiles if keep is None or "K" not in profile or profile["K"][0] <= keep <= profile["K"][2]]
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
            raise ConfigError(f"--profile {whole}", hint=_PROFILE_HINT)
        found[match[1]] = (numbers[0], numbers[1], numbers[2])
    if not found:
        raise ConfigError(f"--profile {whole}", hint=_PROFILE_HINT)
    return found
