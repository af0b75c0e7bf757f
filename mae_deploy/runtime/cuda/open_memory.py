"""Which package gives GPU memory: pycuda or cuda-bindings."""

from __future__ import annotations

from collections.abc import Callable

from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.runtime.cuda.bindings_memory import BindingsMemory
from mae_deploy.runtime.cuda.driver import require_gpu
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.cuda.pycuda_memory import PycudaMemory

BACKENDS: dict[str, Callable[[int], Memory]] = {"pycuda": PycudaMemory, "cuda-bindings": BindingsMemory}
"""What opens the memory of a GPU, by the name of the package; the first that can be imported is taken."""


INSTALL = (
    "pip install 'mae-deploy[trt]', which compiles pycuda, or 'mae-deploy[trt-bindings]' with cuda-bindings, ready made"
)
"""What installs TensorRT and one of them."""


def open_memory(backend: str = "auto", index: int = 0) -> Memory:
    """The memory of a GPU.

    Args:
        backend: a name of `BACKENDS`, or auto: the first of them that can be imported.

    Raises:
        ConfigError: an unknown backend.
        MissingDependency: no such GPU, or the package is absent.
    """
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"unknown CUDA backend '{backend}'", hint=f"known: auto, {', '.join(BACKENDS)}")
    require_gpu(index)
    absent = []
    for name in BACKENDS if backend == "auto" else [backend]:
        try:
            return BACKENDS[name](index)
        except MissingDependency as error:
            absent.append(str(error))
    raise MissingDependency("; ".join(absent), hint=INSTALL)
