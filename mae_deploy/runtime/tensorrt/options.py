"""How a TensorRT engine is built, and which TensorRT would build it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from mae_deploy.config import Settings, option_name, setting
from mae_deploy.errors import ConfigError

_PACKAGES = ("tensorrt", "tensorrt-cu12-bindings", "tensorrt-cu13-bindings")

_NOT_TAKEN = ("--hardware-compatible", "--version-compatible", "--strip", "--refit")
"""Options of builds that are TensorRT's alone: plans are for many GPUs anyway, and the others need a GPU or a library
that the wheels have not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions(Settings, resume="never"):
    """TensorRT."""

    workspace: int = setting(4096, at_least=1)
    """Memory in MiB that a kernel may work in; a GPU with less gives what it has."""
    optimization_level: int | None = setting(None, at_least=0, at_most=5)
    """From 0 (short build) to 5 (long build, every kernel tried); default: TensorRT's own, 3."""
    timing_cache: str = "auto"
    """Folder where timings of kernels are kept for the next build, in a file for each TensorRT version, GPU and set of
    options; auto: tensorrt in $MAE_DEPLOY_CACHE, by default ~/.cache/mae-deploy; off: none."""
    hardware_compatible: Literal["none", "same", "ampere"] = "none"
    """Which other GPUs the engine also runs on, at a cost in speed: none; same: all of this compute capability
    (TensorRT 10.9 or later); ampere: all from compute capability 8.0 on."""
    version_compatible: bool = False
    """Let later TensorRT versions of the same major run the engine."""
    strip: bool = False
    """Leave the weights out of the engine file and take them from the bundle's graph when it is loaded (TensorRT 10 or
    later)."""
    refit: bool = False
    """Let other weights be put into the engine later."""


def changed_options(config: Any) -> list[str]:
    """The options of a section whose values are not its class's defaults, as they are written: `--workspace 64`."""
    values = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return [
        (option_name(field) if value else f"--no-{option_name(field)[2:]}")
        if isinstance(value, bool)
        else f"{option_name(field)} {value}"
        for field, value in values
        if value != field.default
    ]


def check_rtx_options(options: BuildOptions) -> None:
    """Raise ConfigError for options of a build that TensorRT for RTX has not."""
    for given in changed_options(options):
        if given.split()[0] in _NOT_TAKEN:
            raise ConfigError(
                f"{given}: TensorRT for RTX builds no such engines",
                hint="leave it out: its engines run on every RTX GPU as they are",
            )


def tensorrt_major() -> int | None:
    """Of the TensorRT that is installed, without importing it; None without."""
    for package in _PACKAGES:
        try:
            return int(metadata.version(package).partition(".")[0])
        except metadata.PackageNotFoundError:
            continue
    return None
