"""What an export for TensorRT does on this machine's GPU: look for it first, build the engine last, and gate it on
PyTorch's outputs of all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mae_deploy.errors import CheckFailed, MissingDependency
from mae_deploy.export.config import ExportConfig
from mae_deploy.export.job import ExportJob
from mae_deploy.export.proof import compare_samples, tolerance_of
from mae_deploy.progress import notice, percentage
from mae_deploy.reporting.bundles import UNVERIFIED
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.open_memory import open_memory
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import plan_engine
from mae_deploy.runtime.parity.certificate import Classes
from mae_deploy.runtime.parity.compare import Comparison
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt.add_engine import Built, build_engine
from mae_deploy.runtime.tensorrt.open_plan import open_plan
from mae_deploy.runtime.tensorrt.plans import is_verified, title
from mae_deploy.runtime.tensorrt.rtx import load_builder

BASELINE_FILE = "baseline.onnx"
"""The FP16 graph with whose engine one in INT8 or FP8 is compared, here or on the device."""

NO_BUILD = (
    "--no-build writes the bundle, checked on ONNX Runtime; 'mae-deploy build-engine' then builds the engine on the"
    " device"
)

SPEED_LEFT = "whether it is faster than FP16 is not known yet: 'mae-deploy build-engine' measures both on the device"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProof:
    """An engine in a bundle, and what its outputs are."""

    built: Built
    comparisons: list[Comparison]
    """Each output over all samples, run as CUDA graphs; none of TensorRT for RTX where no GPU could run it."""
    classes: Classes | None
    """Of a classifier: what PyTorch and the engine take the images for."""

    def record(self) -> dict[str, Any]:
        """For `parity` of the manifest."""
        figures = [
            {key: value for key, value in comparison.to_dict().items() if key != "reason"}
            for comparison in self.comparisons
        ]
        return {
            "passed": True,
            "engine": plan_engine(self.built.entry),
            "file": self.built.entry["file"],
            "num_samples": self.comparisons[0].num_samples,
            "outputs": figures,
        }

    def speed(self) -> dict[str, Any]:
        """For the record of quantization, where FP16 was built as well."""
        baseline = self.built.baseline
        if baseline is None:
            return {}
        milliseconds = {name: values[baseline["profile"]] for name, values in baseline["latency_ms"].items()}
        return {
            "speed": f"measured on {self.built.entry['gpu']}",
            "latency_ratio": baseline["latency_ratio"],
            "latency_ms": milliseconds,
        }

    def summary(self) -> dict[str, Any]:
        """For the command's result."""
        entry, speed = self.built.entry, self.speed()
        text = f"{entry['file']} for {entry['gpu']}"
        text += f", {entry['latency_ms']:.3f} ms" if self.comparisons else f", not verified: {UNVERIFIED}"
        if speed:
            text += f", {speed['latency_ratio']:.2f} of FP16's latency"
        return {
            "text": text,
            "file": entry["file"],
            "gpu": entry["gpu"],
            "tensorrt": entry["tensorrt"],
            "latency_ms": entry["latency_ms"],
            **speed,
        }


def require_tensorrt(config: ExportConfig) -> None:
    """Whatever the build would miss is said here, before anything is computed.

    Raises:
        MissingDependency: no driver, GPU, `tensorrt`, or neither pycuda nor cuda-bindings; with TensorRT for RTX, that
            it is not installed.
        ConfigError: this TensorRT or this GPU cannot compute in the precision.
    """
    if config.engine == "trt-rtx":
        load_builder()
        return
    try:
        api = tensorrt_api.load_tensorrt()
        with open_memory(index=api.gpu.index):
            pass
    except MissingDependency as error:
        raise MissingDependency(
            f"--engine trt builds an engine on this machine: {error}",
            hint="; ".join(filter(None, (error.hint, NO_BUILD))),
        ) from error
    tensorrt_api.precision_flags(api.module, config.precision, strong=config.resolved_typing == "strong")
    tensorrt_api.check_precision(config.precision, api.gpu)


def build_and_gate(job: ExportJob, bundle: Bundle) -> DeviceProof:
    """Build the engine into the bundle, with FP16 beside it where there is a baseline, and compare it with PyTorch on
    every sample at every size.

    Raises:
        CheckFailed: its outputs miss the budget, or it is not faster than FP16; both figures are in the message.
        MaeDeployError: TensorRT cannot build it.
    """
    config = job.config
    with percentage("build") as report:
        built = build_engine(
            bundle,
            profiles=job.profiles,
            options=config.tensorrt,
            rtx=config.engine == "trt-rtx",
            max_latency=config.int8.max_latency,
            on_progress=report,
        )
    return _gate(job, bundle, built)


def _gate(job: ExportJob, bundle: Bundle, built: Built) -> DeviceProof:
    if not is_verified(built.entry):
        notice("not verified:", UNVERIFIED)
        return DeviceProof(built=built, comparisons=[], classes=None)
    failures: list[str] = []
    for graphs in (False, True):
        with open_plan(bundle, built.entry, EngineOptions(cuda_graphs=graphs)) as engine:
            for _ in range(1 + graphs):  # a CUDA graph is recorded after a plain run of its shape
                comparisons, missed, classes = compare_samples(
                    job, engine, tolerance_of(job), lambda K: _batches(job, K)
                )
                failures += [f"CUDA graph: {failure}" if graphs else failure for failure in missed]
    if failures:
        raise CheckFailed(
            f"the {title(built.entry)} engine misses parity with PyTorch on the samples:"
            f" {'; '.join(dict.fromkeys(failures))}",
            hint=(
                "nothing was written; another --precision, --optimization-level or TensorRT version may compute it"
                " right"
            ),
        )
    return DeviceProof(built=built, comparisons=comparisons[: len(job.names)], classes=classes)


def _batches(job: ExportJob, K: int | None) -> list[int]:
    """The smallest, usual and largest batch of every profile that holds this K."""
    holding = [profile for profile in job.profiles if K is None or profile["K"][0] <= K <= profile["K"][2]]
    return sorted({batch for profile in holding for batch in profile["B"]})
