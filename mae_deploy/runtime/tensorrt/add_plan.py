"""A TensorRT engine goes into a bundle: its files, its entry in the manifest, one process at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from mae_deploy.errors import MaeDeployError
from mae_deploy.files import atomic_path, locked, read_json, write_json
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.check_manifest import validate_manifest
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.manifest import MANIFEST_FILE, EngineEntry, Manifest, Precision, file_entry
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from mae_deploy.runtime.tensorrt.timing_cache import slug

FOLDER = "engines"


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
    with _changed(bundle) as manifest:
        _remove(manifest, name, report)
        write_json(bundle.path / MANIFEST_FILE, manifest)
        with atomic_path(bundle.path / name) as aside:
            shutil.copyfile(plan.file, aside)
        manifest["files"][name] = file_entry(bundle.path / name)
        if plan.layers is not None:
            with atomic_path(bundle.path / report) as aside:
                aside.write_text(plan.layers, encoding="utf-8")
            manifest["files"][report] = file_entry(bundle.path / report)
        manifest["engines"].append(entry)
    return entry


def record_parity(bundle: Bundle, file: str, gpu: Gpu, parity: Mapping[str, Any]) -> None:
    """Put into the manifest what an engine of TensorRT for RTX passed on a GPU.

    Raises:
        MaeDeployError: the bundle cannot be written.
    """
    with _changed(bundle) as manifest:
        for entry in manifest["engines"]:
            if entry["file"] == file:
                entry["parity"][gpu.name] = {**parity, "driver": gpu.driver}


@contextmanager
def _changed(bundle: Bundle) -> Iterator[Manifest]:
    """The manifest as it is on the disk now, to be changed and written back while no other process does so."""
    try:
        with locked(bundle.path / FOLDER / ".lock"):
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
