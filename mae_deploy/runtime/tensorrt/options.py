"""How a TensorRT engine is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mae_deploy.config import Settings, setting


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
