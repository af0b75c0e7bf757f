"""The TensorRT engines of a bundle: which of them fits this machine, why none does, and how another is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from mae_deploy.errors import ConfigError, MaeDeployError
from mae_deploy.files import atomic_path, locked, read_json, write_json
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.check_manifest import validate_manifest
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.manifest import MANIFEST_FILE, QUANTIZED, EngineEntry, Manifest, Precision, file_entry
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from mae_deploy.runtime.tensorrt.timing_cache import slug

FOLDER = "engines"

PREFERENCE: tuple[Precision, ...] = ("int8", "fp8", "fp16", "bf16", "fp32")
"""The fastest first: INT8 and FP8 are in a bundle only where they were measured to be faster than FP16."""


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
        return f"it was built by TensorRT {entry['tensorrt']}, and {version} is installed"
    built_on, here = tuple(entry["compute_capability"]), gpu.compute_capability
    fits = {
        "none": (entry["gpu"], built_on) == (gpu.name, here),
        "same": built_on == here,
        "ampere": min(built_on, here) >= (8, 0),
    }
    if not fits[entry["hardware_compatible"]]:
        return (
            f"it was built for {entry['gpu']} ({_capability(built_on)}), and this is {gpu.name} ({_capability(here)})"
        )
    return None


def reason_against_plans(bundle: Bundle, version: str, gpu: Gpu) -> str:
    """Why `find_plan` finds none: the bundle has none, or what keeps each one from running here."""
    entries = bundle.manifest["engines"]
    if not entries:
        return f"the bundle {bundle.path} has no TensorRT engine"
    reasons = [
        f"{entry['file']}: {reason_against_plan(entry, version, gpu) or 'no profile holds these sizes'}"
        for entry in entries
    ]
    return f"the bundle {bundle.path} has no TensorRT engine that fits: {'; '.join(reasons)}"


def plan_name(version: str, gpu: Gpu, precision: str) -> str:
    """The file of an engine inside a bundle."""
    return f"{FOLDER}/{version}-{slug(gpu.name)}-{precision}.plan"


def add_plan(
    bundle: Bundle,
    plan: BuiltPlan,
    *,
    version: str,
    gpu: Gpu,
    precision: Precision,
    profiles: Sequence[Profile],
    build: Mapping[str, Any],
    parity: Mapping[str, Any],
    latency_ms: float | None,
) -> EngineEntry:
    """Put an engine into a bundle, in place of one of the same name; at every moment, each engine that the manifest
    lists is whole.

    Raises:
        MaeDeployError: the bundle cannot be written.
    """
    options = plan.record["options"]
    name = plan_name(version, gpu, precision)
    report = name.removesuffix(".plan") + ".layers.json"
    entry: EngineEntry = {
        "file": name,
        "tensorrt": version,
        "gpu": gpu.name,
        "compute_capability": list(gpu.compute_capability),
        "precision": precision,
        "profiles": [{size: list(numbers) for size, numbers in profile.items()} for profile in profiles],
        "hardware_compatible": options["hardware_compatible"],
        "version_compatible": options["version_compatible"],
        "stripped": options["strip"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "build": dict(build),
        "parity": dict(parity),
        "latency_ms": latency_ms,
        "layers": None if plan.layers is None else report,
    }
    files = {name: plan.content, **({report: plan.layers.encode()} if plan.layers is not None else {})}
    with _changed(bundle) as manifest:
        _remove(manifest, name, report)
        write_json(bundle.path / MANIFEST_FILE, manifest)
        for file, content in files.items():
            with atomic_path(bundle.path / file) as aside:
                aside.write_bytes(content)
            manifest["files"][file] = file_entry(bundle.path / file)
        manifest["engines"].append(entry)
    return entry


@contextmanager
def _changed(bundle: Bundle) -> Iterator[Manifest]:
    """The manifest as it is on the disk now, to be changed and written back while no other process does so."""
    try:
        with locked(bundle.path):
            manifest = validate_manifest(read_json(bundle.path / MANIFEST_FILE))
            yield manifest
            write_json(bundle.path / MANIFEST_FILE, validate_manifest(manifest))
    except OSError as error:
        raise MaeDeployError(
            f"cannot write to the bundle {bundle.path}: {error.strerror or error}",
            hint="copy it to where you may write",
        ) from error
    bundle.reload()


def _remove(manifest: Manifest, *files: str) -> None:
    manifest["engines"] = [entry for entry in manifest["engines"] if entry["file"] not in files]
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if name not in files}


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
