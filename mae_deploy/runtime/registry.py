"""Which engines there are, by the names that the command line takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path

from mae_deploy.errors import CheckFailed, ConfigError, MaeDeployError, MissingDependency
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import Engine, EngineOptions
from mae_deploy.runtime.graph.check import GraphCheck
from mae_deploy.runtime.manifest import PLANNED, plan_engine

DEFAULT = "onnxruntime"
"""The engine that every installation has."""

TENSORRT, TENSORRT_RTX = PLANNED

OPENVINO = "openvino"
"""The engine that may die of a graph."""

_NAMES = {TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT for RTX", OPENVINO: "OpenVINO"}

_log = logging.getLogger(__name__)


def load_engine(
    bundle: Bundle,
    engine: str = "auto",
    options: EngineOptions = EngineOptions(),
    *,
    taps: Sequence[str] = (),
    prove: bool = True,
) -> Engine:
    """Load the bundle's graph, or an engine that was built from it, after its hash has been checked.

    Args:
        engine: one of `ENGINES` or `PLANNED` by name or alias, or `auto`: a TensorRT engine of the bundle that fits
            this machine; else the engine on which the bundle was checked, where it is installed and has the device;
            else ONNX Runtime.
        taps: names of inner tensors that are returned as further outputs; TensorRT builds an engine for them, which is
            not kept.
        prove: compare an engine that this kind of GPU has not verified yet with the golden samples.

    Raises:
        ConfigError: an unknown engine, options that it cannot take, or no TensorRT engine that fits.
        MissingDependency: the engine's package or its device is absent.
        CheckFailed: a file of the bundle is not what was exported, the graph is not what the manifest describes, or
            the engine is not verified and misses parity.
        MaeDeployError: the engine refuses the graph.
    """
    name = ALIASES.get(engine, engine)
    if name == "auto":
        loaded = _automatic(bundle, options, taps)
    elif name in PLANNED:
        loaded = _planned(bundle, name, options, taps)
    else:
        loaded = _on_graph(bundle, name, options, taps)
    names = (*bundle.graph_outputs, *taps)
    if set(loaded.input_names) != set(bundle.input_names) or set(loaded.output_names) != set(names):
        loaded.close()
        raise CheckFailed(
            f"the graph of {bundle.path} takes {loaded.input_names} and gives {loaded.output_names}, its manifest says"
            f" {bundle.input_names} and {names}",
            hint="export the bundle again",
        )
    if loaded.name == TENSORRT_RTX and prove:
        from mae_deploy.runtime.tensorrt.first_use import check_first_use

        check_first_use(bundle, loaded)
    return loaded


def fall_back(bundle: Bundle, error: MaeDeployError, engine: str = TENSORRT) -> str:
    """The engine that runs a bundle in another's place, after a warning that says why.

    Raises:
        CheckFailed: the error is one: a plan that is not what was built is no reason to go on.
    """
    if isinstance(error, CheckFailed):
        raise error
    _log.warning("ONNX Runtime runs %s instead of %s: %s", bundle.path, _NAMES.get(engine, engine), error)
    return DEFAULT


def open_graph(
    path: Path,
    engine: str = DEFAULT,
    options: EngineOptions = EngineOptions(),
    *,
    precision: str = "fp32",
    check: GraphCheck | None = None,
) -> Engine:
    """Load a bare ONNX file, which no manifest describes and no hash protects: the user names it and trusts it.

    Args:
        check: of a graph of others.

    Raises:
        ConfigError: no such file, an unknown engine, or options that it cannot take.
        MissingDependency: the engine's package or its device is absent.
        MaeDeployError: the engine refuses the graph.
    """
    if not path.is_file():
        raise ConfigError(f"no ONNX file at {path}")
    return _class_of(DEFAULT if engine == "auto" else engine)(path, options, precision=precision, check=check)


def _class_of(engine: str) -> type[Engine]:
    name = ALIASES.get(engine, engine)
    if name in PLANNED:
        raise ConfigError(
            f"{_NAMES[name]} runs bundles, not bare ONNX files",
            hint=f"export a bundle with --engine {next(alias for alias in ALIASES if ALIASES[alias] == name)}",
        )
    if name not in ENGINES:
        raise ConfigError(
            f"unknown engine '{engine}'", hint=f"known: {', '.join(['auto', *ALIASES, *ENGINES, *PLANNED])}"
        )
    return ENGINES[name]()


def _on_graph(bundle: Bundle, name: str, options: EngineOptions, taps: Sequence[str]) -> Engine:
    graph = bundle.graph()
    check = bundle.checks[bundle.manifest["graph"]["file"]]
    return _class_of(name)(graph, options, precision=bundle.arithmetic, taps=taps, check=check)


def engine_for(bundle: Bundle, engine: str, options: EngineOptions) -> str:
    """The engine that `load_engine` tries first, by its name."""
    if engine != "auto":
        return ALIASES.get(engine, engine)
    checked_on: str = bundle.manifest["engine"]
    planned = [name for name in PLANNED if name in {checked_on, *map(plan_engine, bundle.manifest["engines"])}]
    if planned:  # both: the one that is installed
        return next((name for name in planned if is_installed(name)), planned[0])
    return DEFAULT if options.device == "cuda" or util.find_spec(checked_on) is None else checked_on


def _automatic(bundle: Bundle, options: EngineOptions, taps: Sequence[str]) -> Engine:
    name = engine_for(bundle, "auto", options)
    try:
        return (_planned if name in PLANNED else _on_graph)(bundle, name, options, taps)
    except MaeDeployError as error:
        # Another engine than TensorRT only where it is installed and does not load.
        if name == DEFAULT or (name not in PLANNED and not isinstance(error, MissingDependency)):
            raise
        return _on_graph(bundle, fall_back(bundle, error, name), options, taps)


def is_installed(name: str) -> bool:
    """Whether there is a package of an engine of `PLANNED`."""
    module = name.replace("-", "_")
    return any(util.find_spec(found) is not None for found in (module, f"{module}_bindings"))


def _planned(bundle: Bundle, name: str, options: EngineOptions, taps: Sequence[str]) -> Engine:
    # What these import takes a while, and concerns GPUs alone.
    from mae_deploy.runtime.tensorrt.api import load_tensorrt
    from mae_deploy.runtime.tensorrt.engine import gpu_index
    from mae_deploy.runtime.tensorrt.open_plan import open_plan
    from mae_deploy.runtime.tensorrt.plans import find_plan, reason_against_plans
    from mae_deploy.runtime.tensorrt.rtx import load_rtx

    index = gpu_index(options.device)
    api = load_rtx(index) if name == TENSORRT_RTX else load_tensorrt(index)
    entry = find_plan(bundle, api.version, api.gpu)
    if entry is None:
        build = f"mae-deploy build-engine {bundle.path}{' --engine trt-rtx' if name == TENSORRT_RTX else ''}"
        raise ConfigError(
            reason_against_plans(bundle, api.version, api.gpu, name),
            hint=f"{build}, or --engine {DEFAULT}, which runs every bundle",
        )
    if not taps:
        return open_plan(bundle, entry, options)
    from mae_deploy.runtime.tensorrt.open_tapped import open_tapped

    return open_tapped(bundle, entry, options, taps)


def _onnxruntime() -> type[Engine]:
    from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine


def _openvino() -> type[Engine]:
    from mae_deploy.runtime.engines.openvino import OpenVinoEngine

    return OpenVinoEngine


ENGINES: dict[str, Callable[[], type[Engine]]] = {"onnxruntime": _onnxruntime, OPENVINO: _openvino}
"""The name of each engine that reads the graph, which is that of its package, and what gives its class; the package is
imported when an engine loads."""

ALIASES = {"onnx": "onnxruntime", "ov": OPENVINO, "trt": TENSORRT, "trt-rtx": TENSORRT_RTX}
