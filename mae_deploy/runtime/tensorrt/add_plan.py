"""A TensorRT engine goes into a bundle: its files, its entry in the manifest, one process at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from mae_deploy.errors import MaeDeployError
from mae_deploy.files import atomic_path, locked, read_json, remove, write_json, write_text
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.check_manifest import validate_manifest
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.manifest import MANIFEST_FILE, EngineEntry, Manifest, Precision, file_entry
from mae_deploy.runtime.profiles import Profile
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from mae_deploy.runtime.tensorrt.timing_cache import slug

FOLDER = "engines"


def plan_names(version: str, gpu: Gpu, precision: str) -> tuple[str, str]:
    """The two files that an engine inside a bundle may be: one that replaces another takes the other name."""
    stem = f"{FOLDER}/{version}-{slug(gpu.name)}-{precision}"
    return f"{stem}.plan", f"{stem}-2.plan"


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
    """Put an engine into a bundle, in place of one of this version, GPU and precision; at every moment, each engine
    that the manifest lists is whole, the one before until the new one is there.

    Raises:
        MaeDeployError: the bundle cannot be written.
    """
    options = plan.record["options"]
    names = plan_names(version, gpu, precision)
    with _changed(bundle, names) as manifest:
        name = next((name for name in names if {name, _report(name)}.isdisjoint(manifest["files"])), names[-1])
        report = _report(name)
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
        with atomic_path(bundle.path / name) as aside:
            shutil.copyfile(plan.file, aside)
        if plan.layers is not None:
            write_text(bundle.path / report, plan.layers)
        written = [name] if plan.layers is None else [name, report]
        before = {*names, *map(_report, names)}
        manifest["engines"] = [other for other in manifest["engines"] if other["file"] not in before] + [entry]
        manifest["files"] = {file: known for file, known in manifest["files"].items() if file not in before}
        manifest["files"] |= {file: file_entry(bundle.path / file) for file in written}
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
def _changed(bundle: Bundle, plans: Sequence[str] = ()) -> Iterator[Manifest]:
    """The manifest as it is on the disk now, to be changed and written back while no other process does so; then those
    of these plans that it does not list go.
    """
    try:
        with locked(bundle.path / FOLDER / ".lock"):
            manifest = validate_manifest(read_json(bundle.path / MANIFEST_FILE))
            try:
                yield manifest
                write_json(bundle.path / MANIFEST_FILE, validate_manifest(manifest))
            finally:  # an interrupt may have come before the new manifest, or after it
                listed = read_json(bundle.path / MANIFEST_FILE)["files"]
                for name in {*plans, *map(_report, plans)} - listed.keys():
                    remove(bundle.path / name)
    except OSError as error:
        raise MaeDeployError(
            f"cannot write to the bundle {bundle.path}: {error.strerror or error}",
            hint="copy it to where you may write",
        ) from error
    bundle.reload()


def _report(plan: str) -> str:
    """The file of what its layers are."""
    return plan.removesuffix(".plan") + ".layers.json"
