"""Rounding is ONNX's, for weights and activations, and the model that was rounded is given back as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from mae_deploy.errors import CheckFailed
from mae_deploy.export.arithmetic import Precision, Typing
from mae_deploy.export.graph import GraphSpec, build_graph
from mae_deploy.export.quantize import (
    FP8,
    ROUNDINGS,
    attention_obstacle,
    dynamic_round_trip,
    eligible_linears,
    fake_quantized,
    macs_per_token,
    quantize_weight,
    static_round_trip,
)
from mae_deploy.preprocess import Array
from mae_deploy.runtime.engine import EngineOptions
from mae_deploy.runtime.onnxruntime_engine import OnnxRuntimeEngine
from tests.export.outlier_models import decibels, noisy_encoder
from tests.export.tiny_exports import open_session, run_session
from tests.models.tiny_models import metadata_of, random_tensor, tiny_classifier, tiny_encoder, tiny_mae

BLOCK = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def test_each_output_channel_has_its_scale() -> None:
    integers, scales = quantize_weight(np.array([[127.0, -63.5, 0.4], [0.0254, 0.0127, -0.0003]], np.float32))
    assert (integers.dtype.name, scales.dtype.name) == ("int8", "float32")
    np.testing.assert_array_equal(integers, [[127, -64, 0], [127, 64, -2]])  # -63.5 to even; 63.5 too; -1.5 to even
    np.testing.assert_allclose(scales, [1, 0.0002], rtol=1e-6)


def test_rounding_is_off_by_half_a_step_at_most() -> None:
    weight = random_tensor(7, 300).numpy()
    integers, scales = quantize_weight(weight)
    assert (np.abs(integers * scales[:, None] - weight) <= 0.5001 * scales[:, None]).all()
    assert (np.abs(integers).max(axis=1) == 127).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38])
def test_rows_of_nothing_become_zeros(value: float) -> None:
    """Denormal numbers would make a scale of no precision, or 0, by which nothing can be divided."""
    integers, scales = quantize_weight(np.array([[value, -value], [1, 2]], np.float32))
    np.testing.assert_array_equal(integers, [[0, 0], [64, 127]])
    np.testing.assert_allclose(scales, [1, 2 / 127], rtol=1e-6)


def test_fp8_has_one_scale_a_tensor_that_is_a_number_of_fp16() -> None:
    weight = np.array([[448.0, -1.05, 0.01], [3.1, 0.0, -2e-9]], np.float32) / 7
    stored, scale = quantize_weight(weight, rounding=FP8)
    assert (stored.dtype, scale.shape, float(scale)) == (FP8.dtype, (), float(np.float16(1 / 7)))
    # 2^-3 is the step between 1 and 2, and the smallest number 2^-9.
    np.testing.assert_array_equal(stored.astype(np.float32), [[448, -1.0, 0.009765625], [3.0, 0, 0]])


@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e-3])
def test_a_scale_of_fp8_keeps_all_its_digits_in_fp16(largest: float) -> None:
    assert float(FP8.scales(largest)) == np.finfo(np.float16).tiny
    stored, scale = quantize_weight(np.array([[largest, -largest / 2]], np.float32), rounding=FP8)
    np.testing.assert_allclose(stored.astype(np.float32) * scale, [[largest, -largest / 2]], atol=2**-10 * np.finfo(np.float16).tiny, rtol=2**-4)


def test_fp8_rounding_is_onnx_runtimes(tmp_path: Path) -> None:
    values = torch.cat([random_tensor(500), random_tensor(500) * 300, torch.tensor([0.0, 2**-10, -(2**-11), 447.9, 464.0, 1e6, -1e6])])
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]), helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"])]
    constants = {"scale": np.array(0.25, np.float32), "zero": np.array(0, FP8.dtype)}
    found = run_session(save(tmp_path, nodes, constants, [len(values)], [len(values)], opset=19), x=values.numpy())["y"]
    np.testing.assert_array_equal(static_round_trip(values, 0.25, FP8).numpy(), found)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = tiny_encoder()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.proj.weight")[2, 3] = bad
    with pytest.raises(CheckFailed, match=r"blocks\.1\.attn\.proj\.weight has NaN or infinite values"), fake_quantized(model, {"blocks.1.attn.proj": 0.1}):
        pass


def test_the_linears_of_the_blocks_are_eligible() -> None:
    encoder = [f"blocks.{index}.{name}" for index in range(2) for name in BLOCK]
    assert eligible_linears(tiny_encoder()) == encoder
    assert eligible_linears(tiny_classifier("avg")) == encoder
    assert eligible_linears(tiny_mae()) == encoder + [f"decoder_blocks.0.{name}" for name in BLOCK]
    assert [macs_per_token(tiny_mae(), f"decoder_blocks.0.{name}") for name in BLOCK] == [12 * 36, 12 * 12, 12 * 48, 12 * 48]


@pytest.mark.parametrize(("head_dim", "tokens", "reason"), [(64, 512, None), (16, 1, None), (80, 50, "head dimension is 80"), (64, 513, "up to 513 tokens")])
def test_what_fused_int8_attention_needs(head_dim: int, tokens: int, reason: str | None) -> None:
    found = attention_obstacle(head_dim, tokens)
    assert found is None if reason is None else reason in (found or "")


def test_static_rounding() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 63.4, 1e9, -64.0, -1e9])
    found = static_round_trip(values, 0.5)
    assert found.tolist() == [0.0, 1.0, 1.0, 0.0, -1.0, 63.5, 63.5, -64.0, -64.0]


@pytest.mark.parametrize(
    "values",
    [
        random_tensor(3, 5, 7),
        random_tensor(50) + 9,
        random_tensor(50) - 9,
        torch.zeros(3),
        torch.full((4,), 2.5),
        torch.full((4,), -3.0),
        random_tensor(50) * 1e-6,
    ],
)
def test_dynamic_rounding_is_onnx_runtimes(values: torch.Tensor, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = save(tmp_path, nodes, {}, list(values.shape), list(values.shape))
    np.testing.assert_array_equal(dynamic_round_trip(values).numpy(), run_session(graph, x=values.numpy())["y"])


class Maps(nn.Module):
    """Two Linears of which one is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 11), nn.Linear(11, 5)
        with torch.no_grad():
            self.first.weight[4] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def save(folder: Path, nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: list[int], output: list[int], opset: int = 17) -> object:
    """A graph from `x` to `y` in ONNX Runtime."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [
            helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, np.ascontiguousarray(value).tobytes(), raw=True)
            for name, value in constants.items()
        ],
    )
    path = folder / "small.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    onnx.checker.check_model(str(path), full_check=True)
    return open_session(path)


STATIC = [
    ("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
    ("DequantizeLinear", ["q", "x_scale", "x_zero"], ["rounded"]),
    ("DequantizeLinear", ["w", "w_scale", "w_zero"], ["weight"]),
    ("MatMul", ["rounded", "weight"], ["product"]),
]
DYNAMIC = [
    ("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
    ("MatMulInteger", ["q", "w", "zero", "w_zero"], ["total"]),
    ("Cast", ["total"], ["float_total"]),
    ("Mul", ["scale", "w_scale"], ["factors"]),
    ("Mul", ["float_total", "factors"], ["product"]),
]
REST = [("Add", ["product", "b"], ["first"]), ("MatMul", ["first", "w2"], ["second"]), ("Add", ["second", "b2"], ["y"])]
ATTRIBUTES: dict[str, dict[str, Any]] = {"weight": {"axis": 1}, "float_total": {"to": TensorProto.FLOAT}}


@pytest.mark.parametrize("scale", [0.03, None])
def test_a_rounded_model_computes_what_the_graph_computes(scale: float | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Maps(), random_tensor(4, 13, 30) * 2  # some beyond 127 * 0.03
    integers, scales = quantize_weight(model.first.weight.detach().numpy())
    constants = {
        "w": np.ascontiguousarray(integers.T),
        "w_scale": scales,
        "w_zero": np.zeros(11, np.int8),
        "b": model.first.bias.detach().numpy(),
        "w2": np.ascontiguousarray(model.second.weight.detach().numpy().T),
        "b2": model.second.bias.detach().numpy(),
    }
    if scale is not None:
        constants |= {"x_scale": np.array(scale, np.float32), "x_zero": np.array(0, np.int8)}
    nodes = [helper.make_node(op, inputs, outputs, **ATTRIBUTES.get(outputs[0], {})) for op, inputs, outputs in (DYNAMIC if scale is None else STATIC) + REST]
    graph = save(tmp_path, nodes, constants, [4, 13, 30], [4, 13, 5])
    with fake_quantized(model, {"first": scale}):
        found = model(x).numpy()
    np.testing.assert_allclose(found, run_session(graph, x=x.numpy())["y"], rtol=0, atol=3e-6)  # float32 sums against int32 sums
    with torch.no_grad():
        assert np.abs(model(x).numpy() - found).max() > 1e-3


@pytest.mark.parametrize(
    ("scale", "attention", "precision"), [(0.05, False, "int8"), (0.05, True, "int8"), (None, False, "int8"), (0.0625, False, "fp8"), (0.0625, True, "fp8")]
)
def test_a_rounded_encoder_computes_what_the_exported_graph_computes(scale: float | None, attention: bool, precision: Precision, tmp_path: Path) -> None:
    model, images = noisy_encoder(), random_tensor(5, 3, 12, 20)
    scales = dict.fromkeys(eligible_linears(model)[:-1], scale)
    products = {"blocks.0.attn": (0.01, 0.04, 0.03), "blocks.1.attn": (0.02, 0.03, 0.04)} if attention else {}
    typing: Typing = "weak"
    if precision == "fp8":  # one Linear and one attention: around them the graph is FP16, in which many numbers round otherwise, and what follows with them
        typing, scales, products = "strong", {"blocks.1.mlp.fc1": scale}, {name: parts for name, parts in products.items() if name == "blocks.1.attn"}
    spec = GraphSpec(token_mode="full", precision=precision, typing=typing, quantized=scales, attention_scales=products, outputs=("tokens",))
    builder = build_graph(metadata_of(model), model.state_dict(), spec)
    builder.save(tmp_path / "graph.onnx")
    with OnnxRuntimeEngine(tmp_path / "graph.onnx", EngineOptions(threads=1), precision=precision) as engine:
        exported = torch.from_numpy(engine.run({"images": images.numpy()})["tokens"])
    with torch.no_grad():
        plain = model(images)[:, 1:]
        with fake_quantized(model, scales, products, rounding=ROUNDINGS[precision]):
            rounded = model(images)[:, 1:]
    # Where a value lies between two integers, the last bit of a float32 sum decides: a few are off by a step, which is a thousandth of the noise.
    assert decibels(rounded, exported) > decibels(plain, rounded) + (6 if precision == "fp8" else 25)


def fail_within(context: AbstractContextManager[nn.Module], check: Callable[[], torch.Tensor]) -> None:
    with context:
        assert check()
        raise RuntimeError("midway")


def test_the_model_is_given_back_as_it_was() -> None:
    model, images = tiny_encoder(), random_tensor(2, 3, 6, 10)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(images)
        corrections = {name: torch.ones(len(model.get_parameter(f"{name}.bias"))) for name in eligible_linears(model)}
        rounded = fake_quantized(model, dict.fromkeys(eligible_linears(model), 0.1), {"blocks.0.attn": (1.0, 1.0, 1.0)}, corrections=corrections)
        with pytest.raises(RuntimeError, match="midway"):
            fail_within(rounded, lambda: (model(images) - expected).abs().max() > 1e-3)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_corrections_are_added_while_a_linear_is_rounded() -> None:
    model, images = tiny_encoder(), random_tensor(2, 3, 6, 10)
    name = "blocks.1.mlp.fc2"
    corrections = {name: random_tensor(20), "blocks.0.mlp.fc2": random_tensor(20)}
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        seen.append(output)

    handle = model.get_submodule(name).register_forward_hook(keep)
    for given in (None, corrections):
        with fake_quantized(model, {name: None}, corrections=given):
            model(images)
    handle.remove()
    torch.testing.assert_close(seen[1] - seen[0], corrections[name].expand(2, 16, 20), rtol=0, atol=1e-5)  # of values around 1
