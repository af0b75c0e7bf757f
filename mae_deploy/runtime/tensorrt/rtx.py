"""TensorRT for RTX: the API of TensorRT 11 for strongly typed networks, whose builder needs no GPU and whose plans run
on every RTX GPU, which makes the kernels itself.

https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import threading
from importlib import util
from pathlib import Path
from types import ModuleType

from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.runtime.cuda.driver import Gpu, require_gpu
from mae_deploy.runtime.tensorrt.api import Api, least_capability

EXTRA = "trt-rtx"

RUNS_ON = "8.0, 8.6, 8.9, and 12.0 and later"
"""The compute capabilities of the GPUs that it supports: not 8.7 (Orin), 9.0 (Hopper) and 10 (Blackwell of data
centres)."""

_AMPERE_AND_ADA = ((8, 0), (8, 6), (8, 9))
_BLACKWELL = (12, 0)

_ANY_GPU = Gpu(index=0, name="RTX", compute_capability=_AMPERE_AND_ADA[0], memory_bytes=1 << 40, driver="")
"""For which a plan is built: all that it supports."""

_MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
"""NVIDIA's archive has the first, the package index the second, without the libraries."""

_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
"""ONNX Runtime's execution provider, which brings them."""


def supports(gpu: Gpu) -> bool:
    """Whether plans run on this GPU."""
    return gpu.compute_capability in _AMPERE_AND_ADA or gpu.compute_capability >= _BLACKWELL


def find_gpu(index: int = 0) -> Gpu:
    """The GPU of this index, on which plans run.

    Raises:
        MissingDependency: no driver, or no such GPU.
        ConfigError: one that is not supported.
    """
    gpu = require_gpu(index)
    if not supports(gpu):
        capability = ".".join(map(str, gpu.compute_capability))
        raise ConfigError(
            f"TensorRT for RTX does not support {gpu.name}, which has compute capability {capability}; it supports"
            f" {RUNS_ON}",
            hint="--engine trt builds an engine for this GPU",
        )
    return gpu


def target(precision: str) -> Gpu:
    """What a plan of this precision is built for: every supported GPU that has the arithmetic."""
    return dataclasses.replace(
        _ANY_GPU, compute_capability=max(_ANY_GPU.compute_capability, least_capability(precision))
    )


_loaded: dict[int | None, Api] = {}
_loading = threading.Lock()


def load_builder() -> Api:
    """What builds; it needs no GPU.

    Raises:
        MissingDependency: it is not installed, or its libraries are not found.
    """
    with _loading:
        if None not in _loaded:
            _loaded[None] = Api(import_rtx(), _ANY_GPU)
        return _loaded[None]


def load_rtx(index: int = 0) -> Api:
    """What runs plans on a GPU of this machine.

    Raises:
        MissingDependency: no driver, no GPU, or it is not installed.
        ConfigError: a GPU that it does not support.
    """
    gpu = find_gpu(index)
    with _loading:
        if index not in _loaded:
            _loaded[index] = Api(import_rtx(), gpu)
        return _loaded[index]


def import_rtx() -> ModuleType:
    """The bindings, over the libraries that are installed with them or with ONNX Runtime's execution provider.

    Raises:
        MissingDependency: the bindings are not installed, or their libraries are not found.
    """
    module = next((name for name in _MODULES if util.find_spec(name) is not None), None)
    if module is None:
        raise MissingDependency("TensorRT for RTX is not installed", hint=f"pip install 'mae-deploy[{EXTRA}]'")
    _load_libraries()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"TensorRT for RTX cannot be imported ({' '.join(str(error).split())})",
            hint=f"pip install 'mae-deploy[{EXTRA}]', or put the folder of its libraries into LD_LIBRARY_PATH",
        ) from error


def _load_libraries() -> None:
    """Load what the execution provider brings, under the names by which the bindings look for it."""
    found = util.find_spec(_LIBRARIES)
    if found is None or found.origin is None:
        return
    for pattern in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):  # the parser needs the first
        for library in sorted(Path(found.origin).parent.glob(pattern)):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
