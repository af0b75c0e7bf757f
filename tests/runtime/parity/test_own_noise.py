"""The noise at export: what is recorded, and where it is believed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mae_deploy.machine import cpu_features, cpu_name
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.parity.compare import Comparison
from mae_deploy.runtime.parity.own_noise import noise_record, own_noise, reason_against_own_noise
from tests.runtime.tiny_bundle import write_bundle

ENGINE: Any = SimpleNamespace(name="openvino", version="2026.4", device="cpu")
HERE = {"engine": "openvino", "engine_version": "2026.4", "device": "cpu"}
MACHINE = [cpu_name(), *(cpu_features() or ())]
CLS = {"cls": Comparison(name="cls", sqnr_db=71.5, channel_sqnr_db=62.0)}


def bundle_with(path: Path, figures: dict[str, Any]) -> Bundle:
    write_bundle(path, precision="fp16", change=lambda manifest: manifest["parity"].update({"onnx-fp16": figures}))
    return Bundle(path, json.loads((path / "manifest.json").read_text()))


def test_what_is_recorded() -> None:
    exact = Comparison(name="logits", sqnr_db=math.inf, channel_sqnr_db=math.inf)
    noise = {"machine": MACHINE, "golden_db": {"cls": 71.5}, "channels_db": {"cls": 62.0}}
    assert noise_record({**CLS, "logits": exact}, None) == noise
    assert noise_record(CLS, [60.0, math.inf]) == {**noise, "blocks_db": [60.0, None]}


@pytest.mark.parametrize("blocks", [None, [60.0, math.inf]])
def test_it_is_believed_where_it_was_measured(tmp_path: Path, blocks: list[float] | None) -> None:
    bundle = bundle_with(tmp_path / "b", {**HERE, **noise_record(CLS, blocks)})
    assert reason_against_own_noise(bundle, ENGINE) is None
    expected: dict[str, Any] = {"golden_db": {"cls": 71.5}, "channels_db": {"cls": 62.0}}
    assert own_noise(bundle, ENGINE) == (expected if blocks is None else {**expected, "blocks_db": [60.0, None]})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"golden_db": None}, "the export did not measure it"),
        ({"emulated": "bf16"}, "the export did not measure it"),
        ({"engine": "onnxruntime"}, "the export measured it on onnxruntime 2026.4"),
        ({"engine_version": "2026.5"}, "the export measured it on openvino 2026.5"),
        ({"device": "gpu"}, "the export measured it on openvino 2026.4"),
        ({"machine": ["Another", *MACHINE[1:]]}, "the export measured it on another CPU, Another"),
        ({"machine": [*MACHINE, "more"]}, f"the export measured it on another CPU, {MACHINE[0]}"),
    ],
)
def test_elsewhere_it_says_nothing(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    figures = {**HERE, **noise_record(CLS, None), **changes}
    bundle = bundle_with(tmp_path / "b", {name: value for name, value in figures.items() if value is not None})
    assert reason_against_own_noise(bundle, ENGINE) == reason
    assert own_noise(bundle, ENGINE) == {}


def test_a_bundle_that_has_no_figures(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", change=lambda manifest: manifest["parity"].clear())
    bundle = Bundle(tmp_path / "b", json.loads((tmp_path / "b" / "manifest.json").read_text()))
    assert reason_against_own_noise(bundle, ENGINE) == "the export did not measure it"
