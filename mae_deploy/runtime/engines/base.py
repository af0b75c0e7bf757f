"""What runs a bundle's graph: one small interface for every engine."""

from __future__ import annotations

import ctypes
import os
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.images.read import Array
from mae_deploy.machine import default_threads
from mae_deploy.runtime.engines.affinity import bound_to
from mae_deploy.runtime.manifest import IDS_KEEP
from mae_deploy.runtime.profiles import batch_that_fits

if TYPE_CHECKING:
    from typing_extensions import Self

    from mae_deploy.runtime.graph.check import GraphCheck


Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Where an engine computes."""

    device: str = "cpu"
    """auto, cpu or cuda, for ONNX Runtime; TensorRT uses the first GPU, or with cuda:1 the second, and so on."""
    threads: int | None = None
    """CPU threads; None: one for each granted core, or for each of `affinity`."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine's threads, and the calling thread during a run, are bound to; None: any. Linux only."""
    cuda_graphs: bool = True
    """TensorRT only: replay what a run does on the GPU as a CUDA graph."""
    cuda_memory: str = "auto"
    """TensorRT only, the package behind the GPU's memory: pycuda, cuda-bindings, or auto."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        cores = self.affinity
        if cores is not None and (not cores or len(set(cores)) < len(cores) or min(cores) < 0):
            raise ConfigError(
                f"affinity must name CPU cores, each once, not '{','.join(map(str, cores))}'",
                hint="e.g. 0,1: the first two",
            )

    @property
    def num_threads(self) -> int | None:
        """CPU threads; None, where the whole machine is granted, leaves the choice to the engine."""
        if self.threads is None and self.affinity is not None:
            return len(self.affinity)
        return default_threads() if self.threads is None else self.threads


class Run(Protocol):
    """A run that was started."""

    def result(self) -> dict[str, Any]:
        """Wait for it, and return its outputs.

        Raises:
            MaeDeployError: it failed.
        """
        ...


class _Done(Run):
    def __init__(self, outputs: dict[str, Array]) -> None:
        self._outputs = outputs

    def result(self) -> dict[str, Any]:
        return self._outputs


class Runner(ABC):
    """What samples are run on: an engine, or what runs one several times for each sample."""

    profiles: Sequence[Mapping[str, Sequence[int]]]
    """The ranges of B and K that it takes, each smallest, usual and largest; empty: whatever the graph takes."""
    in_flight = 1
    """Runs that it computes while the caller prepares others; 1: `submit` returns when its run is done."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the samples in `inputs`, each `(B, ...)` under its name, and return the named outputs, or all."""

    def submit(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> Run:
        """Start a run, where the engine computes beside the caller; else run at once.

        Raises:
            ConfigError, MaeDeployError: as `run`.
        """
        return _Done(self.run(inputs, outputs))


class Engine(Runner):
    """A loaded graph; a context manager that closes it, safe to call from several threads.

    It belongs to the process that loaded it: one that is forked from that can neither run nor close it. Pickled, it is
    loaded again where it is unpickled.
    """

    name: str
    """As `load_engine` and the command line know it."""
    version: str
    """Of the library that runs the graph."""
    device: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    """Those of the graph, then the taps."""
    precision: str
    """As it was loaded with."""
    prepares_sizes = False
    """Whether inputs of a size that is new take it longer once, and few sizes are fastest."""

    def __init__(
        self,
        graph: Path,
        options: EngineOptions,
        *,
        precision: str = "fp32",
        taps: Sequence[str] = (),
        profiles: Sequence[Mapping[str, Sequence[int]]] = (),
        check: GraphCheck | None = None,
    ) -> None:
        """Load an ONNX file, with its external data.

        Args:
            precision: what the graph computes in, fp32, fp16, bf16 or int8, as `Bundle.arithmetic` says: bf16 lets the
                engine compute in BF16 what the graph has in FP32, int8-bf16 also does so beside the products in INT8;
                int8-w7 and int8-w7-bf16 have weights of 7 bits, whose products are exact on every CPU.
            taps: names of inner tensors that are returned as further outputs.
            profiles: the ranges of B and K for which the graph was compiled ahead of time; empty: it was not.
            check: of the graph, which a run with inputs of a size that is new asks before; None: the graph is our own.

        Raises:
            ConfigError: a device that this engine has not, or a core that is not there.
            MissingDependency: the engine's package or its device is absent.
            MaeDeployError: the engine refuses the graph, or a tap is not a tensor of it.
        """
        self._affinity, self.precision, self.profiles = options.affinity, precision, profiles
        self.options, self.taps, self._graph_check = options, tuple(taps), check
        self._again: Callable[..., Engine] = partial(
            type(self), graph.absolute(), options, precision=precision, taps=taps, profiles=profiles, check=check
        )
        self._process = os.getpid()
        self._load(graph, options, precision, self.taps)
        _loaded.add(self)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the graph once on `inputs`, each `(B, ...)` under its name, and return the named outputs, or all.

        Raises:
            ConfigError: inputs or outputs that the graph does not have; a graph that `check` refuses for these sizes.
            MaeDeployError: the engine refuses the inputs, fails, or is closed.
        """
        names = self._check(inputs, outputs)
        if self._graph_check is not None:
            self._graph_check.check({name: array.shape for name, array in inputs.items()})
        with bound_to(self._affinity):
            return self._run(inputs, names)

    def _check(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None) -> tuple[str, ...]:
        """The names of the outputs of a run on inputs that the graph has, in the process that loaded it."""
        if os.getpid() != self._process:
            raise MaeDeployError(
                "this engine was loaded in another process: load after the fork",
                hint="Backbone.load in each worker, or start workers by spawn: docs/workers.md",
            )
        if set(inputs) != set(self.input_names):
            raise ConfigError(
                f"the graph takes the inputs {', '.join(self.input_names)}, not {', '.join(inputs) or 'none'}"
            )
        return check_outputs(outputs, self.output_names)

    @abstractmethod
    def _load(self, graph: Path, options: EngineOptions, precision: str, taps: tuple[str, ...]) -> None:
        """Set the public attributes, and start the engine's threads while the calling thread is bound to the cores:
        they inherit that.
        """

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]: ...

    def close(self) -> None:
        """Free what the engine holds; closing twice does nothing, nor does closing in a forked process."""
        if os.getpid() == self._process:
            self._close()

    @abstractmethod
    def _close(self) -> None:
        """Free what the engine holds, once or again."""

    def _abandon(self) -> None:
        """In a forked process: keep this engine from ever being freed, at the end of the process too."""
        leak(self)

    def __reduce__(self) -> tuple[Callable[..., Engine], tuple[()]]:
        return self._again, ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_loaded: weakref.WeakSet[Engine] = weakref.WeakSet()
"""The engines of this process."""


def leak(thing: object) -> None:
    """Keep an object for as long as the process lives.

    An engine's threads are not there in a forked process, and what frees it waits for them, or dies: ONNX Runtime by
    SIGSEGV, OpenVINO for ever.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _abandon_all() -> None:
    for engine in list(_loaded):
        engine._abandon()
    _loaded.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_abandon_all)


def check_outputs(wanted: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The wanted outputs, each once; all that are known for None.

    Raises:
        ConfigError: none, or one that the graph does not have.
    """
    if wanted is None:
        return tuple(known)
    names = tuple(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"no output '{', '.join(unknown)}'" if unknown else "no output was asked for",
            hint=f"this graph has: {', '.join(known)}",
        )
    return names


def run_in_chunks(
    engine: Runner, inputs: Mapping[str, Array], *, batch: int | None, outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """Run any number of samples, each input `(B, ...)`, on a graph of the fixed `batch`; None runs all at once, or as
    many as the engine takes.

    The last chunk is filled up with its last sample, and the surplus is cut from the outputs. Inner tensors that hold
    the rows of all samples, `(B * T, D)`, come back as `(B, T, D)`.
    """
    return start_in_chunks(engine, inputs, batch=batch, outputs=outputs)()


def start_in_chunks(
    engine: Runner, inputs: Mapping[str, Array], *, batch: int | None, outputs: Sequence[str] | None = None
) -> Callable[[], dict[str, Array]]:
    """Start what `run_in_chunks` does, and return what waits for it: where it is one run of an engine that computes
    beside the caller, the next one can be prepared meanwhile.
    """
    total = min(len(array) for array in inputs.values())
    keep = inputs[IDS_KEEP].shape[1] if IDS_KEEP in inputs else None
    batch = batch or batch_that_fits(engine.profiles, total, keep)
    if batch is None or batch == total:  # None: the engine itself says which K it takes
        run = engine.submit(inputs, outputs)
        return lambda: {name: _by_sample(values, total) for name, values in run.result().items()}
    parts = (
        {name: _fill(array[start : start + batch], batch) for name, array in inputs.items()}
        for start in range(0, total, batch)
    )
    started = (engine.submit(part, outputs).result for part in parts)
    chunks = list(results_in_order(started, engine.in_flight))
    found = {name: np.concatenate([_by_sample(chunk[name], batch) for chunk in chunks])[:total] for name in chunks[0]}
    return lambda: found


def results_in_order(started: Iterable[Callable[[], Result]], in_flight: int) -> Iterator[Result]:
    """The results of what is started when it is asked for, at most `in_flight` of it at a time."""
    pending: deque[Callable[[], Result]] = deque()
    for wait in started:
        pending.append(wait)
        if len(pending) == in_flight:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def _by_sample(values: Array, batch: int) -> Array:
    return values.reshape(batch, -1, values.shape[1]) if values.ndim == 2 and len(values) > batch else values


def _fill(samples: Array, batch: int) -> Array:
    missing = batch - len(samples)
    return np.concatenate([samples, np.repeat(samples[-1:], missing, axis=0)]) if missing else samples
