"""ONNX Runtime, the engine that every installation has: CPU everywhere, CUDA where its GPU package is installed."""

from __future__ import annotations

import functools
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency, import_whole, reason
from mae_deploy.images.read import Array
from mae_deploy.packages import distributions, install_one, remedy
from mae_deploy.runtime.cuda.driver import require_gpu
from mae_deploy.runtime.engines.affinity import bound_to
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.engines.saturation import may_saturate, onnxruntime_saturates, say_exact
from mae_deploy.runtime.engines.taps import with_outputs

DEVICES = ("auto", "cpu", "cuda")

_CUDA = "CUDAExecutionProvider"
_ERRORS_ONLY, _FATAL_ONLY = 3, 4

_log = logging.getLogger(__name__)


class OnnxRuntimeEngine(Engine):
    """An ONNX graph in an ONNX Runtime session; calls from several threads run side by side."""

    name = "onnxruntime"

    def _load(self, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]) -> None:
        runtime = import_onnxruntime()
        self.version = str(runtime.__version__)
        with bound_to(options.affinity):
            self._session: Any
            self.device, self._session = _start(runtime, graph, options, precision, taps)
        self.input_names = tuple(entry.name for entry in self._session.get_inputs())
        self.output_names = tuple(dict.fromkeys(entry.name for entry in self._session.get_outputs()))

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        if self._session is None:
            raise MaeDeployError("this engine is closed", hint="load the bundle again")
        try:
            arrays = self._session.run(list(outputs), dict(inputs))
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            raise MaeDeployError(f"ONNX Runtime failed: {_one_line(error)}") from error
        found = dict(zip(outputs, arrays, strict=True))
        others = [name for name, array in found.items() if not isinstance(array, np.ndarray)]
        if others:
            raise MaeDeployError(f"the output '{others[0]}' is no tensor, but a {type(found[others[0]]).__name__}")
        return found

    def _close(self) -> None:
        self._session = None


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime, without its telemetry unless the user's environment asks for it (onnxruntime#27379).

    Raises:
        MissingDependency: it is not installed, or cannot be loaded.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):  # where NumPy writes a page about what was built for another version of it
            runtime = import_whole("onnxruntime")
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        why = lines[-1] if lines and not str(error) else reason(error)
        hint = remedy("onnxruntime", "pip install onnxruntime", absent=missing is not None)
        if missing not in (None, "onnxruntime"):
            hint = f"pip install {missing}"
        if any("NumPy" in line for line in lines):
            hint += ", or pip install 'numpy<2'"
        raise MissingDependency(f"ONNX Runtime cannot be imported ({why})", hint=hint) from error
    sys.stderr.write(said.getvalue())
    return runtime


def _start(
    runtime: ModuleType, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]
) -> tuple[str, Any]:
    """Where the session computes, and the session. With auto that is CUDA where it starts, not where it is installed;
    why it does not is said once.
    """
    if options.device not in DEVICES:
        raise ConfigError(f"unknown device '{options.device}'", hint=f"known: {', '.join(DEVICES)}")

    def on(device: str) -> tuple[str, Any]:
        settings = _settings(runtime, device, options.num_threads, precision)
        return device, _open_session(runtime, graph, taps, device, settings)

    installed = _CUDA in runtime.get_available_providers()
    if options.device == "cuda" and not installed:
        others = " ".join(distributions("onnxruntime")) or "onnxruntime"
        raise MissingDependency(
            "this ONNX Runtime cannot use CUDA",
            hint=f"pip uninstall -y {others} && {install_one('onnxruntime', 'onnxruntime-gpu')}, or use device cpu",
        )
    if options.device == "cpu" or not installed:
        return on("cpu")
    try:
        require_gpu()  # first: what ONNX Runtime writes about a GPU that is not there fills a page
        return on("cuda")
    except MaeDeployError as error:
        if options.device == "cuda":
            raise
        opened = on("cpu")  # a graph that neither takes is no fault of CUDA's
        _say_cpu(str(error))
        return opened


@functools.cache
def _say_cpu(why: str) -> None:
    _log.warning("device auto: ONNX Runtime computes on the CPU: %s", why)


def _settings(runtime: ModuleType, device: str, threads: int | None, precision: str) -> Any:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # What goes wrong arrives as an exception, and would be on stderr twice; only why CUDA did not start is logged
    # alone.
    options.log_severity_level = _ERRORS_ONLY if device == "cuda" else _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    # Idle threads that spin keep a core from whoever runs next: with two sessions in turns on two cores, a graph of 49
    # tokens took 84 ms instead of 50 (docs/results/latency.md). Alone, sleeping costs it 3 %. Threads that spin for 50
    # µs only, or stop when a run ends, are still 1.1 and 2.8 times slower in turns.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # It would move FP8's QuantizeLinear across a Transpose, whose kernel takes no FP8.
    if precision == "fp8":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Exact kernels where the fast ones are not: without this, a ViT-S with dynamic INT8 fell from 31 dB to 19 dB on a
    # CPU with AVX2 and no VNNI. Where those are exact, it would only make the graph 1.8 times slower.
    if may_saturate(precision) and device == "cpu" and onnxruntime_saturates(runtime):
        say_exact("ONNX Runtime multiplies exactly, which is slower", "export with --weight-bits 7")
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _open_session(runtime: ModuleType, graph: Path, taps: tuple[str, ...], device: str, options: Any) -> Any:
    if taps:  # a graph in memory has no folder of its own, where its external data would be
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(graph.parent.resolve())
        )
    # TF32 keeps ten bits of the mantissa: FP32 parity would miss its tolerance.
    providers: list[Any] = [(_CUDA, {"use_tf32": "0"})] if device == "cuda" else []
    try:
        source = with_outputs(graph, taps) if taps else str(graph)
        # Its own fallback tries again without CUDA, and prints why to stdout.
        session = runtime.InferenceSession(
            source, options, providers=[*providers, "CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        hint = "inner tensors of a graph with external data need ONNX Runtime 1.21 or later" if taps else None
        if "NOT_IMPLEMENTED" in str(error):  # BF16 products, which a graph for OpenVINO may have
            hint = (
                "this ONNX Runtime cannot compute in the graph's types: use engine openvino, or export the graph for"
                " ONNX Runtime"
            )
        raise MaeDeployError(f"ONNX Runtime cannot load {graph}: {_one_line(error)}", hint=hint) from error
    if device == "cuda" and _CUDA not in session.get_providers():
        # ONNX Runtime falls back to the CPU without a word to the caller.
        raise MissingDependency(
            "ONNX Runtime's CUDA provider did not start",
            hint="its messages above name the library that it misses; or use device cpu",
        )
    return session


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
