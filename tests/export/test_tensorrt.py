"""`export --engine trt` on a machine without a GPU: bundles that a device builds engines from, checked on ONNX Runtime;
tests/gpu has the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from mae_deploy.cli import main
from mae_deploy.errors import CheckFailed, MissingDependency
from mae_deploy.export import config as config_module
from mae_deploy.export import tensorrt
from mae_deploy.images.read import Array
from mae_deploy.runtime import Bundle
from mae_deploy.runtime.cuda.driver import Gpu
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from mae_deploy.runtime.tensorrt import api as tensorrt_api
from mae_deploy.runtime.tensorrt.add_engine import Built
from mae_deploy.runtime.tensorrt.add_plan import add_plan
from mae_deploy.runtime.tensorrt.build import BuiltPlan
from mae_deploy.runtime.tensorrt.options import BuildOptions
from tests.export.robust_exports import CONFIG, Exports, robust_mae
from tests.export.test_run_precisions import KEEP, MODES, runs_as_pytorch
from tests.export.tiny_exports import read_graph, write_checkpoint

TRT = ("--engine", "trt", "--no-build")

ARITHMETIC: dict[str, tuple[str, str, int]] = {
    "fp32": ("fp32", "strong", 17),
    "fp16": ("fp16", "strong", 17),
    "bf16": ("bf16", "strong", 17),
    "int8": ("int8", "strong", 19),
    "fp8": ("fp8", "strong", 19),
    "fp16 for 8.6": ("fp16", "weak", 17),
    "int8 for 8.6": ("int8", "weak", 17),
}
"""Precision, typing and opset."""

FLOORS = {"fp32": 100, "fp16": 45, "int8": 28, "fp8": 20}
"""dB for images that the export has not seen. Three bits of mantissa are 32 dB for each of both operands of each
product."""

FLOAT, FLOAT16, BFLOAT16, INT8, FP8 = (
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT8", "FLOAT8E4M3FN")
)


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typing does not depend on what is installed here."""
    monkeypatch.setattr(config_module, "tensorrt_major", lambda: None)


@pytest.fixture
def eight_bits(robust: Path) -> tuple[object, ...]:
    """All Linears, with 128 images; what little a model of two blocks says with one patch bears no noise."""
    return ("--calib-data", robust / "calibration", "--no-search", "--min-cosine", 0.9)


def types_of(path: Path) -> dict[str, int]:
    """The type of every value of a graph, by shape inference."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    found = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def read_in_blocks(path: Path, *operators: str) -> set[int]:
    """The types that these operators read in the blocks."""
    types = types_of(path)
    nodes = [
        node for node in read_graph(path).graph.node if node.op_type in operators and node.name.startswith("blocks.")
    ]
    assert nodes
    return {types[name] for node in nodes for name in node.input}


# --- every precision in every mode -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "visible") for name in ARITHMETIC),
        ("fp8", "full"),
        ("bf16", "ragged"),
        ("fp8", "ragged"),
        ("fp8", "reconstruct"),
    ],
)
def test_a_bundle_without_an_engine(exports: Exports, eight_bits: tuple[object, ...], mode: str, name: str) -> None:
    precision, typing, opset = ARITHMETIC[name]
    batch = ("--batch", "dynamic")  # or every sample is run alone
    result = exports.passed(
        *TRT,
        *batch,
        *MODES[mode],
        "--precision",
        precision,
        "--typing",
        typing,
        *(eight_bits if precision in ("int8", "fp8") else ()),
    )
    manifest = exports.manifest
    assert (result["engine"], manifest["engine"], manifest["precision"], manifest["typing"]) == (
        "tensorrt",
        "tensorrt",
        precision,
        typing,
    )
    assert (manifest["graph"]["opset"], manifest["engines"]) == (opset, [])
    proof = manifest["parity"][f"onnx-{precision}"]
    assert (proof["passed"], proof["engine"], proof.get("emulated")) == (
        True,
        "onnxruntime",
        "bf16" if name == "bf16" else None,
    )
    assert not {"built", "rejected"} & set(result)
    if name != "bf16":  # whose products ONNX Runtime's CPU has not got
        assert exports.verified("--engine", "onnxruntime", "--layers")["failures"] == []
        runs_as_pytorch(exports.out, robust_mae(), KEEP[mode], FLOORS[precision], "onnxruntime")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_speed_of_eight_bits_is_left_to_the_device(
    exports: Exports, eight_bits: tuple[object, ...], precision: str
) -> None:
    result = exports.passed(*TRT, "--precision", precision, "--tokens", "visible:5", *eight_bits)
    manifest = exports.manifest
    record = manifest["quantization"]
    assert (record["policy"], record["rest"], record["baseline"], record["speed"]) == (
        "static",
        "fp16",
        "baseline.onnx",
        tensorrt.SPEED_LEFT,
    )
    assert not {"latency_ms", "latency_ratio"} & set(record)
    assert record["calibration"]["method"] == {"int8": "mse", "fp8": "minmax"}[precision]
    assert result["quantization"]["text"] == f"8 of 8 Linears in {precision.upper()} (static)"
    assert (manifest["batch"], manifest["profile"]) == (1, {"B": [1, 1, 1], "K": [5, 5, 5]})
    assert "baseline.onnx" in manifest["files"]
    baseline, graph = (read_graph(exports.out / name).graph for name in ("baseline.onnx", "encoder.onnx"))
    assert [(list(baseline.input), list(baseline.output))] == [(list(graph.input), list(graph.output))]
    assert read_in_blocks(exports.out / "baseline.onnx", "MatMul", "Gemm", "Softmax") == {FLOAT16}


def test_people_are_told_what_is_left_to_do(exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "export",
        exports.checkpoint,
        "--out",
        exports.out,
        "--samples",
        exports.photos,
        "--num-samples",
        2,
        *TRT,
    ]
    assert main([str(argument) for argument in arguments]) == 0
    said = "".join(capsys.readouterr().out.split())  # wrapped anywhere
    assert f"noenginewasbuilt:mae-deploybuild-engine{exports.out}doesthatonthedevice" in said


# --- what TensorRT reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("fp16", FLOAT16), ("bf16", BFLOAT16), ("int8", FLOAT16)])
def test_nothing_is_fp32_within_attention(
    exports: Exports, eight_bits: tuple[object, ...], name: str, kind: int
) -> None:
    """TensorRT fuses it only then."""
    exports.passed(*TRT, "--precision", name, "--num-samples", 8, *(eight_bits if name == "int8" else ()))
    assert read_in_blocks(exports.out / "encoder.onnx", "Softmax") == {kind}
    nodes = [
        node
        for node in read_graph(exports.out / "encoder.onnx").graph.node
        if "/attn" not in node.name and ".attn/" in node.name
    ]
    assert "Cast" not in {node.op_type for node in nodes if node.name.endswith(("qk", "softmax", "av"))}
    assert FLOAT not in {
        types_of(exports.out / "encoder.onnx")[name]
        for node in nodes
        if node.op_type in ("MatMul", "Softmax")
        for name in node.input
    }


def test_weak_int8_has_fp32_weights_between_both_nodes(exports: Exports, eight_bits: tuple[object, ...]) -> None:
    """TensorRT 8 takes no integers as weights, and no scales but FP32."""
    exports.passed(*TRT, "--precision", "int8", "--typing", "weak", "--num-samples", 16, *eight_bits)
    path = exports.out / "encoder.onnx"
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in read_graph(path).graph.initializer}
    nodes = {node.name: node for node in read_graph(path).graph.node}
    for name in exports.manifest["quantization"]["quantized"]:
        quantize, dequantize = nodes[f"{name}/weight_quantized"], nodes[f"{name}/weight"]
        assert list(quantize.input) == [f"{name}.weight", f"{name}.weight_scale", f"{name}.weight_zero"]
        assert list(dequantize.input) == [f"{name}/weight_quantized", *quantize.input[1:]]
        weight, scales, zeros = (constants[part] for part in quantize.input)
        assert [part.dtype.name for part in (weight, scales, zeros)] == ["float32", "float32", "int8"]
        assert len(scales) == weight.shape[1]
        assert not zeros.any()
    assert FLOAT16 not in set(types_of(path).values()) | set(types_of(exports.out / "baseline.onnx").values())


def test_fp8_has_one_fp16_scale_a_tensor(exports: Exports, eight_bits: tuple[object, ...]) -> None:
    exports.passed(*TRT, "--precision", "fp8", "--num-samples", 16, *eight_bits)
    graph, types = read_graph(exports.out / "encoder.onnx").graph, types_of(exports.out / "encoder.onnx")
    for node in (node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")):
        assert [types[name] for name in node.input[1:]] == [FLOAT16, FP8]
        assert types[node.output[0]] == (FP8 if node.op_type == "QuantizeLinear" else FLOAT16)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    record = exports.manifest["quantization"]["quantized"]
    for name, scale in record.items():
        assert constants[f"{name}.weight"].data_type == FP8
        assert list(constants[f"{name}.weight_scale"].dims) == []
        assert float(np.float16(scale)) == scale
    assert "softmax" not in " ".join(node.name for node in graph.node if node.op_type == "QuantizeLinear")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_attention_in_eight_bits(
    exports: Exports, eight_bits: tuple[object, ...], tmp_path: Path, precision: str
) -> None:
    """Each product reads DequantizeLinear, the softmax with the scale of what is at most 1."""
    exports.checkpoint = write_checkpoint(
        tmp_path / "checkpoint", robust_mae(replace(CONFIG, embed_dim=48, num_heads=3))
    )
    exports.passed(
        *TRT,
        "--precision",
        precision,
        "--int8-attention",
        "--num-samples",
        16,
        *eight_bits,
        "--min-sqnr",
        10,
        "--min-cosine",
        0.5,
    )
    graph = read_graph(exports.out / "encoder.onnx").graph
    nodes = {node.output[0]: node for node in graph.node}
    constants = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type in (FLOAT, FLOAT16)
    }
    for block in range(2):
        for product in ("qk", "av"):
            assert {nodes[name].op_type for name in nodes[f"blocks.{block}.attn/{product}"].input} == {
                "DequantizeLinear"
            }
        shares = nodes[nodes[f"blocks.{block}.attn/av"].input[0]]
        assert float(constants[shares.input[1]]) == float(np.float16(1 / {"int8": 127, "fp8": 448}[precision]))


# --- several profiles ------------------------------------------------------------------------------------------------


def test_parity_is_proven_at_every_k_that_a_profile_names(exports: Exports) -> None:
    exports.passed(*TRT, "--tokens", "visible", "--profile", "B:1,1,1 K:5,5,5; B:2,4,8 K:3,6,9", "--num-samples", 8)
    assert exports.manifest["profile"] == {"B": [1, 1, 8], "K": [3, 5, 9]}
    assert exports.manifest["batch"] is None
    code, said = exports(
        *(
            *TRT,
            "--tokens",
            "visible",
            "--profile",
            "K:5,5,5; K:3,6,9",
            "--precision",
            "fp16",
            "--num-samples",
            8,
            "--fp32-ops",
            "softmax",
        ),
        out=exports.out,
    )
    assert (code, said.splitlines()[0]) == (2, f"error: --out {exports.out} already exists")


# --- what is refused, and what is kept instead -----------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--precision", "fp16"), ("--tokens", "visible:5")])
def test_without_a_gpu_what_is_missing_is_said_before_anything_is_computed(
    exports: Exports, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: int = 0) -> None:
        raise MissingDependency("no NVIDIA driver: libcuda.so.1 cannot be loaded", hint="install the driver")

    monkeypatch.setattr(tensorrt_api, "load_tensorrt", missing)
    monkeypatch.setattr("mae_deploy.export.run.prepare", lambda _: pytest.fail("it was begun"))
    code, said = exports("--engine", "trt", *more)
    assert (code, said.splitlines()) == (
        3,
        [
            "error: --engine trt builds an engine on this machine: no NVIDIA driver: libcuda.so.1 cannot be loaded",
            f"hint: install the driver; {tensorrt.NO_BUILD}",
        ],
    )
    assert exports.left == set()


def test_a_missed_budget_is_refused_with_its_figures_and_fp16_is_kept_where_it_is_preferred(
    exports: Exports, eight_bits: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*TRT, "--precision", "int8", "--num-samples", 8, *eight_bits, "--min-sqnr", 90)
    code, said = exports(*arguments)
    error, hint = said.splitlines()
    assert code == 1
    assert error.startswith("error: INT8 is rejected: all 8 Linears in INT8: cls: sqnr_db ")
    assert "latency" not in error
    assert hint.startswith("hint: leave out --no-search, export fp16 (--prefer fp16), or ")
    assert exports.left == set()
    result = exports.passed(*arguments, "--prefer", "fp16")
    assert result["rejected"].startswith("INT8 is rejected: all 8 Linears in INT8: cls: sqnr_db ")
    manifest = exports.manifest
    assert (result["precision"], manifest["precision"], manifest["quantization"]) == ("fp16", "fp16", None)
    assert (
        set(manifest["files"])
        == {"encoder.onnx", "golden.npz"}
        == {path.name for path in exports.out.iterdir()} - {"manifest.json", "README.md"}
    )
    assert manifest["tolerance"]["sqnr_db"] == 40


def test_a_budget_that_all_in_fp8_misses_gives_a_mix(exports: Exports, robust: Path) -> None:
    """Of 24 dB, the device's search of which would build for hours; ONNX Runtime's takes seconds."""
    exports.passed(
        *TRT,
        "--precision",
        "fp8",
        "--calib-data",
        robust / "calibration",
        "--num-samples",
        8,
        "--min-sqnr",
        27,
        "--min-cosine",
        0.5,
    )
    rows = json.loads((exports.out / "sensitivity.json").read_text())
    assert {row["precision"] for row in rows} == {"fp8", "fp16"}
    assert len(exports.manifest["quantization"]["quantized"]) == sum(row["precision"] == "fp8" for row in rows)


# --- what follows a build; ONNX Runtime stands in for the engine, tests/gpu has a real one ---------------------------

GPU = Gpu(index=0, name="Some GPU", compute_capability=(9, 0), memory_bytes=1 << 34, driver="12.4")


class StandIn(OnnxRuntimeEngine):
    """The bundle's graph; every output is off by so much in CUDA graphs."""

    off = 0.0

    def __init__(self, graph: Path, options: EngineOptions) -> None:
        super().__init__(graph, options)
        self.use_graphs = options.cuda_graphs

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        assert len(inputs["images"]) in (1, 2, 3), "batches of the profiles"
        return {name: array + self.use_graphs * self.off for name, array in super()._run(inputs, outputs).items()}


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `build_engine` was asked for, in order; INT8 takes 0.9 of FP16's latency."""
    asked: list[dict[str, Any]] = []

    def build(bundle: Bundle, **options: Any) -> Built:
        asked.append({"precision": bundle.precision, **options})
        options["on_progress"]("kernels", 0.5)
        speed = (
            {"latency_ratio": 0.9, "profile": 0, "latency_ms": {bundle.precision: [0.9], "fp16": [1.0]}}
            if bundle.baseline
            else None
        )
        if speed is not None and not speed["latency_ratio"] < options["max_latency"]:
            raise CheckFailed(
                "INT8 is rejected: it is not faster; it takes 0.90 of FP16's latency, 0.900 against 1.000 ms"
            )
        plan = tmp_path / "built.plan"
        plan.write_bytes(b"plan")
        entry = add_plan(
            bundle,
            BuiltPlan(file=plan, layers=None, record={"options": asdict(options["options"])}),
            version="10.3.0",
            gpu=GPU,
            precision=bundle.manifest["precision"],
            profiles=options["profiles"],
            build={},
            parity={},
            latency_ms=0.9,
        )
        return Built(entry=entry, checks=(), baseline=speed, rejected=None)

    monkeypatch.setattr("mae_deploy.export.run.require_tensorrt", lambda _: None)
    monkeypatch.setattr(tensorrt, "build_engine", build)
    monkeypatch.setattr(tensorrt, "open_plan", lambda bundle, entry, options: StandIn(bundle.graph(), options))
    return asked


def test_the_engine_is_in_the_bundle_with_what_was_measured_of_it(
    exports: Exports, eight_bits: tuple[object, ...], built: list[dict[str, Any]]
) -> None:
    profile = "B:1,2,3 K:5,5,5"
    result = exports.passed(
        "--engine",
        "trt",
        "--tokens",
        "visible",
        "--profile",
        profile,
        "--precision",
        "int8",
        "--workspace",
        77,
        "--max-latency",
        0.95,
        *eight_bits,
    )
    [asked] = built
    assert (asked["profiles"], asked["options"], asked["max_latency"]) == (
        [{"B": (1, 2, 3), "K": (5, 5, 5)}],
        BuildOptions(workspace=77),
        0.95,
    )
    manifest = exports.manifest
    assert [entry["file"] for entry in manifest["engines"]] == ["engines/10.3.0-some-gpu-int8.plan"]
    assert set(manifest["files"]) == {
        "encoder.onnx",
        "golden.npz",
        "baseline.onnx",
        "engines/10.3.0-some-gpu-int8.plan",
    }
    assert set(manifest["parity"]) == {"onnx-int8", "tensorrt-int8"}
    assert manifest["parity"]["tensorrt-int8"]["outputs"] == result["parity"]
    record = manifest["quantization"]
    assert (record["speed"], record["latency_ratio"], record["latency_ms"]) == (
        "measured on Some GPU",
        0.9,
        {"int8": 0.9, "fp16": 1.0},
    )
    assert result["built"]["text"] == "engines/10.3.0-some-gpu-int8.plan for Some GPU, 0.900 ms, 0.90 of FP16's latency"


def test_int8_that_is_not_faster_gives_a_bundle_in_fp16_where_that_is_preferred(
    exports: Exports, eight_bits: tuple[object, ...], built: list[dict[str, Any]]
) -> None:
    arguments = ("--engine", "trt", "--precision", "int8", "--num-samples", 8, "--max-latency", 0.8, *eight_bits)
    code, said = exports(*arguments)
    assert (code, said) == (
        1,
        "error: INT8 is rejected: it is not faster; it takes 0.90 of FP16's latency, 0.900 against 1.000 ms",
    )
    assert exports.left == set()
    result = exports.passed(*arguments, "--prefer", "fp16")
    assert "0.900 against 1.000 ms" in result["rejected"]
    assert [asked["precision"] for asked in built] == ["int8", "int8", "fp16"]
    manifest = exports.manifest
    assert (manifest["precision"], manifest["quantization"], [entry["precision"] for entry in manifest["engines"]]) == (
        "fp16",
        None,
        ["fp16"],
    )
    assert set(manifest["files"]) == {"encoder.onnx", "golden.npz", "engines/10.3.0-some-gpu-fp16.plan"}


def test_an_engine_that_is_wrong_in_cuda_graphs_alone_leaves_nothing(
    exports: Exports, built: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "off", 0.5)
    code, said = exports("--engine", "trt", "--precision", "fp16", "--batch", 2)
    assert (code, len(built)) == (1, 1)
    assert "the TensorRT " in said
    assert "CUDA graph: B=2: cls: " in said
    assert "; B=2: " not in said
    assert exports.left == set()
