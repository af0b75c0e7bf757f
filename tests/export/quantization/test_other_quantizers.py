"""The quantisers of ONNX Runtime, NNCF and ModelOpt on our graph: their ranges beside ours, what is recorded, what is
refused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.export.config import ExportConfig
from mae_deploy.export.int8_config import Int8Config
from mae_deploy.export.job import compute_reference, prepare
from mae_deploy.export.quantization.other_quantizers import input_scales, quantize_elsewhere
from mae_deploy.export.quantization.plan import plan_int8
from mae_deploy.models.quantization.rounding import eligible_linears
from tests.export.robust_exports import Exports

INT8 = ("--precision", "int8", "--max-latency", 1000)


def scales_of(robust: Path, quantizer: Any, out: Path) -> dict[str, float | None]:
    """Of the inputs of all Linears, by the largest magnitudes on the calibration images."""
    pytest.importorskip(quantizer)
    int8 = Int8Config(
        quantizer=quantizer,
        quantization="static",
        calib_method="minmax",
        calib_data=robust / "calibration",
        smooth_quant=quantizer != "nncf",  # which alone has it
    )
    config = ExportConfig(
        checkpoint=robust / "classifier", out=out, precision="int8", int8=int8, samples=robust / "photos", threads=1
    )
    job = prepare(config)
    names = eligible_linears(job.reference.model)
    return input_scales(quantize_elsewhere(job, names), names)


@pytest.fixture(scope="module")
def ours(robust: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | None]:
    """The same by our own calibration, without SmoothQuant."""
    int8 = Int8Config(
        quantization="static",
        calib_method="minmax",
        calib_data=robust / "calibration",
        smooth_quant=False,
        min_sqnr=1,
        min_cosine=0.1,
        max_latency=1000,
    )
    folder = tmp_path_factory.mktemp("ours")
    config = ExportConfig(
        checkpoint=robust / "classifier",
        out=folder / "b",
        precision="int8",
        int8=int8,
        samples=robust / "photos",
        threads=1,
    )
    job = prepare(config)
    compute_reference(job)
    verification: Any = type("Passed", (), {"failures": [], "checks": ()})()
    return plan_int8(job, folder, lambda *_: verification).quantized


@pytest.mark.parametrize("quantizer", ["onnxruntime", "nncf", "modelopt"])
def test_the_largest_magnitudes_are_the_same(
    robust: Path, tmp_path: Path, ours: dict[str, float | None], quantizer: str
) -> None:
    """All divide the largest magnitude by 127: FP32 sums of another order are left."""
    found = scales_of(robust, quantizer, tmp_path / "b")
    assert found == {name: pytest.approx(scale, rel=1e-5) for name, scale in ours.items()}


def test_what_onnxruntime_makes_is_judged_and_recorded(exports: Exports, robust: Path) -> None:
    exports.checkpoint = robust / "classifier"
    dynamic = exports.passed(*INT8, "--quantizer", "onnxruntime")["quantization"]
    assert (dynamic["quantizer"], dynamic["policy"], set(dynamic["quantized"].values())) == (
        "onnxruntime",
        "dynamic",
        {None},
    )
    assert "calibration" not in dynamic
    assert "by onnxruntime)" in dynamic["text"]
    assert exports.manifest["certificate"]["passed"]
    assert exports.verified("--layers")["failures"] == []


@pytest.mark.parametrize("tokens", ["visible", "ragged:7"])
def test_static_ranges_in_other_token_modes(exports: Exports, robust: Path, tokens: str) -> None:
    given = ("--calib-data", robust / "calibration", "--quantization", "static", "--batch", 3, "--min-cosine", 0.95)
    result = exports.passed(*INT8, "--quantizer", "onnxruntime", "--tokens", tokens, *given)
    record = result["quantization"]
    assert (record["calibration"]["method"], record["calibration"]["num_images"]) == ("minmax", 128)
    assert all(scale > 0 for scale in record["quantized"].values())
    assert np.isfinite(result["parity"][0]["sqnr_db"])


@pytest.mark.parametrize("quantizer", ["nncf", "modelopt"])
def test_what_they_make_is_judged_and_recorded(exports: Exports, robust: Path, quantizer: str) -> None:
    """NNCF's on OpenVINO, where its scales of SmoothQuant, (1, D), gave 13 dB on a CPU without VNNI."""
    pytest.importorskip(quantizer)
    exports.checkpoint = robust / "classifier"
    arguments: tuple[object, ...] = ("--quantizer", quantizer, "--calib-data", robust / "calibration")
    if quantizer == "nncf":
        pytest.importorskip("openvino")
        arguments += ("--engine", "openvino")
    record = exports.passed(*INT8, *arguments)["quantization"]
    assert (record["quantizer"], record["policy"], record["linears"], len(record["quantized"])) == (
        quantizer,
        "static",
        8,
        8,
    )
    assert exports.verified()["failures"] == []


def test_the_hint_of_seven_bits_is_for_who_has_them() -> None:
    assert [Int8Config(quantizer=name).has_weight_bits for name in ("own", "onnxruntime", "nncf", "modelopt")] == [
        *(True, True),
        *(False, False),
    ]


def test_it_is_refused_like_ours(exports: Exports) -> None:
    code, said = exports(*INT8, "--quantizer", "onnxruntime", "--min-sqnr", 90)
    assert code == 1
    assert said.startswith("error: INT8 by onnxruntime is rejected: all 8 Linears in INT8 by onnxruntime: ")
    assert "sqnr_db" in said
    assert exports.left == set()


@pytest.mark.parametrize("module", ["nncf", "modelopt.onnx.quantization"])
def test_without_the_package(exports: Exports, robust: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    quantizer = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, module, None)
    code, said = exports(*INT8, "--quantizer", quantizer, "--calib-data", robust / "calibration")
    assert code == 3
    assert f"mae-deploy[{quantizer}]" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quantizer", "onnxruntime", "--bias-correction"), "--bias-correction with --quantizer onnxruntime"),
        (("--quantizer", "onnxruntime", "--no-smooth-quant"), "--no-smooth-quant with --quantizer onnxruntime"),
        (("--quantizer", "nncf", "--quantization", "dynamic"), "--quantization dynamic with --quantizer nncf"),
        (("--quantizer", "nncf", "--weight-bits", "7"), "--weight-bits 7 with --quantizer nncf"),
        (("--quantizer", "nncf", "--calib-method", "entropy"), "--calib-method entropy with --quantizer nncf"),
        (("--quantizer", "onnxruntime", "--tokens", "cached"), "--quantizer onnxruntime with --tokens cached"),
        (("--quantizer", "nncf", "--engine", "trt", "--no-build"), "--quantizer nncf with --engine trt"),
        (("--quantizer", "modelopt", "--calib-method", "percentile"), "--calib-method percentile with --quantizer mod"),
        (("--quantizer", "modelopt", "--smooth-alpha", "0.6"), "--smooth-alpha 0.6 with --quantizer modelopt"),
        (("--quantizer", "modelopt", "--weight-bits", "7"), "--weight-bits 7 with --quantizer modelopt"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_others_have_not_got(exports: Exports, robust: Path, arguments: tuple[str, ...], said: str) -> None:
    code, message = exports(*INT8, *arguments, "--calib-data", robust / "calibration")
    assert code == 2
    assert said in message
