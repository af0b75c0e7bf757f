"""The TensorRT engines of a bundle: which of them fits this machine, and why none does."""

from __future__ import annotations

from collections.abc import Mapping

from mae_deploy.errors import ConfigError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.manifest import PLANNED, QUANTIZED, EngineEntry, Precision, plan_engine

PREFERENCE: tuple[Precision, ...] = ("int8", "fp8", "fp16", "bf16", "fp32")
"""The fastest first: INT8 and FP8 are in a bundle only where they were measured to be faster than FP16, or where nobody
could measure it yet."""

TENSORRT, TENSORRT_RTX = PLANNED

_TITLES = {TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT for RTX"}


def find_plan(bundle: Bundle, version: str, gpu: Gpu, sizes: Mapping[str, int] | None = None) -> EngineEntry | None:
    """The engine of the bundle that this TensorRT can run on this GPU; of several, the first of `PREFERENCE`, built by
    this version.

    Args:
        sizes: B and K that a profile of it must hold; None: any.
    """
    fitting = [
        entry
        for entry in bundle.manifest["engines"]
        if reason_against_plan(entry, version, gpu) is None and _holds(entry, sizes or {})
    ]
    return min(
        fitting, key=lambda entry: (PREFERENCE.index(entry["precision"]), entry["tensorrt"] != version), default=None
    )


def reason_against_plan(entry: EngineEntry, version: str, gpu: Gpu) -> str | None:
    """Why an engine cannot be run here; None where it can."""
    if entry["tensorrt"] != version and not (entry["version_compatible"] and _is_later(version, entry["tensorrt"])):
        return f"it was built by {title(entry)}, and {version} is installed"
    built_on, here = tuple(entry["compute_capability"]), gpu.compute_capability
    fits = {
        "none": (entry["gpu"], built_on) == (gpu.name, here),
        "same": built_on == here,
        "ampere": min(built_on, here) >= (8, 0),
    }
    if plan_engine(entry) == TENSORRT_RTX:  # what it does not support at all it does not load
        fits["none"] = here >= built_on
    if not fits[entry["hardware_compatible"]]:
        return (
            f"it was built for {entry['gpu']} ({_capability(built_on)}), and this is {gpu.name} ({_capability(here)})"
        )
    return None


def title(entry: EngineEntry) -> str:
    """What built a plan, with its version."""
    return f"{_TITLES[plan_engine(entry)]} {entry['tensorrt']}"


def is_verified(entry: EngineEntry, gpu: Gpu | None = None) -> bool:
    """Whether an engine was compared with PyTorch on a GPU like this one, or on any: that of TensorRT before it was
    kept, that of TensorRT for RTX on each kind of GPU, which makes its kernels.
    """
    if plan_engine(entry) == TENSORRT:
        return True
    return bool(entry["parity"]) if gpu is None else gpu.name in entry["parity"]


def reason_against_plans(bundle: Bundle, version: str, gpu: Gpu, engine: str = TENSORRT) -> str:
    """Why `find_plan` finds none: the bundle has none, or what keeps each one from running here."""
    entries = [entry for entry in bundle.manifest["engines"] if plan_engine(entry) == engine]
    if not entries:
        return f"the bundle {bundle.path} has no {_TITLES[engine]} engine"
    reasons = [
        f"{entry['file']}: {reason_against_plan(entry, version, gpu) or 'no profile holds these sizes'}"
        for entry in entries
    ]
    return f"the bundle {bundle.path} has no {_TITLES[engine]} engine that fits: {'; '.join(reasons)}"


def _holds(entry: EngineEntry, sizes: Mapping[str, int]) -> bool:
    return any(
        all(name not in profile or profile[name][0] <= size <= profile[name][2] for name, size in sizes.items())
        for profile in entry["profiles"]
    )


def _is_later(version: str, built: str) -> bool:
    """Whether a version can run what another of the same major built for later versions."""
    here, there = ([int(part) for part in text.split(".") if part.isdecimal()] for text in (version, built))
    return here[:1] == there[:1] and here >= there


def _capability(numbers: tuple[int, ...]) -> str:
    return "compute capability " + ".".join(map(str, numbers))


def graph_for(bundle: Bundle, precision: str) -> str:
    """The graph of the bundle, by its file, from which an engine of this precision is built.

    Raises:
        ConfigError: there is none.
    """
    manifest, own = bundle.manifest, bundle.precision
    graph = manifest["graph"]["file"]
    hint = f"export with --engine trt --precision {precision}"
    if own in QUANTIZED:
        if (manifest["quantization"] or {}).get("policy") == "dynamic":
            raise ConfigError(
                f"the bundle {bundle.path} has dynamic INT8, which TensorRT does not read",
                hint=f"{hint} --calib-data DIR",
            )
        if bundle.baseline is None:
            raise ConfigError(
                f"the bundle {bundle.path} has no FP16 graph to compare {own} with", hint=f"{hint} --no-build"
            )
        if precision == "fp16":
            return bundle.baseline
    elif own == "fp32" and manifest["typing"] == "weak" and precision not in QUANTIZED:
        return graph
    if precision != own:
        raise ConfigError(
            f"the {manifest['typing']}ly typed {own} graph of {bundle.path} cannot be built in {precision}", hint=hint
        )
    return graph
