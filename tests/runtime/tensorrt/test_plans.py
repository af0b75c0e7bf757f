"""Which TensorRT engine of a bundle fits a machine, and that a bundle is whole at every moment while another is
added.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mae_deploy.errors import CheckFailed, MaeDeployError
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.manifest import EngineEntry, Precision
from mae_deploy.runtime.tensorrt import plans
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from mae_deploy.runtime.tensorrt.plans import add_plan, find_plan, plan_name, reason_against_plan, reason_against_plans
from tests.runtime.tensorrt.planned_bundle import PLAN_FILE, planned
from tests.runtime.tiny_bundle import write_bundle


def gpu(name: str = "Orin", capability: tuple[int, int] = (8, 7)) -> Gpu:
    return Gpu(index=0, name=name, compute_capability=capability, memory_bytes=1 << 33, driver="12.6")


ORIN, H200, T4 = gpu(), gpu("NVIDIA H200", (9, 0)), gpu("Tesla T4", (7, 5))
PROFILES = [{"B": (1, 8, 32), "K": (1, 4, 21)}]


def plan(content: bytes = b"plan", layers: str | None = '{"Layers": []}', **options: Any) -> BuiltPlan:
    settings = {"hardware_compatible": "none", "version_compatible": False, "strip": False, **options}
    return BuiltPlan(content=content, layers=layers, record={"options": settings, "seconds": 3.0})


def add(
    bundle: Bundle,
    built: BuiltPlan | None = None,
    *,
    precision: Precision = "fp16",
    version: str = "10.3.0",
    on: Gpu = ORIN,
    profiles: Any = PROFILES,
) -> EngineEntry:
    built = built or plan()
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


@pytest.fixture
def bundle(visible_bundle: Path) -> Bundle:
    return Bundle.load(visible_bundle)


# --- adding ----------------------------------------------------------------------------------------------------------


def test_what_was_added_is_there_with_its_hash(bundle: Bundle) -> None:
    entry = add(bundle, plan(b"a plan"))
    name = "engines/10.3.0-orin-fp16.plan"
    assert entry["file"] == plan_name("10.3.0", ORIN, "fp16") == name
    fresh = Bundle.load(bundle.path)
    assert fresh.manifest == bundle.manifest
    assert fresh.manifest["engines"] == [entry]
    assert (entry["profiles"], entry["compute_capability"], entry["latency_ms"]) == (
        [{"B": [1, 8, 32], "K": [1, 4, 21]}],
        [8, 7],
        1.5,
    )
    assert fresh.file(name).read_bytes() == b"a plan"
    assert entry["layers"] is not None
    assert json.loads(fresh.file(entry["layers"]).read_text()) == {"Layers": []}
    fresh.check_files()


def test_an_engine_replaces_that_of_its_name_and_no_other(bundle: Bundle) -> None:
    add(bundle, plan(b"first"))
    add(bundle, plan(b"other"), precision="int8")
    add(bundle, plan(b"second", layers=None))
    assert [(entry["precision"], entry["layers"]) for entry in bundle.manifest["engines"]] == [
        ("int8", "engines/10.3.0-orin-int8.layers.json"),
        ("fp16", None),
    ]
    assert bundle.file(plan_name("10.3.0", ORIN, "fp16")).read_bytes() == b"second"
    assert "engines/10.3.0-orin-fp16.layers.json" not in bundle.manifest["files"]
    bundle.check_files()


def test_builds_at_the_same_time_lose_nothing(bundle: Bundle) -> None:
    versions = [f"10.{minor}.0" for minor in range(6)]
    others = [Bundle.load(bundle.path) for _ in versions]
    threads = [
        threading.Thread(target=add, args=(other,), kwargs={"version": version})
        for other, version in zip(others, versions, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = Bundle.load(bundle.path)
    assert sorted(entry["tensorrt"] for entry in fresh.manifest["engines"]) == versions
    fresh.check_files()


def test_cut_off_while_an_engine_is_replaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add(bundle, plan(b"first"))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "file_entry", stop)
    with pytest.raises(KeyboardInterrupt):
        add(bundle, plan(b"second"))
    fresh = Bundle.load(bundle.path)
    assert fresh.manifest["engines"] == [], "no engine is listed with another's hash"
    fresh.check_files()


def test_a_bundle_that_cannot_be_written(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plans, "write_json", read_only)
    with pytest.raises(MaeDeployError, match=r"cannot write to the bundle .*: Permission denied"):
        add(bundle)
    assert Bundle.load(bundle.path).manifest["engines"] == []


# --- finding ---------------------------------------------------------------------------------------------------------


def test_the_fastest_precision_that_fits(bundle: Bundle) -> None:
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8", "bf16")
    for precision in precisions:
        add(bundle, precision=precision)
    add(bundle, precision="fp8", on=H200)

    def found(version: str, on: Gpu) -> str | None:
        entry = find_plan(bundle, version, on)
        return None if entry is None else entry["precision"]

    assert found("10.3.0", ORIN) == "int8"
    assert found("10.3.0", H200) == "fp8"
    assert found("10.3.1", ORIN) is None
    assert found("10.3.0", gpu("Orin", (8, 9))) is None
    assert found("10.3.0", gpu("Orin NX")) is None


def test_the_sizes_that_a_profile_holds(bundle: Bundle) -> None:
    add(bundle, precision="int8", profiles=[{"B": (1, 1, 1), "K": (4, 4, 4)}, {"B": (8, 8, 8), "K": (1, 1, 9)}])
    add(bundle, precision="fp16")
    for sizes, precision in [
        ({"B": 1, "K": 4}, "int8"),
        ({"B": 8, "K": 9}, "int8"),
        ({"B": 1, "K": 9}, "fp16"),
        ({"B": 2}, "fp16"),
        ({}, "int8"),
    ]:
        entry = find_plan(bundle, "10.3.0", ORIN, sizes)
        assert entry is not None
        assert entry["precision"] == precision, sizes
    assert find_plan(bundle, "10.3.0", ORIN, {"B": 33}) is None


@pytest.mark.parametrize(
    ("version", "fits"),
    [("10.3.0", True), ("10.3.1", True), ("10.16.1.11", True), ("10.2.9", False), ("11.4.0", False), ("8.6.0", False)],
)
def test_later_versions_of_the_same_major(bundle: Bundle, version: str, fits: bool) -> None:
    entry = add(bundle, plan(version_compatible=True))
    assert (reason_against_plan(entry, version, ORIN) is None) == fits


@pytest.mark.parametrize(
    ("level", "fitting"),
    [("none", ["Orin"]), ("same", ["Orin", "Orin NX"]), ("ampere", ["Orin", "Orin NX", "NVIDIA H200"])],
)
def test_other_gpus(bundle: Bundle, level: str, fitting: list[str]) -> None:
    entry = add(bundle, plan(hardware_compatible=level))
    assert [
        on.name for on in (ORIN, gpu("Orin NX"), H200, T4) if reason_against_plan(entry, "10.3.0", on) is None
    ] == fitting


def test_the_version_at_hand_goes_before_a_compatible_one(bundle: Bundle) -> None:
    add(bundle, plan(version_compatible=True), version="10.3.0")
    add(bundle, version="10.7.0")
    entry = find_plan(bundle, "10.7.0", ORIN)
    assert entry is not None
    assert entry["tensorrt"] == "10.7.0"


def test_why_none_fits(bundle: Bundle) -> None:
    assert reason_against_plans(bundle, "10.3.0", ORIN) == f"the bundle {bundle.path} has no TensorRT engine"
    add(bundle, version="8.6.2")
    add(bundle, on=H200)
    assert (
        reason_against_plans(bundle, "10.3.0", ORIN)
        == f"the bundle {bundle.path} has no TensorRT engine that fits: engines/8.6.2-orin-fp16.plan: it was built by"
        " TensorRT 8.6.2, and 10.3.0 is installed; engines/10.3.0-nvidia-h200-fp16.plan: it was built for NVIDIA"
        " H200 (compute capability 9.0), and this is Orin (compute capability 8.7)"
    )


# --- what may not be loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "changed", "foreign", "missing"])
def test_a_plan_that_is_not_what_was_built_is_refused_by_its_hash(tmp_path: Path, damage: str) -> None:
    bundle = planned(tmp_path / "b")
    path = bundle.path / PLAN_FILE
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[:-1], "changed": content[:-1] + b"\x01", "foreign": b"another"}[damage])
    with pytest.raises(CheckFailed, match="is missing" if damage == "missing" else "is not the file that was exported"):
        bundle.file(PLAN_FILE)


def test_a_plan_that_the_manifest_does_not_list(tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "b"))
    (bundle.path / "engines").mkdir()
    (bundle.path / PLAN_FILE).write_bytes(b"smuggled")
    with pytest.raises(CheckFailed, match="is not among the files"):
        bundle.file(PLAN_FILE)
