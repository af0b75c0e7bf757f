"""A bundle with a TensorRT plan in it: its record is right, its content only a few bytes that nobody reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.manifest import EngineEntry, Precision, file_entry
from mae_deploy.runtime.tensorrt.add_plan import add_plan
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from tests.runtime.tiny_bundle import write_bundle

PLAN = b"not a plan, but a file that is copied\x00"
PLAN_FILE = "engines/10.3.0-orin-fp16.plan"


def planned(path: Path, *, entry: Mapping[str, Any] | None = None, **settings: Any) -> Bundle:
    """A tiny bundle with one plan; its profile is the manifest's.

    Args:
        entry: what is otherwise in the plan's record.
    """
    write_bundle(path, **settings)
    file = path / (entry or {}).get("file", PLAN_FILE)
    file.parent.mkdir()
    file.write_bytes(PLAN)
    manifest = json.loads((path / "manifest.json").read_text())
    record = {
        "file": PLAN_FILE,
        "tensorrt": "10.3.0",
        "gpu": "Orin",
        "compute_capability": [8, 7],
        "precision": "fp16",
        "profiles": [manifest["profile"]],
        "hardware_compatible": "none",
        "version_compatible": False,
        "stripped": False,
        "created": "2026-01-02T03:04:05+00:00",
        "build": {
            "size": len(PLAN),
            "seconds": 1.0,
            "kernels": {"layers": 3, "fused_attention": 2, "precisions": {"fp16": 3}},
            "warnings": [],
        },
        "parity": {"checks": 7, "sizes": ["B 1", "B 8"]},
        "latency_ms": 0.5,
        "layers": None,
        **(entry or {}),
    }
    manifest["engines"] = [record]
    manifest["files"][record["file"]] = file_entry(file)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.load(path)


def plan_of(bundle: Bundle) -> EngineEntry:
    """Its only plan."""
    (entry,) = bundle.manifest["engines"]
    return entry


def gpu(name: str = "Orin", capability: tuple[int, int] = (8, 7)) -> Gpu:
    return Gpu(index=0, name=name, compute_capability=capability, memory_bytes=1 << 33, driver="12.6")


RTX_FILE = "engines/1.7.1.116-rtx-fp16.plan"

RTX: dict[str, Any] = {
    "file": RTX_FILE,
    "tensorrt": "1.7.1.116",
    "gpu": "RTX",
    "compute_capability": [8, 0],
    "parity": {},
    "latency_ms": None,
}
"""The record of a plan of TensorRT for RTX that no GPU has run."""

RTX4090 = Gpu(index=0, name="NVIDIA GeForce RTX 4090", compute_capability=(8, 9), memory_bytes=1 << 34, driver="13.0")
ORIN, H200, T4 = gpu(), gpu("NVIDIA H200", (9, 0)), gpu("Tesla T4", (7, 5))
PROFILES = [{"B": (1, 8, 32), "K": (1, 4, 21)}]


def add(
    bundle: Bundle,
    content: bytes = b"plan",
    *,
    layers: str | None = '{"Layers": []}',
    precision: Precision = "fp16",
    version: str = "10.3.0",
    on: Gpu = ORIN,
    profiles: Any = PROFILES,
    **options: Any,
) -> EngineEntry:
    """Add a plan of this content, built with these options."""
    file = bundle.path.with_name(f"{version}-{precision}.plan")
    file.write_bytes(content)
    settings = {"hardware_compatible": "none", "version_compatible": False, "strip": False, **options}
    built = BuiltPlan(file=file, layers=layers, record={"options": settings, "seconds": 3.0})
    return add_plan(
        bundle,
        built,
        version=version,
        gpu=on,
        precision=precision,
        profiles=profiles,
        build=built.record,
        parity={"checks": 7},
        latency_ms=1.5,
    )
