"""TensorRT 8.6, 10 and 11 behind one shape: what its versions name or do differently is decided here, by asking the
module at hand.

Each function that takes `trt` takes the `tensorrt` module, so that all of them can be tried on the bindings of every
version without a GPU.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency, import_optional
from mae_deploy.runtime.cuda.driver import Gpu, require_gpu

SUPPORTED = "8.6, 10 and 11"

_EXTERNAL_LIBRARIES = {"CUBLAS": "cublas", "CUBLAS_LT": "cublasLt", "CUDNN": "cudnn"}
"""What TensorRT 8 takes kernels from by default, beside its own."""

_LIBRARY_MAJORS = {"cublas": (12, 11), "cublasLt": (12, 11), "cudnn": (8,)}
"""Of the libraries that the builds of TensorRT 8.6 are linked with."""

_MOST_MESSAGES = 50


# --- what was said ---------------------------------------------------------------------------------------------------


class Messages:
    """TensorRT's warnings and errors since the last `clear`, by thread-safe appending; the first ones, where there are
    very many.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def add(self, severity: str, text: str) -> None:
        """Keep a message of severity INTERNAL_ERROR, ERROR or WARNING, once; others are not kept."""
        kept = self.errors if severity.endswith("ERROR") else self.warnings if severity == "WARNING" else None
        line = " ".join(text.split())
        with self._lock:
            if kept is not None and line not in kept and len(kept) < _MOST_MESSAGES:
                kept.append(line)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self.errors, self.warnings = [], []

    def text(self) -> str:
        """The errors, or the warnings where there are none, in one line."""
        return "; ".join(self.errors or self.warnings) or "TensorRT gives no reason"


def create_logger(trt: Any, messages: Messages) -> Any:
    """A logger of TensorRT's that keeps what it is told; it must outlive every object that was made with it."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            messages.add(severity.name, msg)

    return Logger()


# --- where versions differ -------------------------------------------------------------------------------------------


def major_version(trt: Any) -> int:
    """8, 10 or 11; 11 also of TensorRT for RTX, which has its API.

    Raises:
        MissingDependency: another one.
    """
    if is_rtx(trt):
        return 11
    version = str(trt.__version__)
    major, minor = (int(part) for part in version.split(".")[:2])
    if major not in (8, 10, 11) or (major, minor) < (8, 6):
        raise MissingDependency(
            f"TensorRT {version} is installed; this works with {SUPPORTED}", hint="install another: docs/tensorrt.md"
        )
    return major


def is_rtx(trt: Any) -> bool:
    """Whether the module is TensorRT for RTX, whose versions are numbers of their own."""
    return str(trt.__version__).startswith("1.")


def title(trt: Any) -> str:
    """What it is called in messages, with its version."""
    return f"TensorRT {'for RTX ' if is_rtx(trt) else ''}{trt.__version__}"


def network_flags(trt: Any, *, strong: bool) -> int:
    """The flags of a network with explicit batch; strong: its tensors' types say in what is computed. TensorRT 11 knows
    no other.
    """
    known, major = trt.NetworkDefinitionCreationFlag, major_version(trt)
    if major == 8:
        return 1 << int(known.EXPLICIT_BATCH)
    return 1 << int(known.STRONGLY_TYPED) if strong and major == 10 else 0


def builder_flags(trt: Any, names: Sequence[str], *, option: str) -> list[Any]:
    """The builder's flags of these names.

    Raises:
        ConfigError: this version has not got one.
    """
    missing = [name for name in names if not hasattr(trt.BuilderFlag, name)]
    if missing:
        raise ConfigError(
            f"{option}: {title(trt)} has no {missing[0]}",
            hint=f"leave it out, or use another version of TensorRT ({SUPPORTED})",
        )
    return [getattr(trt.BuilderFlag, name) for name in names]


def precision_flags(trt: Any, precision: str, *, strong: bool) -> list[Any]:
    """What the builder is allowed to compute in; a strongly typed graph says it itself, but TensorRT 8, which has no
    strong typing, is told as well.

    Raises:
        ConfigError: this version cannot compute the graph so.
    """
    major = major_version(trt)
    if strong and major >= 10:
        return []
    if precision == "fp8":
        raise ConfigError(
            "TensorRT computes in FP8 only what a strongly typed graph has in FP8",
            hint="use TensorRT 10 or later, and export with --typing strong",
        )
    if strong and precision not in ("fp32", "fp16"):
        raise ConfigError(
            f"{title(trt)} cannot build a strongly typed {precision} graph",
            hint="export with --typing weak",
        )
    if not strong and major >= 11 and precision != "fp32":
        raise ConfigError(
            f"{title(trt)} computes a weakly typed graph in FP32, not in {precision}",
            hint="export with --typing strong, or build --precision fp32",
        )
    names = {"fp32": (), "fp16": ("FP16",), "bf16": ("BF16",), "int8": ("INT8", "FP16")}[precision]
    return builder_flags(trt, names, option=f"--precision {precision}")


def least_capability(precision: str) -> tuple[int, int]:
    """The compute capability from which on GPUs have arithmetic of this precision."""
    return {"bf16": (8, 0), "fp8": (8, 9)}.get(precision, (0, 0))


def check_precision(precision: str, gpu: Gpu) -> None:
    """Raise ConfigError where the GPU has no arithmetic of this precision."""
    needed = least_capability(precision)
    if gpu.compute_capability < needed:
        found, least = (".".join(map(str, numbers)) for numbers in (gpu.compute_capability, needed))
        raise ConfigError(
            f"{precision} needs a GPU of compute capability {least}; {gpu.name} has {found}", hint="use fp16"
        )


def highest_opset(trt: Any) -> int | None:
    """The highest ONNX opset that the parser reads; None where that was not found out."""
    return 17 if major_version(trt) == 8 else None


def hardware_level(trt: Any, wanted: str) -> Any:
    """The hardware compatibility level of `BuildOptions.hardware_compatible`.

    Raises:
        ConfigError: this version has not got it.
    """
    name = {"none": "NONE", "ampere": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}[wanted]
    if not hasattr(trt.HardwareCompatibilityLevel, name):
        raise ConfigError(
            f"--hardware-compatible {wanted}: {title(trt)} has no {name}",
            hint="use ampere, or TensorRT 10.9 or later",
        )
    return getattr(trt.HardwareCompatibilityLevel, name)


def set_kernel_sources(trt: Any, config: Any, loads: Callable[[str], bool]) -> list[str]:
    """On TensorRT 8, switch off the sources of kernels whose libraries are not here (later versions use none by
    default), and return their names.

    Args:
        loads: whether the system finds a library of this file name.
    """
    if major_version(trt) != 8:
        return []
    missing = [
        name
        for name, library in _EXTERNAL_LIBRARIES.items()
        if not any(loads(f"lib{library}.so.{major}") for major in _LIBRARY_MAJORS[library])
    ]
    if missing:
        off = sum(1 << int(getattr(trt.TacticSource, name)) for name in missing)
        config.set_tactic_sources(config.get_tactic_sources() & ~off)
        config.set_preview_feature(trt.PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805, True)
    return missing


def share_profiles(trt: Any, config: Any) -> None:
    """Let several contexts use one profile at a time, as every version after TensorRT 8 does."""
    feature = getattr(trt.PreviewFeature, "PROFILE_SHARING_0806", None)
    if feature is not None and major_version(trt) == 8:
        config.set_preview_feature(feature, True)


def loads_library(name: str) -> bool:
    """Whether the system's loader finds a library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def parser_errors(parser: Any) -> list[str]:
    """Every error of an ONNX parser, with the node where it is known."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = error.node()
        found.append(f"node {node}: {' '.join(error.desc().split())}" if node >= 0 else " ".join(error.desc().split()))
    return found


def create_progress_monitor(
    trt: Any,
    start: Callable[[str, str | None, int], None],
    step: Callable[[str, int], bool],
    finish: Callable[[str], None],
) -> Any:
    """A monitor that passes on the phases of a build; None where this version has none (before 10). None of the three
    may raise.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step_number: int) -> bool:
            return step(phase_name, step_number)

        def phase_finish(self, phase_name: str) -> None:
            finish(phase_name)

    return Monitor()


def numpy_dtype(trt: Any, dtype: Any) -> np.dtype[Any]:
    """NumPy's type for one of TensorRT's.

    Raises:
        MaeDeployError: NumPy has none (BF16, FP8, INT4).
    """
    try:
        found: np.dtype[Any] = np.dtype(trt.nptype(dtype))
    except TypeError as error:
        raise MaeDeployError(
            f"NumPy has no type for TensorRT's {getattr(dtype, 'name', dtype)}",
            hint="export the graph with float32 outputs",
        ) from error
    return found


# --- the library -----------------------------------------------------------------------------------------------------


class Api:
    """The `tensorrt` module of this process, and its one logger."""

    def __init__(self, module: Any, gpu: Gpu) -> None:
        self.module = module
        self.gpu = gpu
        self.version = str(module.__version__)
        self.title = title(module)
        self.major = major_version(module)
        self.said = Messages()
        self.logger = create_logger(module, self.said)

    def messages(self) -> str:
        """What TensorRT said since the last `clear`, errors before warnings, in one line."""
        return self.said.text()

    @property
    def warnings(self) -> list[str]:
        """Its warnings since the last `clear`."""
        return list(self.said.warnings)

    @contextmanager
    def explained(self, what: str, *, hint: str | None = None) -> Iterator[None]:
        """Turn whatever the bindings raise in the block into one error with TensorRT's own messages.

        Raises:
            MaeDeployError: the block failed.
        """
        self.said.clear()
        try:
            yield
        except MaeDeployError:
            raise
        except (
            Exception
        ) as error:  # TypeError where a factory gives null, else RuntimeError, ValueError or pybind11's own
            said = self.said.errors or [" ".join(str(error).split())]
            raise MaeDeployError(f"{self.title} cannot {what}: {'; '.join(said)}", hint=hint) from error

    def refuse(self, what: str, *, hint: str | None = None) -> MaeDeployError:
        """The error for a call that gave None or False, which is how TensorRT fails."""
        return MaeDeployError(f"{self.title} cannot {what}: {self.messages()}", hint=hint)

    def deserialize(self, plan: mmap.mmap | bytes, *, host_code: bool = False, weights: Path | None = None) -> Any:
        """An `ICudaEngine` from a plan. A plan is code: its hash must have been checked before.

        Args:
            host_code: let the plan bring code for the CPU too, as one that is version-compatible does.
            weights: the ONNX file whose weights a stripped plan needs.

        Raises:
            MaeDeployError: TensorRT refuses it; its messages say why.
        """
        hint = "build it again on this device: mae-deploy build-engine BUNDLE"
        with self.explained("load this engine", hint=hint):
            runtime = self.module.Runtime(self.logger)
            runtime.engine_host_code_allowed = host_code
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self.refuse("load this engine", hint=hint)
            if weights is not None:
                self._refit(engine, weights)
            return engine

    def _refit(self, engine: Any, weights: Path) -> None:
        if not hasattr(self.module, "OnnxParserRefitter"):
            raise MaeDeployError(
                f"{self.title} cannot put weights into a plan that was built without",
                hint="build it again without --strip",
            )
        refitter = self.module.Refitter(engine, self.logger)
        parser = self.module.OnnxParserRefitter(refitter, self.logger)
        if not parser.refit_from_file(str(weights)):
            raise self.refuse(f"take the weights of {weights}: {'; '.join(parser_errors(parser))}")
        if not refitter.refit_cuda_engine():
            raise self.refuse(f"put the weights of {weights} into this engine")


_loaded: dict[int, Api] = {}
_loading = threading.Lock()


def load_tensorrt(index: int = 0) -> Api:
    """TensorRT on a GPU of this machine. The GPU is looked for first: TensorRT 8.6 ends the process where there is
    none.

    Raises:
        MissingDependency: no driver, no GPU, no `tensorrt`, or a version that this does not work with.
    """
    gpu = require_gpu(index)
    with _loading:
        if index not in _loaded:
            _loaded[index] = Api(import_optional("tensorrt", extra="trt"), gpu)
        return _loaded[index]
