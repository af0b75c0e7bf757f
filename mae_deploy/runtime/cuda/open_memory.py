"""Which package gives GPU memory: pycuda or cuda-bindings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mae_deploy.errors import ConfigError, MissingDependency
from mae_deploy.runtime.cuda.driver import require_gpu

if TYPE_CHECKING:
    pass
from mae_deploy.runtime.cuda.bindings_memory import _BindingsMemory
from mae_deploy.runtime.cuda.memory import Memory
from mae_deploy.runtime.cuda.pycuda_memory import _PycudaMemory

BACKENDS = ("pycuda", "cuda-bindings")


def open_memory(backend: str = "auto", index: int = 0) -> Memory:
    """The memory of a GPU.

    Args:
        backend: one of `BACKENDS`, or auto: pycuda where it can be imported, else cuda-bindings.

    Raises:
        ConfigError: an unknown backend.
        MissingDependency: no such GPU, or the package is absent.
    """
    kinds: dict[str, type[Memory]] = {"pycuda": _PycudaMemory, "cuda-bindings": _BindingsMemory}
    if backend not in ("auto", *kinds):
        raise ConfigError(f"unknown CUDA backend '{backend}'", hint=f"known: auto, {', '.join(kinds)}")
    require_gpu(index)
    absent = []
    for kind in kinds.values() if backend == "auto" else [kinds[backend]]:
        try:
            return kind(index)  # type: ignore[call-arg]
        except MissingDependency as error:
            absent.append(str(error))
    raise MissingDependency("; ".join(absent), hint="pip install 'mae-deploy[trt]'")
