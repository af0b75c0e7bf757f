"""PyTorch computes what a quantised graph computes, and the model that was rounded is given back as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from mae_deploy.errors import CheckFailed
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.precision import Precision, Typing
from mae_deploy.export.graph.spec import GraphSpec
from mae_deploy.export.quantization.fake_quant import fake_quantized, macs_per_token
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.quantization.policy import reason_against_int8_attention
from mae_deploy.models.quantization.rounding import eligible_linears, quantize_weight, rounding_of
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.export.graph.small_graphs import open_small
from tests.export.outlier_models import CONFIG, GATED, decibels, noisy_encoder
from tests.export.tiny_exports import run_session
from tests.models.tiny_models import metadata_of, random_tensor, tiny_encoder, tiny_mae


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = tiny_encoder()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.proj.weight")[2, 3] = bad
    with (
        pytest.raises(CheckFailed, match=r"blocks\.1\.attn\.proj\.weight has NaN or infinite values"),
        fake_quantized(model, {"blocks.1.attn.proj": 0.1}),
    ):
        pass


def test_the_multiplications_of_a_linear() -> None:
    names = [name for name in eligible_linears(tiny_mae()) if name.startswith("decoder_")]
    assert [macs_per_token(tiny_mae(), name) for name in names] == [12 * 36, 12 * 12, 12 * 48, 12 * 48]


@pytest.mark.parametrize(
    ("head_dim", "tokens", "reason"),
    [(64, 512, None), (16, 1, None), (80, 50, "head dimension is 80"), (64, 513, "up to 513 tokens")],
)
def test_what_fused_int8_attention_needs(head_dim: int, tokens: int, reason: str | None) -> None:
    found = reason_against_int8_attention(head_dim, tokens)
    assert found is None if reason is None else reason in (found or "")


class Maps(nn.Module):
    """Two Linears of which one is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 11), nn.Linear(11, 5)
        with torch.no_grad():
            self.first.weight[4] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


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
    nodes = [
        helper.make_node(op, inputs, outputs, **ATTRIBUTES.get(outputs[0], {}))
        for op, inputs, outputs in (DYNAMIC if scale is None else STATIC) + REST
    ]
    graph = open_small(tmp_path, nodes, constants, [4, 13, 30], [4, 13, 5])
    with fake_quantized(model, {"first": scale}):
        found = model(x).numpy()
    np.testing.assert_allclose(
        found, run_session(graph, x=x.numpy())["y"], rtol=0, atol=3e-6
    )  # float32 sums against int32 sums
    with torch.no_grad():
        assert np.abs(model(x).numpy() - found).max() > 1e-3


@pytest.mark.parametrize(
    ("scale", "attention", "precision", "weight_bits", "config"),
    [
        (0.05, False, "int8", 8, CONFIG),
        (0.05, True, "int8", 8, CONFIG),
        (0.05, True, "int8", 8, replace(GATED, qk_norm=True)),
        (0.05, False, "int8", 7, CONFIG),
        (None, False, "int8", 8, CONFIG),
        (None, False, "int8", 7, CONFIG),
        (0.0625, False, "fp8", 8, CONFIG),
        (0.0625, True, "fp8", 8, CONFIG),
    ],
)
def test_a_rounded_encoder_computes_what_the_exported_graph_computes(
    scale: float | None,
    attention: bool,
    precision: Precision,
    weight_bits: int,
    config: EncoderConfig,
    tmp_path: Path,
) -> None:
    model, images = noisy_encoder(config=config), random_tensor(5, 3, 12, 20, seed=2)
    scales = dict.fromkeys(eligible_linears(model)[:-1], scale)
    products = {"blocks.0.attn": (0.01, 0.04, 0.03), "blocks.1.attn": (0.02, 0.03, 0.04)} if attention else {}
    typing: Typing = "weak"
    if (
        precision == "fp8"
        # one Linear and one attention: around them the graph is FP16, in which many numbers round otherwise, and what
        # follows with them
    ):
        typing, scales, products = (
            "strong",
            {"blocks.1.mlp.fc1": scale},
            {name: parts for name, parts in products.items() if name == "blocks.1.attn"},
        )
    spec = GraphSpec(
        token_mode="full",
        precision=precision,
        typing=typing,
        quantized=scales,
        attention_scales=products,
        weight_bits=weight_bits,
        outputs=("tokens",),
    )
    builder = build_graph(metadata_of(model), model.state_dict(), spec)
    builder.save(tmp_path / "graph.onnx")
    arithmetic = "int8-w7" if weight_bits == 7 else precision  # multiplied by the fast products of any CPU
    with OnnxRuntimeEngine(tmp_path / "graph.onnx", EngineOptions(threads=1), precision=arithmetic) as engine:
        exported = torch.from_numpy(engine.run({"images": images.numpy()})["tokens"])
    with torch.no_grad():
        plain = model(images)[:, config.num_prefix :]
        with fake_quantized(model, scales, products, rounding=rounding_of(precision, weight_bits)):
            rounded = model(images)[:, config.num_prefix :]
    # Where a value lies between two integers, the last bit of a float32 sum decides: a few are off by a step, which is
    # a thousandth of the noise.
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
        rounded = fake_quantized(
            model,
            dict.fromkeys(eligible_linears(model), 0.1),
            {"blocks.0.attn": (1.0, 1.0, 1.0)},
            corrections=corrections,
        )
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
    torch.testing.assert_close(
        seen[1] - seen[0], corrections[name].expand(2, 16, 20), rtol=0, atol=1e-5
    )  # of values around 1
