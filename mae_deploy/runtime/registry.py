"""Which engines there are, by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engine import Engine, EngineOptions

DEFAULT = "onnxruntime"
"""The engine that every installation has."""


def load_engine(bundle: Bundle, engine: str = "auto", options: EngineOptions = EngineOptions(), *, taps: Sequence[str] = ()) -> Engine:
    """Load the bundle's graph, after its hash has been checked.

    Args:
        engine: one of `ENGINES` by name or alias, or `auto`: the one on which the bundle was proven, where it is installed and has the device, else
            ONNX Runtime.
        taps: names of inner tensors that are returned as further outputs.

    Raises:
        ConfigError: an unknown engine, or options that it cannot take.
        MissingDependency: the engine's package or its device is absent.
        CheckFailed: a file of the bundle is not what was exported, or the graph is not what the manifest describes.
        MaeDeployError: the engine refuses the graph.
    """
    if ALIASES.get(engine, engine) == "tensorrt":
        raise ConfigError(_why_no_tensorrt(bundle), hint=f"use --engine {DEFAULT}, which runs every bundle")
    chosen = _class_of(_proven_on(bundle, options.device) if engine == "auto" else engine)
    loaded = chosen(bundle.graph(), options, precision=bundle.arithmetic, taps=taps)
    names = (*bundle.output_names, *taps)
    if set(loaded.input_names) != set(bundle.input_names) or set(loaded.output_names) != set(names):
        loaded.close()
        raise CheckFailed(
            f"the graph of {bundle.path} takes {loaded.input_names} and gives {loaded.output_names}, its manifest says {bundle.input_names} and {names}",
            hint="export the bundle again",
        )
    return loaded


def open_graph(path: Path, engine: str = DEFAULT, options: EngineOptions = EngineOptions(), *, precision: str = "fp32") -> Engine:
    """Load a bare ONNX file, which no manifest describes and no hash protects: the user names it and trusts it.

    Raises:
        ConfigError: no such file, an unknown engine, or options that it cannot take.
        MissingDependency: the engine's package or its device is absent.
        MaeDeployError: the engine refuses the graph.
    """
    if not path.is_file():
        raise ConfigError(f"no ONNX file at {path}")
    return _class_of(DEFAULT if engine == "auto" else engine)(path, options, precision=precision)


def _class_of(engine: str) -> type[Engine]:
    name = ALIASES.get(engine, engine)
    if name not in ENGINES:
        known = ["auto", *(alias for alias, meant in ALIASES.items() if meant in ENGINES), *ENGINES]
        raise ConfigError(f"unknown engine '{engine}'", hint=f"known: {', '.join(known)}")
    return ENGINES[name]()


def _proven_on(bundle: Bundle, device: str) -> str:
    proven = bundle.manifest["engine"]
    return proven if device != "cuda" and util.find_spec(proven) is not None else DEFAULT


def _onnxruntime() -> type[Engine]:
    from mae_deploy.runtime.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine


def _openvino() -> type[Engine]:
    from mae_deploy.runtime.openvino_engine import OpenVinoEngine

    return OpenVinoEngine


def _why_no_tensorrt(bundle: Bundle) -> str:
    engines = bundle.manifest["engines"]
    if not engines:
        return f"the bundle {bundle.path} has no TensorRT engine"
    return f"the bundle {bundle.path} has {len(engines)} TensorRT engines, which this version of mae-deploy cannot run"


ENGINES: dict[str, Callable[[], type[Engine]]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
"""Each engine's name, which is that of its package, and what gives its class; the package is imported when an engine loads, not before."""

ALIASES = {"onnx": "onnxruntime", "ov": "openvino", "trt": "tensorrt"}
