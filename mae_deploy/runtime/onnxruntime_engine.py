"""ONNX Runtime, the engine that every installation has: CPU everywhere, CUDA where its GPU package is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency
from mae_deploy.preprocess import Array
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engine import Engine

DEVICES = ("auto", "cpu", "cuda")

_CUDA = "CUDAExecutionProvider"
_ERRORS_ONLY, _FATAL_ONLY = 3, 4


class OnnxRuntimeEngine(Engine):
    """The bundle's ONNX graph in an ONNX Runtime session; safe to call from several threads."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        """Check the graph's hashes and load it; `device` auto is CUDA where it works, `threads` None is one for each core.

        Raises:
            CheckFailed: the graph or its external data is not what was exported, or is not what the manifest describes.
            ConfigError: an unknown device, or less than one thread.
            MissingDependency: ONNX Runtime or its CUDA provider is absent.
            MaeDeployError: ONNX Runtime refuses the graph.
        """
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        runtime = _import_onnxruntime()
        self.device = _resolve_device(runtime, device)
        self.version = str(runtime.__version__)
        self._session: Any = _open_session(runtime, bundle, self.device, threads)
        self.input_names = tuple(entry.name for entry in self._session.get_inputs())
        self.output_names = tuple(entry.name for entry in self._session.get_outputs())
        if set(self.input_names) != set(bundle.input_names) or set(self.output_names) != set(bundle.output_names):
            raise CheckFailed(
                f"the graph of {bundle.path} takes {self.input_names} and gives {self.output_names}, "
                f"its manifest says {bundle.input_names} and {bundle.output_names}",
                hint="export the bundle again",
            )

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        if self._session is None:
            raise MaeDeployError("this engine is closed", hint="load the bundle again")
        try:
            arrays = self._session.run(list(outputs), dict(inputs))
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            raise MaeDeployError(f"ONNX Runtime failed: {_one_line(error)}") from error
        return dict(zip(outputs, arrays, strict=True))

    def close(self) -> None:
        """Free the session; closing twice does nothing."""
        self._session = None


def _import_onnxruntime() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependency(f"ONNX Runtime cannot be imported ({_one_line(error)})", hint="pip install onnxruntime") from error


def _resolve_device(runtime: ModuleType, device: str) -> str:
    if device not in DEVICES:
        raise ConfigError(f"unknown device '{device}'", hint=f"known: {', '.join(DEVICES)}")
    if device == "cpu":
        return device
    available = _CUDA in runtime.get_available_providers()
    if device == "cuda" and not available:
        raise MissingDependency("this ONNX Runtime cannot use CUDA", hint="pip uninstall onnxruntime && pip install onnxruntime-gpu, or use device cpu")
    return "cuda" if available else "cpu"


def _open_session(runtime: ModuleType, bundle: Bundle, device: str, threads: int | None) -> Any:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # What goes wrong arrives as an exception, and would be on stderr twice; only why CUDA did not start is logged alone.
    options.log_severity_level = _ERRORS_ONLY if device == "cuda" else _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    # Idle threads that spin keep a core from whoever runs next: with two sessions in turns on two cores, a graph of 49 tokens took
    # 84 ms instead of 50 (docs/results/latency.md). Alone, sleeping costs it 3 %.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # TF32 keeps ten bits of the mantissa: FP32 parity would miss its tolerance.
    providers: list[Any] = [(_CUDA, {"use_tf32": "0"})] if device == "cuda" else []
    graph = bundle.graph()
    try:
        session = runtime.InferenceSession(str(graph), options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise MaeDeployError(f"ONNX Runtime cannot load {graph}: {_one_line(error)}") from error
    if device == "cuda" and _CUDA not in session.get_providers():
        # ONNX Runtime falls back to the CPU without a word to the caller.
        raise MissingDependency("ONNX Runtime's CUDA provider did not start", hint="its messages above name the library that it misses; or use device cpu")
    return session


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
