"""Whether a bundle computes on this device what PyTorch computed when it was exported; no torch needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mae_deploy.errors import MaeDeployError
from mae_deploy.images.read import Array
from mae_deploy.runtime.alone import Died, run_alone
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cache import CacheShape, Sequences
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.layers import blocks_of
from mae_deploy.runtime.parity.checks import Verification, verify_engine
from mae_deploy.runtime.registry import OPENVINO, TENSORRT_RTX, engine_for, load_engine, open_graph

T = TypeVar("T")


def verify_bundle(bundle: Bundle, engine: str = "auto", options: EngineOptions = EngineOptions()) -> Verification:
    """Check the hash of every file, then run the golden samples and compare all outputs with PyTorch's and with
    themselves under invariances.

    Raises:
        CheckFailed: a file is not what was exported. A missed tolerance is not an exception: see `Verification.passed`.
        ConfigError: an unknown engine or device.
        MissingDependency: the engine's package or its device is absent.
        MaeDeployError: the engine refuses the graph or the samples, or dies of them.
    """
    bundle.check_files()
    if engine_for(bundle, engine, options) == OPENVINO:
        return verify_alone(bundle, OPENVINO, options)
    return _verify(bundle, engine, options)


def verify_alone(bundle: Bundle, engine: str, options: EngineOptions) -> Verification:
    """`verify_bundle` in a process of its own, for an engine that may die of a graph: OpenVINO 2026.4 does, of some
    with few tokens and a fixed batch, and nothing would be said.

    Raises:
        MaeDeployError: as `verify_bundle`, and where the process dies.
    """
    return _alone(engine, _verify, bundle, engine, options)


def verify_and_trace_alone(
    bundle: Bundle, engine: str, options: EngineOptions
) -> tuple[Verification, list[float] | None]:
    """`verify_alone`, and the SQNR after each block, unless the engine refuses or dies of a graph that shows them.

    Raises:
        MaeDeployError: as `verify_alone`.
    """
    try:
        return run_alone(_verify_and_trace, bundle, engine, options)
    except Died:
        return verify_alone(bundle, engine, options), None


def _verify_and_trace(bundle: Bundle, engine: str, options: EngineOptions) -> tuple[Verification, list[float] | None]:
    verification = _verify(bundle, engine, options)
    try:
        return verification, blocks_of(bundle, engine, options)
    except MaeDeployError:  # the engine refuses it
        return verification, None


def try_alone(
    graph: Path,
    engine: str,
    options: EngineOptions,
    precision: str,
    inputs: Mapping[str, Array],
    cache: CacheShape | None = None,
) -> None:
    """Load an ONNX file and run it once, in a process of its own.

    Args:
        cache: of a cached graph, whose inputs are updates of streams.

    Raises:
        MaeDeployError: the engine refuses the graph or the inputs, or dies of them.
    """
    _alone(engine, _run_once, graph, engine, options, precision, dict(inputs), cache)


def _alone(engine: str, function: Callable[..., T], *arguments: Any) -> T:
    try:
        return run_alone(function, *arguments)
    except Died as error:
        raise MaeDeployError(
            f"{engine} cannot run this graph: its process {error}",
            hint="use another engine, such as onnxruntime, or another version of this one",
        ) from error


def _run_once(
    graph: Path,
    engine: str,
    options: EngineOptions,
    precision: str,
    inputs: dict[str, Array],
    cache: CacheShape | None,
) -> None:
    with open_graph(graph, engine, options, precision=precision) as loaded:
        (loaded if cache is None else Sequences(loaded, cache)).run(inputs)


def _verify(bundle: Bundle, engine: str, options: EngineOptions) -> Verification:
    with load_engine(bundle, engine, options, prove=False) as loaded:
        verification = verify_engine(bundle, loaded)
        if loaded.name == TENSORRT_RTX and verification.passed:
            from mae_deploy.runtime.tensorrt.first_use import keep_proof

            keep_proof(bundle, loaded, verification.checks)
        return verification
