"""Inspector reports in the forms that TensorRT 8.6, 10 and 11 give them, and what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mae_deploy.runtime.tensorrt.layer_report import summarise


def tensor(name: str, **said: Any) -> dict[str, Any]:
    return {"Name": name, "Dimensions": [1, 197, 768], **said}


def test_the_form_of_8_6() -> None:
    half, full = {"Format/Datatype": "Row major linear FP16 format"}, {"Format/Datatype": "Row major linear FP32"}
    layers = [
        {
            "Name": "Reformat",
            "LayerType": "Reformat",
            "Inputs": [tensor("images", **full)],
            "Outputs": [tensor("x", **half)],
            "TacticName": "",
        },
        {
            "Name": "mha",
            "LayerType": "Myelin",
            "Inputs": [tensor("q", **half)],
            "Outputs": [tensor("o", **half)],
            "TacticName": "_gemm_mha_v2_0xb7",
        },
        {
            "Name": "norm",
            "LayerType": "Normalization",
            "Inputs": [tensor("o", **full)],
            "Outputs": [tensor("y", **full)],
        },
    ]
    found = summarise(json.dumps({"Layers": layers, "Bindings": ["images", "y"]}))
    assert found == {"layers": 3, "fused_attention": 1, "precisions": {"fp16": 2, "fp32": 1}}


def test_the_form_of_10_and_11() -> None:
    layers = [
        {
            "Name": "blocks.0/qkv",
            "Inputs": [tensor("a", Format="Row major linear", Datatype="Int8")],
            "Outputs": [tensor("b", Datatype="Half")],
        },
        {"Name": "gemm", "Inputs": [tensor("a", Datatype="FP8E4M3")], "Outputs": [tensor("b", Datatype="BFloat16")]},
        {
            "Name": "blocks.0/add",
            "Inputs": [tensor("b", Datatype="BFloat16")],
            "Outputs": [tensor("c", Datatype="Float")],
        },
        {"Name": "__myl_fmha_1", "Inputs": [], "Outputs": None, "TacticName": "cutlass_fmha_f16"},
    ]
    found = summarise(json.dumps({"Layers": layers, "I/O Tensors": []}))
    assert found == {"layers": 4, "fused_attention": 1, "precisions": {"int8": 1, "fp8": 1, "bf16": 1}}


def test_names_alone() -> None:
    assert summarise(json.dumps({"Layers": ["qkv", "_gemm_mha_v2", "alphamhax"]})) == {
        "layers": 3,
        "fused_attention": 1,
        "precisions": {},
    }


@pytest.mark.parametrize("report", ["", "no JSON", "[]", "3", "{}", '{"Layers": null}', '{"Layers": {"a": 1}}'])
def test_what_is_no_report(report: str) -> None:
    assert summarise(report) == {"layers": 0, "fused_attention": 0, "precisions": {}}
