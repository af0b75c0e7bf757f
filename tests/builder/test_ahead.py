"""A bundle gets its engine of TensorRT for RTX on a machine without a GPU, as it is typed."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import pytest

from mae_deploy.cli import main
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.tensorrt.plans import is_verified
from tests.export.robust_exports import Exports, robust_mae, write_blots
from tests.export.tiny_exports import write_checkpoint
from tests.runtime.tiny_bundle import write_bundle

if util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("make tensorrt fetches TensorRT for RTX", allow_module_level=True)


@pytest.fixture
def exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Exports:
    write_checkpoint(tmp_path / "mae", robust_mae(), licence="own")
    write_blots(tmp_path / "photos", 11)
    return Exports(tmp_path / "mae", tmp_path / "photos", tmp_path / "place" / "bundle", capsys)


@pytest.mark.parametrize("tokens", ["visible:2", "cached"])
@pytest.mark.parametrize(("precision", "least"), [("fp32", [8, 0]), ("fp16", [8, 0]), ("bf16", [8, 0])])
def test_export(exports: Exports, precision: str, least: list[int], tokens: str) -> None:
    result = exports.passed("--engine", "trt-rtx", "--precision", precision, "--tokens", tokens)
    (entry,) = exports.manifest["engines"]
    assert entry["file"].startswith("engines/1.")
    assert entry["file"].endswith(f"-rtx-{precision}.plan")
    assert (entry["gpu"], entry["compute_capability"], is_verified(entry)) == ("RTX", least, False)
    assert entry["build"]["size"] > 1000
    assert exports.manifest["engine"] == "tensorrt-rtx"
    assert set(exports.manifest["parity"]) == {f"onnx-{precision}"}, "no device has said anything"
    assert "not verified" in result["built"]["text"]


def test_int8(exports: Exports, tmp_path: Path) -> None:
    images = write_blots(tmp_path / "calibration", 128)
    settings = ("--calib-data", images, "--no-search", "--min-cosine", 0.9, "--num-samples", 8)
    exports.passed("--engine", "trt-rtx", "--precision", "int8", *settings)
    (entry,) = exports.manifest["engines"]
    assert (entry["precision"], entry["compute_capability"], is_verified(entry)) == ("int8", [8, 0], False)
    assert exports.manifest["quantization"]["baseline"] == "baseline.onnx"


def test_build_engine_for_a_bundle_that_was_made_for_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_bundle(tmp_path / "bundle")
    arguments = ["build-engine", str(path), "--engine", "trt-rtx", "--profile", "B:1,1,1; B:2,4,8"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Bundle.load(path).manifest["engines"][0]["file"] == found["file"]
    assert [profile["B"] for profile in found["profiles"]] == [[1, 1, 1], [2, 4, 8]]
    assert (found["parity"], found["latency_ms"], found["layers"]) == ({}, None, None)
    assert main([*arguments, "--precision", "fp16"]) == 2
    assert "computes a weakly typed graph in FP32, not in fp16" in capsys.readouterr().err
