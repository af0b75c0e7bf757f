"""Kernels that TensorRT for RTX compiled on this device, kept in a file for each version, GPU, driver and engine, so
that the next process need not compile them again.

https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mae_deploy.files import atomic_path, locked, sha256
from mae_deploy.machine import cache_folder
from mae_deploy.runtime.tensorrt.api import Api
from mae_deploy.runtime.tensorrt.timing_cache import slug

_log = logging.getLogger(__name__)


class KernelCache:
    """TensorRT's own cache in memory, and its file."""

    def __init__(self, cache: Any, path: Path) -> None:
        """Read the file into an empty cache; one that this TensorRT does not take is written anew."""
        self._cache, self._path = cache, path
        self._kept = path.read_bytes() if path.is_file() else b""
        if self._kept and not cache.deserialize(self._kept):
            self._kept = b""

    def keep(self) -> None:
        """Write what was compiled since; a folder that cannot be written is only logged."""
        content = bytes(self._cache.serialize())
        if content == self._kept:
            return
        self._kept = content
        try:
            with locked(self._path.with_name(f"{self._path.name}.lock")), atomic_path(self._path) as aside:
                aside.write_bytes(content)
        except OSError as error:
            _log.warning("the kernels in %s cannot be kept: %s", self._path, error)


def kernel_file(api: Api, plan: Path) -> Path:
    """Where the kernels of a plan are kept on this GPU."""
    parts = (api.version, slug(api.gpu.name), f"cuda{api.gpu.driver}", sha256(plan)[:16])
    return cache_folder("tensorrt-rtx") / "-".join([*parts, "kernels"])
