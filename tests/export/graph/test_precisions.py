"""Lower precisions: where each type stands in the graph, and what is left of PyTorch's numbers, with planted outliers
too.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.layers import Attention
from torch import Tensor

from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec, TokenMode, available_outputs
from mae_deploy.images.read import Array
from mae_deploy.models.vit import Encoder
from tests.export.stream_outliers import inputs_of, plant_stream_outliers, trained_like
from tests.export.tiny_exports import (
    graph_of,
    input_scales,
    normalised,
    padded,
    permutations,
    pytorch_outputs,
    random_pixels,
    read_graph,
    sqnr,
)
from tests.models.tiny_models import ENCODER, metadata_of, random_tensor, tiny_classifier, tiny_mae

N = ENCODER.num_patches
PIXELS = random_pixels(ENCODER, 5)

FLOAT, FLOAT16, BFLOAT16, INT8, UINT8 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT8,
    TensorProto.UINT8,
)


@dataclass(frozen=True)
class Kind:
    """One way to compute, and the least SQNR of any output in dB."""

    floor: float
    precision: str
    typing: str = "weak"
    fp32_ops: tuple[str, ...] = ()
    linears: str | None = None
    """dynamic or static INT8."""

    @property
    def strong(self) -> bool:
        return self.typing == "strong"


KINDS = {
    "fp16 weak": Kind(60, "fp16"),
    "fp16 strong": Kind(60, "fp16", "strong", ("softmax",)),
    "bf16 weak": Kind(45, "bf16"),
    "bf16 strong": Kind(40, "bf16", "strong"),
    "int8 dynamic": Kind(28, "int8", linears="dynamic"),
    "int8 static": Kind(28, "int8", linears="static"),
    "int8 static strong": Kind(28, "int8", "strong", ("softmax",), linears="static"),
}
RUNNABLE = [name for name in KINDS if name != "bf16 strong"]
"""ONNX Runtime's CPU provider has no BF16 MatMul."""

MODES: tuple[TokenMode, ...] = ("full", "visible", "ragged", "reconstruct")


def model_for(mode: TokenMode) -> Encoder:
    return tiny_mae() if mode == "reconstruct" else tiny_classifier("cls")


def tokens_for(mode: TokenMode) -> dict[str, Array]:
    if mode == "ragged":
        return padded(N, [7, 1, 4, 7, 2], 7)
    return {} if mode == "full" else {"ids_keep": permutations(N, 5, 7)}


def spec_of(kind: Kind, scales: dict[str, float]) -> dict[str, Any]:
    quantized: dict[str, float | None] = (
        {} if kind.linears is None else dict(scales) if kind.linears == "static" else dict.fromkeys(scales)
    )
    return {"precision": kind.precision, "typing": kind.typing, "fp32_ops": kind.fp32_ops, "quantized": quantized}


def scales_of(model: Encoder, mode: TokenMode) -> dict[str, float]:
    """Min-max on the images themselves; those of a decoder only where there is one to run."""
    found = input_scales(model, normalised(model, PIXELS), tokens_for(mode) if mode == "reconstruct" else None)
    return {name: scale for name, scale in found.items() if mode == "reconstruct" or name.startswith("blocks.")}


def written(folder: Path, kind: Kind, mode: TokenMode, **more: Any) -> SavedTypes:
    """The graph of a kind of arithmetic with all its outputs; not opened, for not every engine can."""
    model = model_for(mode)
    spec = spec_of(kind, scales_of(model, mode))
    names = available_outputs(metadata_of(model), mode)
    graph = build_graph(
        metadata_of(model), model.state_dict(), GraphSpec(token_mode=mode, outputs=names, **spec, **more)
    )
    graph.save(folder / "graph.onnx")
    return SavedTypes(read_graph(folder / "graph.onnx"), graph.types)


@dataclass
class SavedTypes:
    """A graph and the type of each of its values."""

    model: onnx.ModelProto
    expected: dict[str, np.dtype[Any]]
    """As the builder has them, which casts by them."""
    nodes: list[onnx.NodeProto] = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = list(self.model.graph.node)

    @cached_property
    def weights(self) -> dict[str, Array]:
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}

    @cached_property
    def shapes(self) -> dict[str, onnx.TypeProto.Tensor]:
        inferred = onnx.shape_inference.infer_shapes(
            self.model, check_type=True, strict_mode=True, data_prop=True
        ).graph
        return {entry.name: entry.type.tensor_type for entry in [*inferred.value_info, *inferred.output]}

    @cached_property
    def types(self) -> dict[str, int]:
        stored = {tensor.name: tensor.data_type for tensor in self.model.graph.initializer}
        given = {entry.name: entry.type.tensor_type.elem_type for entry in self.model.graph.input}
        return {**{name: kind.elem_type for name, kind in self.shapes.items()}, **stored, **given}

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output}

    def of(self, *operators: str, inside: bool | None = None) -> list[onnx.NodeProto]:
        """Nodes of these operators; those inside the blocks, or outside."""
        return [node for node in self.nodes if node.op_type in operators and inside in (None, "blocks." in node.name)]

    def inputs(self, node: onnx.NodeProto) -> set[int]:
        """The types that a node reads."""
        return {self.types[name] for name in node.input}


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RUNNABLE)
def test_what_is_left_of_pytorchs_numbers(tmp_path: Path, name: str, mode: TokenMode) -> None:
    kind, model = KINDS[name], model_for(mode)
    images, tokens = normalised(model, PIXELS), tokens_for(mode)
    names = available_outputs(metadata_of(model), mode)
    found = graph_of(model, tmp_path, mode, outputs=names, images="uint8", **spec_of(kind, scales_of(model, mode)))(
        images=PIXELS, **tokens
    )
    expected = pytorch_outputs(model, images, tokens)
    for output, array in found.items():
        assert array.dtype == np.float32
        ratio = sqnr(array, expected[output])
        assert ratio > kind.floor, output
        assert ratio < 100, f"{output} is that of FP32: nothing was rounded"


def test_bf16_arithmetic_needs_another_engine(tmp_path: Path) -> None:
    with pytest.raises(
        Exception, match="Could not find an implementation for"
    ):  # ONNX Runtime's exceptions have no base class of their own
        graph_of(tiny_classifier("cls"), tmp_path, "full", precision="bf16", typing="strong")


@pytest.mark.parametrize("mode", MODES)
def test_bf16_arithmetic_can_be_emulated(tmp_path: Path, mode: TokenMode) -> None:
    """With the roundings of the graph for TensorRT, and no operator in BF16 but Cast."""
    model = model_for(mode)
    islands, names = ("gelu", "norm", "residual"), available_outputs(metadata_of(model), mode)
    saved = graph_of(
        model, tmp_path, mode, outputs=names, precision="bf16", typing="strong", fp32_ops=islands, emulates_bf16=True
    )
    images, tokens = normalised(model, PIXELS), tokens_for(mode)
    found, expected = saved(images=images, **tokens), pytorch_outputs(model, images, tokens)
    for output, array in found.items():
        assert 35 < sqnr(array, expected[output]) < 75, output
    graph = SavedTypes(saved.model, {})
    assert {node.op_type for node in graph.nodes if BFLOAT16 in graph.inputs(node)} == {"Cast"}
    for node in graph.of("MatMul", "Softmax", inside=True):
        [reader] = (other for other in graph.nodes if node.output[0] in other.input)
        assert (reader.op_type, graph.types[reader.output[0]]) == ("Cast", BFLOAT16)


@pytest.mark.parametrize("mode", ["full", "ragged"])
@pytest.mark.parametrize("name", ["bf16 weak", "bf16 strong"])
def test_bf16_on_openvino(tmp_path: Path, name: str, mode: TokenMode) -> None:
    openvino = pytest.importorskip("openvino")
    model, kind = model_for(mode), KINDS[name]
    written(tmp_path, kind, mode)
    core = openvino.Core()
    hint = "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    compiled = core.compile_model(
        str(tmp_path / "graph.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
    )
    images, tokens = normalised(model, PIXELS), tokens_for(mode)
    found, expected = compiled({"images": images, **tokens}), pytorch_outputs(model, images, tokens)
    for output in available_outputs(metadata_of(model), mode):
        assert sqnr(found[output], expected[output]) > 40, output


@pytest.mark.parametrize("name", ["int8 static", "int8 static strong"])
def test_int8_attention(tmp_path: Path, name: str) -> None:
    model, kind = tiny_classifier("cls"), KINDS[name]
    images, spec = normalised(model, PIXELS), spec_of(KINDS[name], scales_of(tiny_classifier("cls"), "full"))
    parts = {f"blocks.{index}.attn": qkv_scales(model, images, index) for index in range(2)}
    saved = graph_of(model, tmp_path, "full", attention_scales=parts, **spec)
    expected = pytorch_outputs(model, images)
    assert min(sqnr(array, expected[output]) for output, array in saved(images=images).items()) > kind.floor
    producers = {output: node for node in saved.model.graph.node for output in node.output}
    for index in range(2):
        for part in ("qk", "av"):
            product = next(node for node in saved.model.graph.node if node.name == f"blocks.{index}.attn/{part}")
            sources = [producers[value] for value in product.input]
            sources = [producers[node.input[0]] if node.op_type == "Transpose" else node for node in sources]
            assert [node.op_type for node in sources] == ["DequantizeLinear"] * 2, (
                "what an engine fuses has nothing in between"
            )
            scales = [float(numpy_helper.to_array(saved.weights[node.input[1]])) for node in sources]
            wanted = (
                parts[f"blocks.{index}.attn"][:2] if part == "qk" else (1 / 127, parts[f"blocks.{index}.attn"][2])
            )  # shares are at most 1
            np.testing.assert_allclose(scales, wanted, rtol=2**-11 if kind.strong else 1e-6)
    without = graph_of(model, tmp_path, "full", **spec)
    before, after = (Counter(node.op_type for node in graph.model.graph.node) for graph in (without, saved))
    assert after - before == Counter({"QuantizeLinear": 8, "DequantizeLinear": 8})


@torch.no_grad()
def qkv_scales(model: Encoder, images: Array, index: int) -> tuple[float, float, float]:
    attention = model.get_submodule(f"blocks.{index}.attn")
    assert isinstance(attention, Attention)
    [tokens] = inputs_of([attention], lambda: Encoder.forward(model, torch.from_numpy(images)))
    q, k, v = (float(part.abs().max()) / 127 for part in attention.qkv(tokens).chunk(3, dim=-1))
    return q * attention.scale, k, v


# --- outliers --------------------------------------------------------------------------------------------------------

OUTLIERS: dict[str, dict[str, Any]] = {
    "one channel": {"channels": {5: 1500.0}},
    "two, of either sign": {"channels": {5: 1500.0, 40: -1200.0}},
    "in CLS alone": {"channels": {5: 1500.0, 40: -1200.0}, "cls_alone": True},
}


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("depth", [3, 24])
def test_outliers_neither_overflow_nor_drown_the_rest(tmp_path: Path, depth: int, outliers: str) -> None:
    """As deep as ViT-L; a LayerNorm taken apart would square 1,500, which FP16 has no number for."""
    images = random_tensor(4, 3, 40, 24)
    model = plant_stream_outliers(trained_like(depth, 64, 4), images, **OUTLIERS[outliers])
    stream, hidden = sizes_of(model, images)
    assert 1400 < stream < 1700
    assert hidden > 3900
    expected = pytorch_outputs(model, images.numpy())
    assert np.abs(expected["tokens"]).max() < 20, "the outliers are in the results, where nothing else would count"
    for name, floor in (("fp16 weak", 60), ("fp16 strong", 40), ("bf16 weak", 40)):
        found = graph_of(model, tmp_path, "full", **spec_of(KINDS[name], {}))(images=images.numpy())
        for output, array in found.items():
            assert np.isfinite(array).all(), (name, output)
            assert sqnr(array, expected[output]) > floor, (name, output)
            assert worst_cosine(array, expected[output]) > 0.9995, (name, output)


def sizes_of(model: Encoder, images: Tensor) -> tuple[float, float]:
    """The largest number in the residual stream, and that between the two maps of an MLP."""
    stream, hidden = (
        inputs_of(
            [model.get_submodule(f"blocks.{index}.{name}") for index in range(model.config.blocks)],
            lambda: model(images),
        )
        for name in ("norm2", "mlp.act")
    )
    return float(torch.stack(stream).abs().max()), float(torch.stack(hidden).abs().max())


def worst_cosine(found: Array, expected: Array) -> float:
    """Of all tokens of all images, each after the norm, whose mean is not taken off."""
    a, b = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (found, expected))
    return float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


# --- where each type stands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_every_shape_is_known(tmp_path: Path, name: str, mode: TokenMode) -> None:
    kind = KINDS[name]
    saved = written(
        tmp_path,
        kind,
        mode,
        batch=3,
        keep=None if mode == "full" else 4,
        pixels="image" if mode == "reconstruct" else "target",
    )
    assert set(saved.shapes) == set(saved.producers)
    inner = set(saved.shapes) - {entry.name for entry in saved.model.graph.output}
    assert {name: saved.types[name] for name in inner} == {
        name: helper.np_dtype_to_tensor_dtype(saved.expected[name]) for name in inner
    }
    assert [value for value, shape in saved.shapes.items() if any(side.dim_value < 1 for side in shape.shape.dim)] == []
    assert not {"Shape", "If", "Loop", "Expand", "Resize", "NonZero", "Range", "Scan", "ConstantOfShape"} & {
        node.op_type for node in saved.nodes
    }
    assert all(node.domain == "" for node in saved.nodes)
    opset, version = (19, 9) if name == "int8 static strong" else (17, 8)
    assert [(entry.domain, entry.version) for entry in saved.model.opset_import] == [("", opset)]
    assert saved.model.ir_version == version


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_what_stays_fp32(tmp_path: Path, name: str, mode: TokenMode) -> None:
    """Patch embedding, positions, final norm, pooling, head, the decoder's first and last maps: all that does not stand
    in a block.
    """
    saved = written(tmp_path, KINDS[name], mode)
    for node in saved.of("MatMul", "Gemm", "LayerNormalization", "ReduceMean", "ReduceSum", "Mul", "Div", inside=False):
        assert saved.inputs(node) - {TensorProto.INT64} == {FLOAT}, node.name  # axes are INT64
    outside = {node.name.partition("/")[0] for node in saved.of("MatMul", "Gemm", inside=False)}
    assert outside >= (
        {"patch_embed", "decoder_embed", "decoder_pred"} if mode == "reconstruct" else {"patch_embed", "head"}
    )
    assert all(
        node.attribute[[a.name for a in node.attribute].index("stash_type")].i == 1
        for node in saved.of("LayerNormalization")
    )
    assert {entry.type.tensor_type.elem_type for entry in saved.model.graph.output} == {FLOAT}


@pytest.mark.parametrize("name", ["fp16 weak", "bf16 weak"])
def test_weak_typing_computes_in_fp32_and_stores_less(tmp_path: Path, name: str) -> None:
    saved, stored = written(tmp_path, KINDS[name], "reconstruct"), FLOAT16 if name == "fp16 weak" else BFLOAT16
    lower = [tensor for tensor in saved.model.graph.initializer if tensor.data_type == stored]
    matrices = {
        name
        for name in tiny_mae().state_dict()
        if re.fullmatch(r"(decoder_)?blocks\..*(qkv|proj|fc1|fc2)\.weight", name)
    }
    assert {tensor.name for tensor in lower} == matrices
    assert {saved.types[value] for value in saved.producers} == {FLOAT, TensorProto.INT64, TensorProto.BOOL}
    readers = [node for node in saved.nodes if any(saved.types[value] == stored for value in node.input)]
    assert Counter(node.op_type for node in readers) == {"Cast": len(matrices)}, (
        "one Cast each, which an engine folds when it loads"
    )


@pytest.mark.parametrize("mode", ["full", "ragged", "reconstruct"])
def test_strong_fp16(tmp_path: Path, mode: TokenMode) -> None:
    saved = written(tmp_path, KINDS["fp16 strong"], mode)
    blocks = 3 if mode == "reconstruct" else 2
    products = saved.of("MatMul", "Gemm", inside=True)
    assert len([node for node in products if not node.name.endswith("/placed")]) == 6 * blocks
    for node in (*products, *saved.of("LayerNormalization", "Erf", inside=True)):
        if not node.name.endswith("/placed"):
            assert saved.inputs(node) == {FLOAT16}, node.name
    for softmax in saved.of("Softmax", inside=True):  # and not that of probs
        assert saved.inputs(softmax) == {FLOAT}
        before = saved.producers[softmax.input[0]]
        before = saved.producers[before.input[0]] if mode == "ragged" and before.op_type == "Add" else before
        after = [node for node in saved.nodes if softmax.output[0] in node.input]
        assert [node.op_type for node in (before, *after)] == ["Cast", "Cast"]
        assert saved.types[after[0].output[0]] == FLOAT16
    residuals = [node for node in saved.nodes if node.name.endswith("_residual")]
    assert len(residuals) == 2 * blocks
    assert all(saved.inputs(node) == {FLOAT16} for node in residuals)


def test_strong_bf16_keeps_all_but_the_products(tmp_path: Path) -> None:
    """Eight bits of mantissa are too few for what is added up from block to block."""
    saved = written(tmp_path, KINDS["bf16 strong"], "full")
    products = saved.of("MatMul", "Gemm", inside=True)
    assert len(products) == 12
    assert all(saved.inputs(node) == {BFLOAT16} for node in products)
    others = [node for node in saved.nodes if node not in products and node.op_type != "Cast"]
    reading = {node.op_type for node in others if BFLOAT16 in saved.inputs(node)}
    assert reading <= {"Transpose"}, "which moves numbers and computes none"


ISLANDS = {
    "softmax": r"attn/softmax",
    "gelu": r"mlp\.gelu/.*",
    "norm": r"norm[12]/LayerNormalization",
    "residual": r"(attn|mlp)_residual",
}
"""The nodes of each, after the block's number."""


@pytest.mark.parametrize("islands", [(), *((island,) for island in ISLANDS), tuple(ISLANDS)], ids=str)
def test_islands_are_fp32_and_nothing_else_is(tmp_path: Path, islands: tuple[str, ...]) -> None:
    saved = written(tmp_path, Kind(60, "fp16", "strong", islands), "full")
    computing = [
        node
        for node in saved.of("Softmax", "Erf", "Div", "Mul", "Add", "LayerNormalization", "MatMul", "Gemm")
        if node.name.startswith("blocks.")
    ]
    assert {kind for node in computing for kind in saved.inputs(node)} <= {FLOAT, FLOAT16}
    inside = {
        node.name
        for node in computing
        for island in islands
        if re.fullmatch(rf"blocks\.\d\.?/?{ISLANDS[island]}", node.name)
    }
    assert len(inside) == sum({"softmax": 2, "gelu": 10, "norm": 4, "residual": 4}[island] for island in islands)
    assert {node.name for node in computing if FLOAT in saved.inputs(node)} == inside


@pytest.mark.parametrize("islands", [("softmax",), ("gelu", "norm")])
@pytest.mark.parametrize("name", ["fp16 weak", "bf16 weak", "int8 static"])
def test_an_island_in_fp32_is_refused(tmp_path: Path, name: str, islands: tuple[Any, ...]) -> None:
    kind, model = KINDS[name], tiny_classifier("cls")
    spec = GraphSpec(
        token_mode="full",
        fp32_ops=islands,
        precision=kind.precision,  # type: ignore[arg-type]
        typing=kind.typing,  # type: ignore[arg-type]
    )
    said = f"--fp32-ops {','.join(islands)}: with --precision {kind.precision} --typing {kind.typing} these are FP32"
    with pytest.raises(ConfigError, match=f"{said} already"):
        build_graph(metadata_of(model), model.state_dict(), spec)


# --- INT8 ------------------------------------------------------------------------------------------------------------


def linears_of(mode: TokenMode) -> list[str]:
    blocks = [*(f"blocks.{index}" for index in range(2)), *(["decoder_blocks.0"] if mode == "reconstruct" else [])]
    return [f"{block}.{linear}" for block in blocks for linear in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def assert_symmetric(integers: Array, scales: Array, weight: Array) -> None:
    """int8 per output channel, of which the largest is 127."""
    assert integers.dtype == np.int8
    assert (np.abs(integers.astype(int)).max(axis=0) == 127).all()
    assert scales.shape == (weight.shape[0],)
    scales = scales.astype(np.float64)
    # Half a step, and what the scale lost if it is FP16: at most a 2048th of 127 steps.
    assert (np.abs(integers.T * scales[:, None] - weight) <= 0.57 * scales[:, None]).all()


def folded(model: Encoder, name: str) -> Array:
    """A Linear's weight as the graph has it: the rows of q times 1 / sqrt(d)."""
    weight: Array = model.state_dict()[f"{name}.weight"].numpy().copy()
    if name.endswith("qkv"):
        weight[: weight.shape[1]] /= 2  # heads of 4
    return weight


@pytest.mark.parametrize("mode", ["full", "ragged", "reconstruct"])
@pytest.mark.parametrize("name", ["int8 static", "int8 static strong"])
def test_static_int8_stands_at_the_linears_inputs_only(tmp_path: Path, name: str, mode: TokenMode) -> None:
    kind, model = KINDS[name], model_for(mode)
    saved, scales = written(tmp_path, kind, mode), scales_of(model_for(mode), mode)
    stream = FLOAT16 if kind.strong else FLOAT
    products = {node.name.removesuffix("/MatMul"): node for node in saved.of("MatMul")}
    assert set(scales) == set(linears_of(mode))
    for linear in linears_of(mode):
        activation, weight = (saved.producers[value] for value in products[linear].input)
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear",) * 2
        rounding = saved.producers[activation.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        assert list(rounding.input[1:]) == list(activation.input[1:])
        scale, zero = (saved.weights[value] for value in rounding.input[1:])
        assert (zero.dtype.name, zero.shape, int(zero)) == ("int8", (), 0)
        np.testing.assert_allclose(float(scale), scales[linear], rtol=2**-11 if kind.strong else 2**-24)
        integers, factors, zeros = (saved.weights[value] for value in weight.input)
        assert [(attribute.name, attribute.i) for attribute in weight.attribute] == [("axis", 1)]
        assert (zeros.dtype.name, zeros.shape, int(zeros.any())) == ("int8", factors.shape, 0)
        assert_symmetric(integers, factors, folded(model, linear))
        assert saved.inputs(products[linear]) == {stream}
    count = Counter(node.op_type for node in saved.nodes)
    assert (count["QuantizeLinear"], count["DequantizeLinear"]) == (len(scales), 2 * len(scales)), "and nowhere else"
    assert count["DynamicQuantizeLinear"] == count["MatMulInteger"] == 0


@pytest.mark.parametrize("mode", ["full", "ragged", "reconstruct"])
def test_dynamic_int8_finds_the_range_of_each_linears_input(tmp_path: Path, mode: TokenMode) -> None:
    saved, model = written(tmp_path, KINDS["int8 dynamic"], mode), model_for(mode)
    products = {node.name.removesuffix("/MatMulInteger"): node for node in saved.of("MatMulInteger")}
    assert set(products) == set(linears_of(mode))
    for linear, product in products.items():
        rounding = saved.producers[product.input[0]]
        assert rounding.op_type == "DynamicQuantizeLinear"
        assert product.input[2] == rounding.output[2]
        assert saved.types[rounding.output[0]] == UINT8
        integers, zeros = (saved.weights[product.input[index]] for index in (1, 3))
        assert_symmetric(integers, saved.weights[f"{linear}.weight_scale"], folded(model, linear))
        assert (zeros.dtype.name, int(zeros.any())) == ("int8", 0)
    count = Counter(node.op_type for node in saved.nodes)
    assert (count["DynamicQuantizeLinear"], count["QuantizeLinear"], count["DequantizeLinear"]) == (len(products), 0, 0)


@pytest.mark.parametrize("name", ["int8 dynamic", "int8 static", "int8 static strong"])
def test_a_mix_of_int8_and_higher(tmp_path: Path, name: str) -> None:
    """As the search for a budget makes them: what is not quantised is as it is without INT8."""
    kind, model = KINDS[name], tiny_classifier("cls")
    images, chosen = normalised(model, PIXELS), ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"]
    spec = spec_of(kind, {linear: scale for linear, scale in scales_of(model, "full").items() if linear in chosen})
    saved = graph_of(model, tmp_path, "full", **spec)
    expected = pytorch_outputs(model, images)
    assert min(sqnr(array, expected[output]) for output, array in saved(images=images).items()) > 35
    stored = {
        tensor.name.removesuffix(".weight")
        for tensor in saved.model.graph.initializer
        if tensor.data_type == INT8 and tensor.name.endswith(".weight")
    }
    assert stored == set(chosen)
    weights = {f"{linear}.weight" for linear in linears_of("full")}
    assert {tensor.data_type for tensor in saved.model.graph.initializer if tensor.name in weights} == {
        INT8,
        FLOAT16 if kind.strong else FLOAT,
    }


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    model = tiny_classifier("cls")
    model.state_dict()["blocks.1.mlp.fc2.weight"][3, 5] = torch.inf
    with pytest.raises(CheckFailed, match=r"blocks\.1\.mlp\.fc2\.weight has NaN or infinite values"):
        graph_of(model, tmp_path, "full", precision="int8", quantized={"blocks.1.mlp.fc2": None})
