"""Which TensorRT engine of a bundle fits a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_deploy.errors import CheckFailed
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.manifest import Precision
from mae_deploy.runtime.tensorrt.plans import find_plan, reason_against_plan, reason_against_plans
from tests.runtime.tensorrt.planned_bundle import H200, ORIN, PLAN_FILE, RTX, RTX4090, T4, add, gpu, planned
from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture
def bundle(visible_bundle: Path) -> Bundle:
    return Bundle.load(visible_bundle)


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
    entry = add(bundle, version_compatible=True)
    assert (reason_against_plan(entry, version, ORIN) is None) == fits


@pytest.mark.parametrize(
    ("level", "fitting"),
    [("none", ["Orin"]), ("same", ["Orin", "Orin NX"]), ("ampere", ["Orin", "Orin NX", "NVIDIA H200"])],
)
def test_other_gpus(bundle: Bundle, level: str, fitting: list[str]) -> None:
    entry = add(bundle, hardware_compatible=level)
    assert [
        on.name for on in (ORIN, gpu("Orin NX"), H200, T4) if reason_against_plan(entry, "10.3.0", on) is None
    ] == fitting


def test_the_version_at_hand_goes_before_a_compatible_one(bundle: Bundle) -> None:
    add(bundle, version_compatible=True, version="10.3.0")
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


def test_an_engine_of_tensorrt_for_rtx_runs_from_a_compute_capability_on(tmp_path: Path) -> None:
    found = planned(tmp_path / "b", entry={**RTX, "compute_capability": [8, 9]})
    (entry,) = found.manifest["engines"]
    assert reason_against_plan(entry, "1.7.1.116", RTX4090) is None
    assert reason_against_plan(entry, "1.7.1.116", gpu("RTX 5090", (12, 0))) is None
    assert reason_against_plan(entry, "1.7.1.116", gpu("RTX 3090", (8, 6))) == (
        "it was built for RTX (compute capability 8.9), and this is RTX 3090 (compute capability 8.6)"
    )
    assert reason_against_plan(entry, "10.3.0", RTX4090) == (
        "it was built by TensorRT for RTX 1.7.1.116, and 10.3.0 is installed"
    )
    assert reason_against_plans(found, "10.3.0", RTX4090) == f"the bundle {found.path} has no TensorRT engine"
