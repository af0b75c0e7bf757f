"""The pyramid's nodes compute what its module computes, in fixed sizes and with nothing that an engine of opset 17
lacks.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.builder import Dim, GraphBuilder
from mae_deploy.export.graph.pyramid import write_pyramid
from mae_deploy.images.read import Array
from mae_deploy.models.pyramid import LEVELS, SimpleFeaturePyramid
from tests.export.tiny_exports import SavedGraph
from tests.models.tiny_models import fill, random_tensor

# Half of 13 is 6, a quarter 3: no two of these sizes are equal.
WIDTH, CHANNELS = 13, 7

OPERATORS = {
    "p2": {
        "ConvTranspose": 2,
        "Conv": 2,
        "LayerNormalization": 3,
        "Transpose": 6,
        "Div": 1,
        "Erf": 1,
        "Add": 1,
        "Mul": 2,
    },
    "p3": {"ConvTranspose": 1, "Conv": 2, "LayerNormalization": 2, "Transpose": 4},
    "p4": {"Conv": 2, "LayerNormalization": 2, "Transpose": 4},
    "p5": {"MaxPool": 1, "Conv": 2, "LayerNormalization": 2, "Transpose": 4},
}
"""All that a level is made of, its output apart."""


def arrays_of(pyramid: SimpleFeaturePyramid) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in pyramid.state_dict().items()}


def graph_of(
    pyramid: SimpleFeaturePyramid,
    folder: Path,
    grid_size: tuple[int, int],
    *,
    batch: Dim = "B",
    levels: tuple[str, ...] = LEVELS,
    dtype: type = np.float32,
) -> SavedGraph:
    b = GraphBuilder("pyramid")
    features = b.input("features", dtype, [batch, pyramid.state_dict()["simfp_4.0.weight"].shape[1], *grid_size])
    for name, (value, shape) in write_pyramid(b, features, arrays_of(pyramid), grid_size, batch, levels).items():
        b.output(name, value, shape)
    return SavedGraph(b, folder)


@torch.no_grad()
def pytorch(pyramid: SimpleFeaturePyramid, features: Array) -> dict[str, Array]:
    return {name: map.numpy() for name, map in pyramid(torch.from_numpy(features)).items()}


def assert_close(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Within 1e-4, the project's limit for FP32; the maps are normalised, so of order 1."""
    assert list(found) == list(expected)
    for name, reference in expected.items():
        assert found[name].shape == reference.shape
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - reference).max() < 1e-4, name


@pytest.mark.parametrize("grid_size", [(3, 5), (4, 6), (2, 11)], ids=["odd", "even", "even by odd"])
def test_the_nodes_are_the_module(tmp_path: Path, grid_size: tuple[int, int]) -> None:
    pyramid = fill(SimpleFeaturePyramid(WIDTH, CHANNELS))
    graph = graph_of(pyramid, tmp_path, grid_size)
    for batch in (1, 3):
        features = random_tensor(batch, WIDTH, *grid_size, seed=batch).numpy()
        assert_close(graph(features=features), pytorch(pyramid, features))


def test_real_widths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(192).eval()
    features = random_tensor(2, 192, 7, 5).numpy()
    assert_close(graph_of(pyramid, tmp_path, (7, 5), batch=2)(features=features), pytorch(pyramid, features))


def test_the_sizes_are_declared_and_the_names_kept(tmp_path: Path) -> None:
    pyramid = fill(SimpleFeaturePyramid(WIDTH, CHANNELS))
    graph = graph_of(pyramid, tmp_path, (3, 5))
    shapes = {entry.name: entry.shape for entry in graph.session.get_outputs()}
    assert shapes == {"p2": ["B", 7, 12, 20], "p3": ["B", 7, 6, 10], "p4": ["B", 7, 3, 5], "p5": ["B", 7, 1, 2]}
    weights = {
        name: numpy_helper.to_array(tensor) for name, tensor in graph.weights.items() if name.startswith("simfp_")
    }
    expected = arrays_of(pyramid)
    assert set(weights) == set(expected)
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_alone_has_its_own_nodes_only(tmp_path: Path, level: str) -> None:
    pyramid = fill(SimpleFeaturePyramid(WIDTH, CHANNELS))
    graph = graph_of(pyramid, tmp_path, (3, 5), levels=(level,))
    assert Counter(node.op_type for node in graph.model.graph.node) == {**OPERATORS[level], "Identity": 1}
    features = random_tensor(2, WIDTH, 3, 5).numpy()
    assert_close(graph(features=features), {level: pytorch(pyramid, features)[level]})


def test_a_half_precision_map_is_read_in_float32(tmp_path: Path) -> None:
    pyramid = fill(SimpleFeaturePyramid(WIDTH, CHANNELS))
    graph = graph_of(pyramid, tmp_path, (3, 5), dtype=np.float16)
    features = random_tensor(2, WIDTH, 3, 5).numpy().astype(np.float16)
    assert_close(graph(features=features), pytorch(pyramid, features.astype(np.float32)))
    assert Counter(node.op_type for node in graph.model.graph.node)["Cast"] == 1


def test_a_grid_without_a_half_is_refused() -> None:
    b = GraphBuilder("pyramid")
    features = b.input("features", np.float32, ["B", WIDTH, 1, 5])
    with pytest.raises(ConfigError, match="at least 2x2 patches"):
        write_pyramid(b, features, arrays_of(SimpleFeaturePyramid(WIDTH, CHANNELS)), (1, 5), "B")
