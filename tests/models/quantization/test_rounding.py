"""Rounding is ONNX's, for weights and activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper

from mae_deploy.models.quantization.rounding import (
    FP8,
    INT8,
    Rounding,
    dynamic_round_trip,
    eligible_linears,
    quantize_weight,
    static_round_trip,
    weight_round_trip,
)
from tests.export.graph.small_graphs import open_small
from tests.export.tiny_exports import run_session
from tests.models.tiny_models import random_tensor, tiny_classifier, tiny_encoder, tiny_mae

BLOCK = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("rounding", [INT8, FP8])
def test_a_weight_goes_there_and_back(rounding: Rounding) -> None:
    weight = random_tensor(7, 30) * torch.logspace(-9, 3, 7).unsqueeze(1)
    stored, scales = quantize_weight(weight.numpy(), rounding=rounding)
    np.testing.assert_array_equal(
        weight_round_trip(weight, rounding).numpy(), stored.astype(np.float32) * scales.reshape(-1, 1)
    )


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
    np.testing.assert_allclose(
        stored.astype(np.float32) * scale,
        [[largest, -largest / 2]],
        atol=2**-10 * np.finfo(np.float16).tiny,
        rtol=2**-4,
    )


def test_fp8_rounding_is_onnx_runtimes(tmp_path: Path) -> None:
    values = torch.cat(
        [random_tensor(500), random_tensor(500) * 300, torch.tensor([0.0, 2**-10, -(2**-11), 447.9, 464.0, 1e6, -1e6])]
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    constants = {"scale": np.array(0.25, np.float32), "zero": np.array(0, FP8.dtype)}
    found = run_session(
        open_small(tmp_path, nodes, constants, [len(values)], [len(values)], opset=19), x=values.numpy()
    )["y"]
    np.testing.assert_array_equal(static_round_trip(values, 0.25, FP8).numpy(), found)


def test_the_linears_of_the_blocks_are_eligible() -> None:
    encoder = [f"blocks.{index}.{name}" for index in range(2) for name in BLOCK]
    assert eligible_linears(tiny_encoder()) == encoder
    assert eligible_linears(tiny_classifier("avg")) == encoder
    assert eligible_linears(tiny_mae()) == encoder + [f"decoder_blocks.0.{name}" for name in BLOCK]


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
    graph = open_small(tmp_path, nodes, {}, list(values.shape), list(values.shape))
    np.testing.assert_array_equal(dynamic_round_trip(values).numpy(), run_session(graph, x=values.numpy())["y"])
