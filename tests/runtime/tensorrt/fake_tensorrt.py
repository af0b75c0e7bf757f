"""A module that stands for `tensorrt` on the stub driver, so that what surrounds TensorRT can be tested without a GPU.

A "plan" is JSON (`plan`); its network gives `cls (B, C)`, the mean of `images (B, C, H, W)`, and `tokens (B, K, C)`,
that times `ids_keep (B, K)`; one of streams has the inputs and outputs of a cached graph of one block
(`stream_reference`). Contexts insist on what the real ones do: memory, a profile that no other context has
(TensorRT 8 without shared profiles), shapes, addresses, and a plain run before a capture.
"""

from __future__ import annotations

import ctypes
import enum
import json
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

C, H, W = 3, 2, 5
N, HEADS, WIDTH, PIXELS = 7, 2, 5, 12
"""Of the network of streams: patches, heads, the width of one, and the values of a patch."""


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64, BF16, FP8 = range(6)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32, DataType.INT64: np.int64}


def plan(
    *profiles: dict[str, tuple[int, int, int]],
    ids: str = "INT64",
    tokens: str = "FLOAT",
    batch: int = -1,
    keep: int = -1,
    microseconds: int = 0,
    streams: bool = False,
) -> bytes:
    """A plan with these ranges of B and K; a run takes so many microseconds of the stub's clock."""
    ranges = profiles or ({"B": (1, 2, 4), "K": (1, 3, 7)},)
    sizes = {"batch": batch, "keep": keep, "microseconds": microseconds, "streams": streams}
    return json.dumps({"profiles": ranges, "ids": ids, "tokens": tokens, **sizes}).encode()


def reference(images: Any, ids_keep: Any) -> dict[str, Any]:
    """What the network computes."""
    means = np.ascontiguousarray(images).mean(axis=(2, 3))
    return {"cls": means, "tokens": means[:, None, :] * np.asarray(ids_keep)[..., None].astype(np.float32)}


def stream_reference(patches: Any, ids_keep: Any, cache_mask: Any, keys_0: Any, values_0: Any) -> dict[str, Any]:
    """What the network of streams computes: of a patch its mean and the mean of the old keys that count, and of all
    rows the sum of both.
    """
    B, K = ids_keep.shape
    old = (cache_mask[:, None, :, None] * keys_0.astype(np.float32)).mean(axis=(1, 2, 3))
    seen = np.asarray(patches.mean(axis=2) + old[:, None] + 0.01 * ids_keep, np.float32)
    tokens = np.repeat(seen[..., None], HEADS * WIDTH, axis=2)
    rows = np.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1).sum(axis=2)
    rows = rows + values_0.astype(np.float32).mean(axis=(1, 2, 3))[:, None]
    new = np.broadcast_to(rows[:, None, :, None], (B, 2 * HEADS, 1 + K, WIDTH))
    return {"cls": tokens.mean(axis=1), "tokens": tokens, "new_rows": new.astype(np.float16)}


def make_tensorrt(driver: ctypes.CDLL, *, version: str = "10.3.0", shared_profiles: bool = True) -> ModuleType:
    """The module, on a loaded stub driver."""
    trt: Any = ModuleType("tensorrt")
    graphs = _Graphs(driver)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, content: Any) -> Any:
            assert driver.stub_depth() == 1, "no context is current"
            try:
                return _Engine(trt, graphs, json.loads(bytes(memoryview(content))), shared_profiles=shared_profiles)
            except ValueError:
                self.logger.log(Severity.ERROR, "the plan is not one of ours")
                return None

    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    trt.__version__, trt.ILogger, trt.Runtime = version, ILogger, Runtime
    trt.DataType, trt.TensorIOMode, trt.nptype = DataType, TensorIOMode, _nptype
    trt.contexts, trt.infer_error = [], None
    if not version.startswith("8"):
        trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user-managed")
    if version.startswith("1."):  # TensorRT for RTX
        trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")
        trt.kernels = []
    return trt  # type: ignore[no-any-return]


def _nptype(kind: DataType) -> Any:
    if kind not in _NUMPY:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return _NUMPY[kind]


class _Graphs:
    """What was put on a stream during its capture, and is done at each launch."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        driver.stub_capture.argtypes, driver.stub_capture.restype = (ctypes.c_void_p,), ctypes.c_long
        self._work: dict[int, Callable[[], None]] = {}
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_long)(lambda graph: self._work[graph]())
        driver.stub_on_launch(self._callback)

    def do(self, stream: int, work: Callable[[], None]) -> None:
        graph = self.driver.stub_capture(stream)
        if graph:
            self._work[graph] = work
        else:
            work()


class _Engine:
    def __init__(self, trt: Any, graphs: _Graphs, content: dict[str, Any], *, shared_profiles: bool) -> None:
        self.trt, self.graphs, self.content, self.shared_profiles = trt, graphs, content, shared_profiles
        fixed = {"B": content["batch"], "K": content["keep"]}
        B, K = ("B" if fixed["B"] == -1 else fixed["B"]), ("K" if fixed["K"] == -1 else fixed["K"])
        width = HEADS * WIDTH if content["streams"] else C
        rows = (TensorIOMode.INPUT, DataType.HALF, (B, HEADS, 1 + N, WIDTH))
        self.tensors: dict[str, tuple[TensorIOMode, DataType, tuple[Any, ...]]] = {
            "ids_keep": (TensorIOMode.INPUT, DataType[content["ids"]], (B, K)),
            "cls": (TensorIOMode.OUTPUT, DataType.FLOAT, (B, width)),
            "tokens": (TensorIOMode.OUTPUT, DataType[content["tokens"]], (B, K, width)),
        }
        if content["streams"]:
            self.tensors |= {
                "patches": (TensorIOMode.INPUT, DataType.FLOAT, (B, K, PIXELS)),
                "cache_mask": (TensorIOMode.INPUT, DataType.FLOAT, (B, 1 + N)),
                "keys_0": rows,
                "values_0": rows,
                "new_rows": (TensorIOMode.OUTPUT, DataType.HALF, (B, 2 * HEADS, "T", WIDTH)),
            }
        else:
            images = (TensorIOMode.INPUT, DataType.FLOAT, (B, C, H, W))
            self.tensors = {"images": images, **self.tensors}
        self.input_names = [name for name, (mode, _, _) in self.tensors.items() if mode is TensorIOMode.INPUT]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(content["profiles"])
        setattr(self, "device_memory_size" if trt.__version__.startswith("8") else "device_memory_size_v2", 1000)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name][1]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(side, str) else side for side in self.tensors[name][2]]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        sizes = self.content["profiles"][index]
        return [_sized(self.tensors[name][2], sizes["B"][which], sizes["K"][which]) for which in range(3)]

    def create_execution_context_without_device_memory(self) -> Any:
        assert self.trt.__version__.startswith("8"), "gone in 11"
        return _Context(self)

    def create_runtime_config(self) -> Any:
        assert self.trt.__version__.startswith("1."), "of TensorRT for RTX alone"
        return _RuntimeConfig(self.trt)

    def create_execution_context(self, strategy: Any) -> Any:
        if isinstance(strategy, _RuntimeConfig):
            assert strategy.dynamic_shapes_kernel_specialization_strategy == "eager"
            assert strategy.strategy == "user-managed"
            strategy.cache.compile()
        else:
            assert strategy == "user-managed"
        return _SizedContext(self)

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        self.graphs.driver.stub_work(self.content["microseconds"])
        B, K = shapes["ids_keep"]
        network = stream_reference if self.content["streams"] else reference
        found = network(**{name: self._at(addresses, name, shapes[name]) for name in self.input_names})
        for name, values in found.items():
            place = self._at(addresses, name, values.shape)
            assert list(values.shape) == _sized(self.tensors[name][2], B, K)
            place[...] = values.view(np.uint32) >> 16 if place.dtype == np.uint16 else values

    def _at(self, addresses: dict[str, int], name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_NUMPY.get(self.tensors[name][1], np.uint16))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(addresses[name])).view(dtype).reshape(shape)


class _RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    cache: Any = None

    def __init__(self, trt: Any) -> None:
        self.trt, self.strategy = trt, "static"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return _RuntimeCache(self.trt)

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class _RuntimeCache:
    """One kernel, which is compiled where it is not there; `trt.kernels` notes it."""

    def __init__(self, trt: Any) -> None:
        self.trt, self.content = trt, b""

    def deserialize(self, content: bytes) -> bool:
        if content != b"kernel":
            return False
        self.content = content
        return True

    def compile(self) -> None:
        if not self.content:
            self.trt.kernels.append("compiled")
            self.content = b"kernel"

    def serialize(self) -> bytes:
        return self.content


def _sized(shape: tuple[Any, ...], batch: int, keep: int) -> list[Any]:
    """A shape with its open sizes: B, K, and T = 1 + K."""
    sizes = {"B": batch, "K": keep, "T": 1 + keep}
    return [sizes.get(side, side) for side in shape]


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.device_memory = 0
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.has_run = False
        self.fails = False
        engine.trt.contexts.append(_Weak(self))

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        others = [weak.context for weak in self.engine.trt.contexts]
        if not self.engine.shared_profiles and any(
            other is not None and other is not self and other.profile == index for other in others
        ):
            raise RuntimeError("Error in set optimization profile async.")
        assert stream != 0
        self.engine.graphs.driver.stub_mark(b"profile")
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = tuple(shape)
        self.has_run = False
        return all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))

    def infer_shapes(self) -> list[str]:
        """As the real one, it raises where it fails."""
        if self.engine.trt.infer_error is not None:
            raise RuntimeError(self.engine.trt.infer_error)
        return [name for name in self.engine.input_names if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        (B, K), sides = self.shapes["ids_keep"], self.engine.tensors[name][2]
        return list(self.shapes[name]) if name in self.shapes else _sized(tuple(sides), B, K)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.device_memory
        assert set(self.addresses) == set(self.engine.tensors)
        assert not self.infer_shapes()
        if self.fails or (not self.has_run and self.engine.graphs.driver.stub_capture(stream)):
            return False
        self.has_run = True
        engine, shapes, addresses = self.engine, dict(self.shapes), dict(self.addresses)
        self.engine.graphs.do(stream, lambda: engine.compute(shapes, addresses))
        return True


class _SizedContext(_Context):
    def set_device_memory(self, memory: int, size: int) -> None:
        assert size == 1000
        self.device_memory = memory


class _Weak:
    """A context as long as somebody has it."""

    def __init__(self, context: _Context) -> None:
        self._reference = weakref.ref(context)

    @property
    def context(self) -> _Context | None:
        return self._reference()
