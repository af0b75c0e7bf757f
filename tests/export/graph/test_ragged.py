"""A ragged batch: each image gives what it gives alone, and whatever stands in the padding changes nothing, in every
precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from mae_deploy.export.graph.spec import available_outputs
from mae_deploy.images.read import Array
from tests.export.tiny_exports import (
    SavedGraph,
    graph_of,
    input_scales,
    normalised,
    open_session,
    padded,
    pytorch_outputs,
    random_pixels,
    run_session,
    sqnr,
)
from tests.models.tiny_models import ENCODER, metadata_of, tiny_classifier

N = ENCODER.num_patches
MODEL = tiny_classifier("cls")
NAMES = available_outputs(metadata_of(MODEL), "ragged")
IMAGES = normalised(MODEL, random_pixels(ENCODER, 5))
SCALES = input_scales(MODEL, IMAGES)

LENGTHS = [[N, 1, 2, 7, N], [1, 1, 1, 1, 1], [2, 5, 3, 9, 11]]


@dataclass(frozen=True)
class Case:
    """A ragged graph and a visible one of the same arithmetic."""

    ragged: SavedGraph
    visible: SavedGraph
    floor: float
    """Least SQNR against PyTorch of each output of each image, in dB; a few below what was measured."""
    together: bool
    """Whether an image's results are the same in any batch: a range found at run time is that of the whole batch."""


PRECISIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "fp32": (110, {}),
    "fp16 weak": (60, {"precision": "fp16"}),
    "fp16 strong": (60, {"precision": "fp16", "typing": "strong", "fp32_ops": ("softmax",)}),
    "fp16 strong, softmax too": (60, {"precision": "fp16", "typing": "strong"}),
    "bf16 weak": (45, {"precision": "bf16"}),
    "int8 dynamic": (30, {"precision": "int8", "quantized": dict.fromkeys(SCALES)}),
    "int8 static": (30, {"precision": "int8", "quantized": SCALES}),
    "int8 static strong": (
        30,
        {"precision": "int8", "typing": "strong", "fp32_ops": ("softmax",), "quantized": SCALES},
    ),
}


@pytest.fixture(scope="module", params=PRECISIONS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    floor, spec = PRECISIONS[request.param]
    ragged, visible = (
        graph_of(MODEL, tmp_path_factory.mktemp(mode), mode, outputs=NAMES, **spec) for mode in ("ragged", "visible")
    )
    return Case(ragged, visible, floor, request.param != "int8 dynamic")


def rows_of(name: str) -> bool:
    return name == "tokens" or name.startswith("block_")


def unpadded(found: dict[str, Array], index: int, length: int) -> dict[str, Array]:
    """One image's part of the results, without its padding."""
    return {name: array[[index], :length] if rows_of(name) else array[[index]] for name, array in found.items()}


def assert_alike(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Equal but for rounding: 80 dB is a ten-thousandth of the whole, far below a step of INT8 (42 dB) and below one of
    FP16 (66 dB).
    """
    for name, array in found.items():
        assert sqnr(array, expected[name]) > 80, name


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_image_is_what_pytorch_says_of_it_alone(case: Case, lengths: list[int]) -> None:
    inputs = padded(N, lengths, max(lengths))
    found, expected = case.ragged(images=IMAGES, **inputs), pytorch_outputs(MODEL, IMAGES, inputs)
    for name, array in found.items():
        assert array.shape == expected[name].shape
        assert min(map(sqnr, array, expected[name])) > case.floor, name


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_image_is_what_the_visible_graph_makes_of_it_alone(case: Case, lengths: list[int]) -> None:
    inputs = padded(N, lengths, max(lengths))
    together = case.ragged(images=IMAGES, **inputs)
    for index, length in enumerate(lengths):
        ids = inputs["ids_keep"][[index]]
        alone = case.visible(images=IMAGES[[index]], ids_keep=ids[:, :length])
        padded_alone = case.ragged(images=IMAGES[[index]], ids_keep=ids, num_keep=inputs["num_keep"][[index]])
        assert_alike(unpadded(padded_alone, 0, length), alone)
        if case.together:
            assert_alike(unpadded(together, index, length), alone)


@pytest.mark.parametrize("length", [1, 2, 7, N - 1])
def test_longer_padding_changes_nothing(case: Case, length: int) -> None:
    """Not the range of INT8 either: padding repeats CLS, so it has no value that is not there already."""
    short, long = (case.ragged(images=IMAGES[:1], **padded(N, [length], keep)) for keep in (length, N))
    assert_alike(unpadded(long, 0, length), short)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_garbage_in_the_padding_changes_not_one_bit(case: Case, lengths: list[int]) -> None:
    found = case.ragged(images=IMAGES, **padded(N, lengths, N))
    for garbage in (1, 2, 3):
        other = case.ragged(images=IMAGES, **padded(N, lengths, N, garbage=garbage))
        for name, array in found.items():
            np.testing.assert_array_equal(other[name], array)


def test_padded_rows_are_zero_and_pooled_is_the_mean_of_the_others(case: Case) -> None:
    lengths = LENGTHS[0]
    found = case.ragged(images=IMAGES, **padded(N, lengths, N))
    for index, length in enumerate(lengths):
        for name in filter(rows_of, found):
            assert (found[name][index, length:] == 0).all()
            assert np.abs(found[name][index, :length]).min(axis=0).max() > 0.01
        mean = found["tokens"][index, :length].mean(axis=0, dtype=np.float64)
        # Sums of at most 15 numbers of order 1, in FP32 in every precision.
        np.testing.assert_allclose(found["pooled"][index], mean, rtol=0, atol=1e-5)


def computed_in_fp16(graph: Path, folder: Path) -> Any:
    """A session of a weakly typed graph with FP16 in place of FP32 in every value, as TensorRT may compute it."""
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            with np.errstate(over="ignore"):  # to infinity, as an engine rounds
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save_model(model, folder / "half.onnx")
    return open_session(folder / "half.onnx")


@pytest.mark.parametrize("keep", [None, N])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_weakly_typed_graph_holds_nothing_that_fp16_cannot(tmp_path: Path, precision: str, keep: int | None) -> None:
    graph = graph_of(MODEL, tmp_path, "ragged", outputs=NAMES, precision=precision, keep=keep)
    inputs = padded(N, LENGTHS[0], N)
    found = run_session(computed_in_fp16(graph.path, tmp_path), images=IMAGES.astype(np.float16), **inputs)
    for name, expected in pytorch_outputs(MODEL, IMAGES, inputs).items():
        if name in found:  # BF16 weights leave 45 dB
            assert min(map(sqnr, found[name].astype(np.float32), expected)) > 45, name


def test_no_loop_is_left_to_an_engine(case: Case) -> None:
    """A CumSum is a loop to TensorRT 8.6 to 10.1, which no CUDA graph can be made of."""
    assert not {"CumSum", "Loop", "Scan", "If"} & {node.op_type for node in case.ragged.model.graph.node}


def test_lengths_are_compared_as_whole_numbers(case: Case) -> None:
    """FP16, in which TensorRT may compute what is FP32 in a weakly typed graph, counts to 2048."""
    types = {
        entry.name: entry.type.tensor_type.elem_type
        for entry in onnx.shape_inference.infer_shapes(case.ragged.model).graph.value_info
    }
    compared = next(node for node in case.ragged.model.graph.node if node.op_type == "LessOrEqual")
    assert {types[name] for name in compared.input} == {TensorProto.INT64}


def test_garbage_is_garbage() -> None:
    """Every kind of it in the padding, none before."""
    rows = [padded(N, [2], 7, garbage=kind)["ids_keep"][0].tolist() for kind in range(4)]
    assert all(row[:2] == rows[0][:2] for row in rows)
    assert rows[1][2:] == [rows[1][0]] * 5
    assert rows[2][2:6] == [2**63 - 1, -(2**63), -1, N]
    assert not set(rows[0][2:]) & set(rows[3][2:])
