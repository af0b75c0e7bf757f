"""What `doctor` says of a machine's speed: figures of its engines, and a choice that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mae_deploy.commands import rates
from mae_deploy.commands.rates import advice, measure_rates, rates_of
from mae_deploy.runtime.alone import Died

VNNI, AMX = ["avx2", "avx512_vnni"], ["avx2", "amx_bf16", "amx_int8"]


@pytest.mark.parametrize(
    ("found", "features", "expected"),
    [
        (
            {"onnxruntime": {"fp32": 80, "int8": 120}, "openvino": {"fp32": 100, "int8": 310}},
            VNNI,
            "INT8 on OpenVINO: 3.1 times FP32; the engine for FP32 is OpenVINO; BF16 is emulated by this CPU: don't.",
        ),
        (
            {"onnxruntime": {"fp32": 80, "int8": 120}, "openvino": {"fp32": 60, "bf16": 240, "int8": 110}},
            AMX,
            "INT8 on ONNX Runtime: 1.5 times FP32; BF16 on OpenVINO: 3.0 times FP32;"
            " the engine for FP32 is ONNX Runtime.",
        ),
        (
            {"openvino": {"fp32": 100, "int8": 90}},
            ["avx2"],
            "INT8 on OpenVINO is not faster than FP32 (0.9 times); the engine for FP32 is OpenVINO;"
            " BF16 is emulated by this CPU: don't.",
        ),
        # The best INT8 is compared with the best FP32, which may be another engine's.
        (
            {"onnxruntime": {"fp32": 200, "int8": 100}, "openvino": {"fp32": 100, "int8": 210}},
            None,
            "INT8 on OpenVINO is not faster than FP32 (1.1 times); the engine for FP32 is ONNX Runtime.",
        ),
    ],
)
def test_the_choice(found: dict[str, dict[str, float]], features: list[str] | None, expected: str) -> None:
    assert advice(found, features) == [expected]


def test_nothing_measured_is_no_choice() -> None:
    assert advice({}, VNNI) == []


def test_bf16_is_measured_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def alone(function: Callable[..., Any], engine: str, precisions: tuple[str, ...], *, timeout: float) -> Any:
        assert function is rates_of
        asked.append((engine, precisions))
        if engine == "openvino" and "bf16" not in precisions:
            raise Died("of an instruction")
        return dict.fromkeys(precisions, 7.0)

    monkeypatch.setattr(rates, "run_alone", alone)
    both = ["onnxruntime", "openvino"]
    assert measure_rates(both, AMX) == {
        "onnxruntime": {"fp32": 7.0, "int8": 7.0},
        "openvino": {"fp32": 7.0, "bf16": 7.0, "int8": 7.0},
    }
    assert measure_rates(both, VNNI) == {"onnxruntime": {"fp32": 7.0, "int8": 7.0}}  # the other one died
    assert measure_rates(["tensorrt"], None) == {}
    assert asked[:2] == [("onnxruntime", ("fp32", "int8")), ("openvino", ("fp32", "bf16", "int8"))]


def test_a_rate_is_operations_over_the_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.5, 1.0, 1.25, 2.0, 2.75])
    monkeypatch.setattr(rates, "_SIZE", 100)
    monkeypatch.setattr(rates, "_SECONDS", 1.0)
    monkeypatch.setattr("mae_deploy.commands.rates.time.perf_counter", lambda: next(now))
    assert rates_of("onnxruntime", ["fp32"]) == {"fp32": pytest.approx(2 * 4 * 100**3 / 0.25 / 1e9)}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_precision_runs(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(engine)
    monkeypatch.setattr(rates, "_SIZE", 64)
    monkeypatch.setattr(rates, "_SECONDS", 0.001)
    found = rates_of(engine, rates.MEASURED[engine])
    assert list(found) == list(rates.MEASURED[engine])
    assert min(found.values()) > 0
