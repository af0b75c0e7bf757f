"""What a TensorRT engine takes and gives, in which shapes, and which of its profiles a run needs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.read import Array
from mae_deploy.runtime.tensorrt.api import numpy_dtype
from mae_deploy.runtime.tensorrt.kernel_cache import KernelCache

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input or an output."""

    name: str
    shape: Shape
    """-1 stands for a dynamic size."""
    dtype: np.dtype[Any]
    """What lies in the GPU's memory; for BF16, which NumPy has not, uint16."""
    bfloat16: bool = False

    def nbytes(self, shape: Shape) -> int:
        """Its size in memory in this shape."""
        return math.prod(shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileRange:
    """The shapes of the inputs that an optimisation profile covers."""

    index: int
    least: Mapping[str, Shape]
    most: Mapping[str, Shape]

    @property
    def volume(self) -> int:
        """Numbers in its largest inputs."""
        return sum(math.prod(shape) for shape in self.most.values())

    def contains(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes can be run in it."""
        return all(
            len(shape) == len(self.least[name])
            and all(
                low <= side <= high for low, side, high in zip(self.least[name], shape, self.most[name], strict=True)
            )
            for name, shape in shapes.items()
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {low}" if low == self.most[name] else f"{name} {low} to {self.most[name]}"
            for name, low in _told(self.least).items()
        )


def choose_profile(profiles: Sequence[ProfileRange], shapes: Mapping[str, Shape]) -> ProfileRange:
    """The smallest profile that covers these shapes of the inputs: its kernels were chosen for the sizes nearest to
    them.

    Raises:
        ConfigError: none does.
    """
    fitting = [profile for profile in profiles if profile.contains(shapes)]
    if not fitting:
        given = ", ".join(f"{name} {shape}" for name, shape in _told(shapes).items())
        raise ConfigError(
            f"this engine takes no {given}; it takes {'; or '.join(map(str, profiles))}",
            hint="build one with another --profile: mae-deploy build-engine BUNDLE",
        )
    return min(fitting, key=lambda profile: profile.volume)


def _told(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Without the keys and values of each block, of which `cache_mask` says as much."""
    return {name: shape for name, shape in shapes.items() if not re.fullmatch(r"(keys|values)_\d+", name)}


def read_tensors(trt: Any, engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs and outputs of an `ICudaEngine`, by name.

    Raises:
        MaeDeployError: a type that NumPy has not, other than BF16.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        kind = engine.get_tensor_dtype(name)
        bfloat16 = kind == getattr(trt.DataType, "BF16", None)
        dtype = np.dtype(np.uint16) if bfloat16 else numpy_dtype(trt, kind)
        group = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        group[name] = Tensor(name=name, shape=tuple(engine.get_tensor_shape(name)), dtype=dtype, bfloat16=bfloat16)
    return inputs, outputs


def read_profiles(engine: Any, inputs: Mapping[str, Tensor]) -> list[ProfileRange]:
    """The optimisation profiles of an `ICudaEngine`; one without dynamic sizes has a single one."""
    ranges = []
    for index in range(engine.num_optimization_profiles):
        least, most = {}, {}
        for name, tensor in inputs.items():
            shapes = engine.get_tensor_profile_shape(name, index) if -1 in tensor.shape else [tensor.shape] * 3
            least[name], most[name] = tuple(shapes[0]), tuple(shapes[2])
        ranges.append(ProfileRange(index=index, least=least, most=most))
    return ranges


def check_dtype(tensor: Tensor, array: Array) -> None:
    """Whether an array can be copied to an input as it is, or as integers of another width.

    Raises:
        ConfigError: another type, or an integer that the input's type cannot hold.
    """
    if array.dtype == tensor.dtype:
        return
    if array.dtype.kind not in "iu" or tensor.dtype.kind not in "iu":
        raise ConfigError(
            f"the input {tensor.name} is {array.dtype}, the engine takes {tensor.dtype}", hint=f"give {tensor.dtype}"
        )
    limits = np.iinfo(tensor.dtype)
    if array.size and not (limits.min <= array.min() and array.max() <= limits.max):
        raise ConfigError(
            f"the input {tensor.name} has numbers from {array.min()} to {array.max()}, the engine takes {tensor.dtype}"
        )


def to_numpy(tensor: Tensor, pinned: Array) -> Array:
    """An output of its own memory; BF16 as float32."""
    found: Array = (pinned.astype(np.uint32) << 16).view(np.float32) if tensor.bfloat16 else pinned.copy()
    return found


def runtime_config(trt: Any, engine: Any, kernels: Path | None) -> tuple[Any, KernelCache | None]:
    """What all contexts of an engine of TensorRT for RTX share, and the kernels that are kept in a file; nothing for
    TensorRT itself.

    Its kernels are compiled on the device: kept in one cache, so that a second context compiles nothing again, and
    for a context's own shapes before its first run, so that a CUDA graph holds the fast ones.
    """
    if kernels is None:
        return None, None
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return None, None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    cache = config.create_runtime_cache()
    kept = KernelCache(cache, kernels)
    config.set_runtime_cache(cache)
    return config, kept


def create_context(trt: Any, engine: Any, memory: int, nbytes: int, config: Any = None) -> Any:
    """An execution context whose activations are in memory of the caller's, which contexts that take turns can share;
    None where TensorRT refuses.

    Args:
        config: what `runtime_config` gave.
    """
    if hasattr(trt, "ExecutionContextAllocationStrategy"):  # 10 and later
        context = engine.create_execution_context(config or trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        context = engine.create_execution_context_without_device_memory()
    if context is None:
        return None
    if hasattr(context, "set_device_memory"):  # 10.3 and later
        context.set_device_memory(memory, nbytes)
    else:
        context.device_memory = memory
    return context


def activation_bytes(engine: Any) -> int:
    """What the activations of any profile need."""
    size = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    return max(int(size), 1)


def check_shapes(missing: Sequence[str], outputs: Mapping[str, Shape]) -> None:
    """What `infer_shapes` and the context say once all inputs have shapes.

    Raises:
        MaeDeployError: an input has no shape, or an output one that depends on the values of the inputs.
    """
    open_sizes = [*missing, *(name for name, shape in outputs.items() if any(side < 0 for side in shape))]
    if open_sizes:
        raise MaeDeployError(
            f"TensorRT cannot tell the shape of {', '.join(open_sizes)}", hint="export the graph with mae-deploy export"
        )
