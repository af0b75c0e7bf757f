"""Which engines there are, by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engine import Engine


def load_engine(bundle: Bundle, engine: str = "auto", *, device: str = "cpu", threads: int | None = None) -> Engine:
    """Load the bundle's graph on an engine: `auto`, or one of `ENGINES` by name or alias.

    Raises:
        ConfigError: an unknown engine, or one that the bundle was not built for.
        MissingDependency: the engine's package or its device is absent.
        CheckFailed: a file of the bundle is not what was exported.
    """
    name = ALIASES.get(engine, engine)
    if name == "tensorrt":
        raise ConfigError(_why_no_tensorrt(bundle), hint="use --engine onnxruntime, which runs every bundle")
    if name not in ENGINES:
        known = [known for known in [*ALIASES, *ENGINES] if ALIASES.get(known, known) in ENGINES]
        raise ConfigError(f"unknown engine '{engine}'", hint=f"known: {', '.join(known)}")
    return ENGINES[name](bundle, device, threads)


def _onnxruntime(bundle: Bundle, device: str, threads: int | None) -> Engine:
    from mae_deploy.runtime.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, device=device, threads=threads)


def _why_no_tensorrt(bundle: Bundle) -> str:
    engines = bundle.manifest["engines"]
    if not engines:
        return f"the bundle {bundle.path} has no TensorRT engine"
    return f"the bundle {bundle.path} has {len(engines)} TensorRT engines, which this version of mae-deploy cannot run"


ENGINES: dict[str, Callable[[Bundle, str, int | None], Engine]] = {"onnxruntime": _onnxruntime}
"""Each engine's name and what loads it; an engine's package is imported then, not before."""

ALIASES = {"auto": "onnxruntime", "onnx": "onnxruntime", "trt": "tensorrt"}
