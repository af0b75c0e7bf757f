"""From an ONNX file to a TensorRT plan, on a GPU of this machine; with TensorRT for RTX on any machine."""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mae_deploy.errors import ConfigError
from mae_deploy.files import mapped
from mae_deploy.runtime.cuda.open_memory import open_memory
from mae_deploy.runtime.manifest import TensorEntry
from mae_deploy.runtime.onnx_file import read_inputs, read_opset
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt.api import Api, load_tensorrt
from mae_deploy.runtime.tensorrt.build_progress import BuildProgress
from mae_deploy.runtime.tensorrt.layer_report import summarise
from mae_deploy.runtime.tensorrt.options import BuildOptions, check_rtx_options
from mae_deploy.runtime.tensorrt.rtx import load_builder
from mae_deploy.runtime.tensorrt.timing_cache import attach, cache_file, keep

Report = Callable[[str, float], None]
"""Takes what is being done and the share of it that is, from 0 to 1."""

_MIB = 1 << 20

_OF_MEMORY = re.compile(
    r"workspace|out ?of ?memory|memory[^;]*(insufficient|not be allocated)|insufficient[^;]*memory", re.IGNORECASE
)
"""What TensorRT says where a build was short of memory: "Some tactics do not have sufficient workspace memory to run",
"Requested amount of GPU memory (1073741824 bytes) could not be allocated"."""

_OF_MEMORY_HINT = "more --workspace where the GPU has it, or a smaller --profile"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltPlan:
    """A built engine."""

    file: Path
    layers: str | None
    """The inspector's report on every layer, as JSON; None where TensorRT gave none."""
    record: dict[str, Any]
    """How it was built: precision, typing, options, seconds, kernels, TensorRT's warnings."""


def build_plan(
    graph: Path,
    file: Path,
    *,
    precision: str,
    typing: str,
    profiles: Sequence[Profile],
    options: BuildOptions = BuildOptions(),
    index: int = 0,
    rtx: bool = False,
    outputs_marked: Sequence[str] = (),
    on_progress: Report | None = None,
) -> BuiltPlan:
    """Build a plan of a graph whose dynamic sizes are called B and K.

    Args:
        file: where the plan is written. It is nowhere else: on a Jetson, the GPU's memory is the host's.
        precision: what a weakly typed graph is computed in; a strongly typed one has it in its types.
        profiles: the sizes that it is built for; of no effect where the graph leaves none open.
        index: of the GPU that it is built on and for.
        rtx: build with TensorRT for RTX instead, which needs no GPU and builds for many.
        outputs_marked: names of inner tensors that become further outputs, in FP32.
        on_progress: is told how far the build is, by TensorRT 10 and later.

    Raises:
        ConfigError: an option, a precision or a graph that this TensorRT or this GPU cannot have.
        MissingDependency: no driver, GPU, `tensorrt`, or neither pycuda nor cuda-bindings.
        MaeDeployError: TensorRT refuses the graph or finds no kernels; its own messages say why.
    """
    api = load_builder() if rtx else load_tensorrt(index)
    _check(api, graph, precision, typing)
    if rtx:
        check_rtx_options(options)
        return _plan(api, graph, file, precision, typing, profiles, options, outputs_marked, on_progress)
    with open_memory(index=index) as memory:
        try:
            with memory.active():
                return _plan(api, graph, file, precision, typing, profiles, options, outputs_marked, on_progress)
        except BaseException as error:
            _release_objects_of(error)
            raise


def _plan(
    api: Api,
    graph: Path,
    file: Path,
    precision: str,
    typing: str,
    profiles: Sequence[Profile],
    options: BuildOptions,
    outputs_marked: Sequence[str],
    on_progress: Report | None,
) -> BuiltPlan:
    """Build, with the GPU's context current where one is needed; what TensorRT makes on the way is gone when this
    returns.
    """
    start = time.monotonic()
    with api.explained(f"build an engine of {graph}"):
        sources_off = _write_plan(api, graph, file, precision, typing, profiles, options, outputs_marked, on_progress)
        seconds, warnings = time.monotonic() - start, api.warnings
        # TensorRT for RTX makes its kernels on the device: here are none to look at.
        layers = None if tensorrt_api.is_rtx(api.module) else _inspect(api, file, options)
    record = {
        "precision": precision,
        "typing": typing,
        "options": {name: value for name, value in asdict(options).items() if name != "timing_cache"},
        "seconds": round(seconds, 1),
        "size": file.stat().st_size,
        "driver": api.gpu.driver,
        "kernel_sources_off": sources_off,
        "kernels": summarise(layers or ""),
        "warnings": warnings,
    }
    return BuiltPlan(file=file, layers=layers, record=record)


def _write_plan(
    api: Api,
    graph: Path,
    file: Path,
    precision: str,
    typing: str,
    profiles: Sequence[Profile],
    options: BuildOptions,
    outputs_marked: Sequence[str],
    on_progress: Report | None,
) -> list[str]:
    """Build and write a plan, and return the sources of kernels that are switched off. Builder, network and the plan in
    memory are gone when it is done: the engine that is inspected next needs as much again.
    """
    builder = api.module.Builder(api.logger)
    network, parser = _parsed(api, builder, graph, strong=typing == "strong")
    _mark_outputs(api, network, outputs_marked)
    config, sources_off = _config(api, builder, precision, typing, options)
    _add_profiles(api, builder, config, read_inputs(graph), profiles)
    # TensorRT for RTX times nothing when it builds: its kernels are made on the device.
    timings = None if tensorrt_api.is_rtx(api.module) else cache_file(options, api.version, api.gpu, precision)
    file.write_bytes(_build(api, builder, network, config, timings, on_progress))
    del parser  # not before: the network's weights are its
    return sources_off


def _release_objects_of(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, and of those that called them: TensorRT's objects must be gone before
    the GPU's context is.
    """
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            _clear(frame)
        error = error.__cause__ or error.__context__


def _clear(frame: FrameType | None) -> None:
    with contextlib.suppress(RuntimeError):  # it is at work still, and so are those that called it
        while frame is not None:
            frame.clear()
            frame = frame.f_back


def _check(api: Api, graph: Path, precision: str, typing: str) -> None:
    """Whatever can be known to fail before the build begins."""
    trt = api.module
    tensorrt_api.precision_flags(trt, precision, strong=typing == "strong")
    if not tensorrt_api.is_rtx(trt):
        tensorrt_api.check_precision(precision, api.gpu)
    highest, opset = tensorrt_api.highest_opset(trt), read_opset(graph)
    if highest is not None and opset > highest:
        raise ConfigError(
            f"{graph} has opset {opset}, and {api.title} reads up to {highest}",
            hint="export with --typing weak",
        )


def _parsed(api: Api, builder: Any, graph: Path, *, strong: bool) -> tuple[Any, Any]:
    """The network of a graph, and the parser, which owns its weights."""
    network = builder.create_network(tensorrt_api.network_flags(api.module, strong=strong))
    parser = api.module.OnnxParser(network, api.logger)
    if not parser.parse_from_file(str(graph)):
        for error in tensorrt_api.parser_errors(parser):
            api.said.add("ERROR", error)
        raise api.refuse(
            f"read {graph}",
            hint="a graph of --engine trt is made for it; TensorRT 8.6 and 11 need one each: docs/tensorrt.md",
        )
    return network, parser


def _mark_outputs(api: Api, network: Any, names: Sequence[str]) -> None:
    """Give the network further outputs: FP32 copies of inner tensors, which take over their names."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    tensors = {
        tensor.name: tensor
        for layer in layers
        for tensor in (layer.get_output(index) for index in range(layer.num_outputs))
    }
    for name in names:
        if name not in tensors:
            raise ConfigError(f"TensorRT's network has no tensor '{name}'")
        tensor = tensors[name]
        if tensor.is_network_output:
            continue
        copy = network.add_cast(tensor, api.module.float32).get_output(0)
        tensor.name, copy.name = f"{name}/inner", name
        network.mark_output(copy)


def _config(api: Api, builder: Any, precision: str, typing: str, options: BuildOptions) -> tuple[Any, list[str]]:
    """The build's settings, and the sources of kernels that are switched off."""
    trt, config = api.module, builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, min(options.workspace * _MIB, api.gpu.memory_bytes))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatible != "none":
        config.hardware_compatibility_level = tensorrt_api.hardware_level(trt, options.hardware_compatible)
    flags = tensorrt_api.precision_flags(trt, precision, strong=typing == "strong")
    for wanted, name in (
        (options.version_compatible, "VERSION_COMPATIBLE"),
        (options.strip, "STRIP_PLAN"),
        (options.refit, "REFIT"),
    ):
        if wanted:
            flags += tensorrt_api.builder_flags(
                trt, [name], option=f"--{name.partition('_PLAN')[0].replace('_', '-').lower()}"
            )
    for flag in flags:
        config.set_flag(flag)
    if precision == "fp32":  # TF32 keeps ten bits of the mantissa: FP32 parity would miss its tolerance
        config.clear_flag(trt.BuilderFlag.TF32)
    tensorrt_api.share_profiles(trt, config)
    return config, tensorrt_api.set_kernel_sources(trt, config, tensorrt_api.loads_library)


def _add_profiles(
    api: Api, builder: Any, config: Any, inputs: Sequence[TensorEntry], profiles: Sequence[Profile]
) -> None:
    dynamic = [entry for entry in inputs if any(isinstance(size, str) for size in entry["shape"])]
    for profile in profiles if dynamic else []:
        added = builder.create_optimization_profile()
        for entry in dynamic:
            added.set_shape(
                entry["name"],
                *(shape_at(entry, {name: sizes[which] for name, sizes in profile.items()}) for which in range(3)),
            )
        if config.add_optimization_profile(added) < 0:
            raise api.refuse(f"take the profile {profile}")


def shape_at(entry: TensorEntry, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of an input for some B and K.

    Raises:
        ConfigError: the input leaves another size open.
    """
    unknown = [size for size in entry["shape"] if isinstance(size, str) and size not in sizes]
    if unknown:
        raise ConfigError(
            f"the profile has no size for '{unknown[0]}' of the input {entry['name']}",
            hint=f"it has {', '.join(sizes)}",
        )
    return tuple(sizes[size] if isinstance(size, str) else size for size in entry["shape"])


def _build(api: Api, builder: Any, network: Any, config: Any, timings: Path | None, on_progress: Report | None) -> Any:
    """The plan in TensorRT's own memory, a buffer."""
    progress = None if on_progress is None else BuildProgress(on_progress)
    if progress is not None:
        monitor = tensorrt_api.create_progress_monitor(api.module, progress.start, progress.step, progress.finish)
        if monitor is not None:
            config.progress_monitor = monitor
    if timings is not None:
        attach(config, timings)
    plan = builder.build_serialized_network(network, config)
    if progress is not None and progress.error is not None:
        raise progress.error
    if plan is None:
        short = any(_OF_MEMORY.search(said) for said in (*api.said.errors, *api.said.warnings))
        raise api.refuse("build this engine", hint=_OF_MEMORY_HINT if short else None)
    if timings is not None:
        keep(config, timings)
    return plan


def _inspect(api: Api, file: Path, options: BuildOptions) -> str | None:
    engine = api.deserialize(mapped(file), host_code=options.version_compatible)
    report = engine.create_engine_inspector().get_engine_information(api.module.LayerInformationFormat.JSON)
    return report if isinstance(report, str) and report else None
