"""OpenVINO, an optional engine for CPUs; it reads the same ONNX graph."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError, import_optional
from mae_deploy.images.read import Array
from mae_deploy.runtime.bundle import external_data
from mae_deploy.runtime.engines.affinity import bound_to
from mae_deploy.runtime.engines.base import Engine, EngineOptions, leak
from mae_deploy.runtime.engines.saturation import may_saturate, openvino_saturates, say_exact

DEVICES = ("auto", "cpu")

_SPECIAL_SHAPES, _SPECIAL_BYTES = 4, 128 * 2**20
"""How many input shapes get a compiled graph of their own, and up to which size of graph and weights: each has its own
copy of them."""

_NOISE = 1e-3
"""The share of an output's power by which two compilations of one graph may differ; what computes something else
differs by all of it."""

Shapes = tuple[tuple[int, ...], ...]
"""Those of all inputs, in the graph's order."""

_process_cores: list[frozenset[int] | None] = []
"""Where OpenVINO computes in this process, once that is settled; None: on any core."""


class OpenVinoEngine(Engine):
    """An ONNX graph compiled for the CPU, for low latency; calls from several threads take turns.

    Known shapes make a small graph up to 15 % faster. So one with dynamic shapes is compiled once more for each of the
    first few that it meets: that call takes longer. The same shapes always run on the same compiled graph, so the same
    inputs give the same outputs.

    OpenVINO looks once in a process which cores there are, and binds threads by that alone, the calling one too. So the
    affinity of a process's first engine holds for all that follow: one with another affinity is refused, one without
    runs on the same cores. Indices out of range are no error here: `Backbone` checks them.
    """

    name = "openvino"
    device = "cpu"
    prepares_sizes = True

    def _load(self, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]) -> None:
        if options.device not in DEVICES:
            raise ConfigError(
                f"OpenVINO runs on the CPU here, not on '{options.device}'",
                hint="use device cpu, or engine onnxruntime",
            )
        openvino = import_openvino()
        self.version = str(openvino.__version__).partition("-")[0]
        try:
            model, self.input_names, names = _read(graph)
            self._ports = {name: index for index, name in enumerate(names)} | _tap(model, taps)
            self.output_names = tuple(self._ports)
            self._options, self._precision = options, precision
            self._request: _Request | None = self._compile(model)
            self._model: Any = model if model.is_dynamic() and _size(graph) <= _SPECIAL_BYTES else None
        except MaeDeployError:
            raise
        except Exception as error:  # those of the frontend are no RuntimeError
            raise MaeDeployError(f"OpenVINO cannot load {graph}: {_one_line(error)}") from error
        self._requests: dict[Shapes, _Request] = {}
        self._turn = threading.Lock()

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        with self._turn:
            if self._request is None:
                raise MaeDeployError("this engine is closed", hint="load the bundle again")
            try:
                arrays = [inputs[name] for name in self.input_names]
                request = self._request_for(arrays, self._request)
                request.infer(arrays)
                # The next call writes to the same memory.
                return {name: request.output(self._ports[name]).copy() for name in outputs}
            except Exception as error:  # RuntimeError, ValueError or TypeError, by what is wrong with an array
                raise MaeDeployError(f"OpenVINO failed: {_one_line(error)}") from error

    def _close(self) -> None:
        with self._turn:
            self._request = self._model = None
            self._requests = {}

    def _request_for(self, arrays: list[Array], usual: _Request) -> _Request:
        """That of the graph compiled for the shapes of these inputs; else the usual one, for all shapes."""
        # NumPy's shapes: a tensor's takes 17 µs, half a millisecond for the 27 inputs of a stream's graph.
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._requests and self._model is not None and len(self._requests) < _SPECIAL_SHAPES:
            model = self._model.clone()
            model.reshape(dict(enumerate(shapes)))
            special = self._compile(model)
            # Where there are as many tokens as heads, OpenVINO 2026.4 has compiled a graph of fixed shapes that
            # computes something else.
            self._requests[shapes] = special if _agree(usual, special, arrays) else usual
        return self._requests.get(shapes, usual)

    def _compile(self, model: Any) -> _Request:
        return _Request(_compile(openvino_core(), model, self._options, self._precision))


class _Request:
    """A compiled graph and its one request, which reads its inputs in the caller's memory."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._new_tensor = import_openvino().Tensor
        self._given: dict[int, Array] = {}
        """What each input was at the last call, in whose memory it is."""

    def infer(self, arrays: list[Array]) -> None:
        """Compute; an input that is the same array as at the last call stays set, as a stream's cache does."""
        for index, array in enumerate(arrays):
            if self._given.get(index) is not array:
                given = np.require(array, requirements=("C", "W"))
                self._request.set_input_tensor(index, self._new_tensor(given, shared_memory=True))
                self._given[index] = given
        self._request.infer(share_outputs=True)

    def output(self, port: int) -> Array:
        """An output of the last call, in OpenVINO's own memory."""
        found: Array = self._request.get_output_tensor(port).data
        return found

    def outputs(self) -> list[Array]:
        """All of them."""
        return [tensor.data for tensor in self._request.output_tensors]


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's `Core` for all of this process, never freed.

    With the last one its CPU plug-in goes. If that happens in another thread than the one that has made it, the next
    signal handler of Python's there, for Ctrl-C or a child that ends, ends the process (OpenVINO 2026.4).
    """
    return import_openvino().Core()


def _forget_core() -> None:
    """In a forked process: the core's threads are not there, the next engine makes a core of its own."""
    if openvino_core.cache_info().currsize:
        leak(openvino_core())
        openvino_core.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_core)


def import_openvino() -> ModuleType:
    """OpenVINO without its telemetry, which has no switch in the environment: where it is first imported, it writes an
    id below HOME and sends that it was. Where the package is missing, it does without.

    Raises:
        MissingDependency: OpenVINO is not installed, or cannot be loaded.
    """
    hidden = {"openvino", "openvino_telemetry"}.isdisjoint(sys.modules)
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        return import_optional("openvino", extra="openvino")
    finally:
        if hidden:
            sys.modules.pop("openvino_telemetry", None)


def _read(graph: Path) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """The graph as OpenVINO's model, and the names of its inputs and outputs, which a model no longer tells from those
    of Identity nodes beside them.

    By the ONNX frontend alone: `Core.read_model` tries all formats on a broken file, and some write to stderr.
    """
    frontend = importlib.import_module("openvino.frontend").FrontEndManager().load_by_framework("onnx")
    content = frontend.load(str(graph))
    inputs, outputs = (
        tuple(place.get_names()[0] for place in places) for places in (content.get_inputs(), content.get_outputs())
    )
    if not outputs:  # an empty file is a valid protobuf message
        raise MaeDeployError(f"OpenVINO cannot load {graph}: it holds no graph")
    return frontend.convert(content), inputs, outputs


def _agree(request: _Request, other: _Request, arrays: list[Array]) -> bool:
    """Whether two compiled graphs compute the same from these inputs, but for rounding."""
    for each in (request, other):
        each.infer(arrays)
    for one, two in zip(request.outputs(), other.outputs(), strict=True):
        expected, found = one.astype(np.float64), two.astype(np.float64)
        if (
            not np.square(found - expected).sum() <= _NOISE * np.square(expected).sum()
        ):  # nor where something is not finite
            return False
    return True


def _size(graph: Path) -> int:
    return graph.stat().st_size + sum((graph.parent / name).stat().st_size for name in external_data(graph))


def _tap(model: Any, taps: tuple[str, ...]) -> dict[str, int]:
    """Make inner tensors outputs, and return the index of each among all outputs."""
    model.add_outputs(list(taps))
    return {tap: next(index for index, port in enumerate(model.outputs) if tap in port.names) for tap in taps}


def _compile(core: Any, model: Any, options: EngineOptions, precision: str) -> Any:
    with bound_to(options.affinity):
        _settle_cores(options.affinity)
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if precision.endswith("bf16") and "BF16" in capabilities else "f32",
            # OpenVINO's default pins to the first cores that there are: two processes with one thread each would share
            # one core.
            "ENABLE_CPU_PINNING": options.affinity is not None,
        }
        # Products in FP32 of what is stored in 8 bits where the fast ones are not exact: without this, a ViT-S with
        # static INT8 fell from 33 dB to 13 dB on a CPU with AVX2 and no VNNI.
        if may_saturate(precision) and openvino_saturates(core):
            say_exact("OpenVINO computes INT8 in FP32", "export fp32, or for ONNX Runtime with --weight-bits 7")
            settings["LP_TRANSFORMS_MODE"] = False
        if options.num_threads is not None:
            settings["INFERENCE_NUM_THREADS"] = options.num_threads
        return core.compile_model(model, "CPU", settings)


def _settle_cores(affinity: tuple[int, ...] | None) -> None:
    cores = None if affinity is None else frozenset(affinity)
    if not _process_cores:
        _process_cores.append(cores)
    elif cores not in (None, _process_cores[0]):
        settled = (
            "any core" if _process_cores[0] is None else f"the cores {','.join(map(str, sorted(_process_cores[0])))}"
        )
        raise ConfigError(
            f"OpenVINO in this process computes on {settled} since its first engine was loaded, and cannot be bound to"
            " others",
            hint="load this engine first, or in a process of its own",
        )


def _one_line(error: Exception) -> str:
    """Without the lines that say where in OpenVINO's source it was raised."""
    lines = [line for line in str(error).splitlines() if not line.startswith(("Exception from ", "Check '"))]
    return " ".join(" ".join(lines).split()) or " ".join(str(error).split())
