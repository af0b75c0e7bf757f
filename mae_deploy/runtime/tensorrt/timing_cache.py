"""TensorRT's timings of kernels, kept from build to build: in a file for each version, GPU and set of options, for
those hold for nothing else.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_deploy.files import atomic_path, locked
from mae_deploy.machine import cache_folder
from mae_deploy.runtime.cuda.driver import Gpu

if TYPE_CHECKING:
    from mae_deploy.runtime.tensorrt.options import BuildOptions

_log = logging.getLogger(__name__)


def cache_file(options: BuildOptions, version: str, gpu: Gpu, precision: str) -> Path | None:
    """Where the timings of such a build are; None where `options.timing_cache` is off."""
    if options.timing_cache == "off":
        return None
    folder = cache_folder("tensorrt") if options.timing_cache == "auto" else Path(options.timing_cache)
    level = "default" if options.optimization_level is None else options.optimization_level
    compatible = [
        *([options.hardware_compatible] if options.hardware_compatible != "none" else []),
        *(["versions"] if options.version_compatible else []),
    ]
    capability = "".join(map(str, gpu.compute_capability))
    return folder / "-".join(
        [version, slug(gpu.name), f"sm{capability}", precision, f"level-{level}", *compatible, "timings"]
    )


def slug(name: str) -> str:
    """A GPU's name as a part of a file name: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def attach(config: Any, path: Path) -> None:
    """Give a builder's config the timings in a file; with none that this TensorRT takes, a new cache."""
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep(config: Any, path: Path) -> None:
    """Add the timings of a build to a file, together with what other builds have added since; a folder that cannot be
    written is only logged.
    """
    try:
        with locked(path.with_name(f"{path.name}.lock")):
            cache = config.get_timing_cache()
            if cache is None:
                return
            others = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
            if others is not None:
                cache.combine(others, False)
            with atomic_path(path) as aside:
                aside.write_bytes(bytes(cache.serialize()))
    except OSError as error:
        _log.warning("the timing cache %s cannot be written: %s", path, error)
