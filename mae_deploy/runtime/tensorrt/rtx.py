"""TensorRT for RTX: the API of TensorRT 11 for strongly typed networks, whose builder needs no GPU."""

from __future__ import annotations

import ctypes
import importlib
from importlib import util
from pathlib import Path
from types import ModuleType

from mae_deploy.errors import MissingDependency

EXTRA = "trt-rtx"

_MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
"""NVIDIA's archive has the first, the package index the second, without the libraries."""

_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
"""ONNX Runtime's execution provider, which brings them."""


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
