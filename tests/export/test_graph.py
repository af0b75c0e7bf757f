"""The graph computes what PyTorch computes, for any subset of the patches, and holds nothing that it does not need."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from mae_deploy.errors import ConfigError
from mae_deploy.export.graph import GraphSpec, available_outputs, build_graph
from mae_deploy.models.config import EncoderConfig
from mae_deploy.models.vit import Classifier, Encoder, patchify, unpatchify
from mae_deploy.preprocess import Array
from tests.export.tiny_exports import SavedGraph
from tests.models.tiny_models import CLASSES, ENCODER, fill, metadata_of, random_tensor, tiny_classifier, tiny_encoder, tiny_mae

MODELS: dict[str, Callable[[EncoderConfig], Encoder]] = {
    "encoder": tiny_encoder,
    "mae": tiny_mae,
    "avg": lambda config: tiny_classifier("avg", config),
    "cls": lambda config: tiny_classifier("cls", config),
}

CONFIGS = {
    "3x6x10, heads of 4": ENCODER,
    "1x15x9, heads of 12": replace(ENCODER, image_size=(15, 9), patch_size=3, in_chans=1, embed_dim=36, num_heads=3, depth=1),
    "4x4x14, heads of 8": replace(ENCODER, image_size=(4, 14), in_chans=4, embed_dim=24, num_heads=3, depth=3, mlp_ratio=1.5),
    "3x25x5, heads of 64": replace(ENCODER, image_size=(25, 5), patch_size=5, embed_dim=64, num_heads=1),
}

Mode = Literal["full", "visible"]

# Token mode, fixed K, fixed batch; then the sizes (B, K) that such a graph must take.
SPECS: list[tuple[Mode, int | None, int | None]] = [
    ("full", None, None),
    ("full", None, 3),
    ("visible", None, None),
    ("visible", None, 3),
    ("visible", 4, None),
    ("visible", 4, 3),
]

OPERATORS = {
    "Add",
    "Div",
    "Erf",
    "Gather",
    "GatherND",
    "Identity",
    "LayerNormalization",
    "MatMul",
    "Mul",
    "Pad",
    "ReduceMean",
    "Reshape",
    "Slice",
    "Softmax",
    "Transpose",
    "Unsqueeze",
}
"""What every engine that reads opset 17 knows: no Shape, If, Loop, Expand, and nothing random."""


def graph_of(model: Encoder, folder: Path, mode: Mode = "visible", **spec: Any) -> SavedGraph:
    return SavedGraph(build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode=mode, **spec)), folder)


def permutations(num_patches: int, batch: int, keep: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_patches, generator=generator)[:keep] for _ in range(batch)])


@torch.no_grad()
def pytorch(model: Encoder, images: Tensor, ids_keep: Tensor | None) -> dict[str, Array]:
    """What the model itself gives, under the graph's names."""
    tokens = Encoder.forward(model, images, ids_keep)
    found = {"cls": tokens[:, 0], "tokens": tokens[:, 1:], "pooled": tokens[:, 1:].mean(dim=1)}
    if isinstance(model, Classifier):
        found["logits"] = model(images, ids_keep)
        if model.pool == "avg":
            found = {"logits": found["logits"], "pooled": model.forward_pooled(images, ids_keep)}
    return {name: tensor.numpy() for name, tensor in found.items()}


def assert_close(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Within 1e-5 of the largest number, the project's limit for FP32: the same sums in another order, through up to three blocks."""
    assert set(found) == set(expected)
    for name, reference in expected.items():
        assert found[name].shape == reference.shape
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - reference).max() <= 1e-5 * np.abs(reference).max(), name


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "keep", "batch"), SPECS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_is_the_model(tmp_path: Path, kind: str, config: EncoderConfig, mode: Mode, keep: int | None, batch: int | None) -> None:
    model = MODELS[kind](config)
    graph = graph_of(model, tmp_path, mode, keep=keep, batch=batch)
    N = config.num_patches
    assert N >= 5
    for B, K in ((1, 1), (2, N), (5, N - 2)):
        B, K = batch or B, keep or K
        images = random_tensor(B, config.in_chans, *config.image_size, seed=B)
        ids = permutations(N, B, K) if mode == "visible" else None
        inputs = {"images": images.numpy()} | ({"ids_keep": ids.numpy()} if ids is not None else {})
        assert_close(graph(**inputs), pytorch(model, images, ids))


@pytest.mark.parametrize(("pooling", "names"), [("token", ("logits", "cls", "tokens")), ("avg", ("logits",))])
def test_the_graph_is_timms(tmp_path: Path, pooling: str, names: tuple[str, ...]) -> None:
    """A model that this project did not write, 48x80 pixels in 3x5 patches of 16."""
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80), depth=2, num_classes=CLASSES, global_pool=pooling, fc_norm=pooling == "avg")
    fill(theirs)
    config = EncoderConfig(name="theirs", image_size=(48, 80), patch_size=16, embed_dim=192, depth=2, num_heads=3)
    metadata = metadata_of(Classifier(config, num_classes=CLASSES, pool="avg" if pooling == "avg" else "cls"))
    graph = SavedGraph(build_graph(metadata, theirs.state_dict(), GraphSpec(token_mode="full", outputs=names)), tmp_path)
    images = random_tensor(3, 3, 48, 80)
    with torch.no_grad():
        tokens = theirs.forward_features(images)  # type: ignore[operator]
        expected = {"logits": theirs(images), "cls": tokens[:, 0], "tokens": tokens[:, 1:]}
    assert_close(graph(images=images.numpy()), {name: expected[name].numpy() for name in names})


def test_visible_with_every_patch_in_order_is_full(tmp_path: Path) -> None:
    model, images = tiny_encoder(), random_tensor(3, 3, 6, 10)
    (tmp_path / "full").mkdir()
    full = graph_of(model, tmp_path / "full", "full")(images=images.numpy())
    visible = graph_of(model, tmp_path)(images=images.numpy(), ids_keep=np.tile(np.arange(15), (3, 1)))
    assert_close(visible, full)


@pytest.mark.parametrize("kind", MODELS)
def test_permuting_ids_keep_permutes_the_tokens_and_nothing_else(tmp_path: Path, kind: str) -> None:
    model, images = MODELS[kind](ENCODER), random_tensor(3, 3, 6, 10).numpy()
    ids, order = permutations(15, 3, 7).numpy(), np.array([4, 0, 6, 2, 5, 1, 3])
    graph = graph_of(model, tmp_path)
    found, permuted = graph(images=images, ids_keep=ids), graph(images=images, ids_keep=ids[:, order])
    if "tokens" in found:
        assert np.abs(found["tokens"][:, 1] - found["tokens"][:, 2]).max() > 0.1, "tokens are alike, so their order cannot show"
    assert_close(permuted, {name: array[:, order] if name == "tokens" else array for name, array in found.items()})


@pytest.mark.parametrize("kind", MODELS)
def test_pixels_of_hidden_patches_change_not_one_bit(tmp_path: Path, kind: str) -> None:
    model, images, ids = MODELS[kind](ENCODER), random_tensor(3, 3, 6, 10), permutations(15, 3, 4)
    hidden = torch.ones(3, 15, 1).scatter(1, ids.unsqueeze(-1), 0.0)
    noisy = unpatchify(patchify(images, 2) + 9 * hidden, 2, ENCODER.grid_size)
    graph = graph_of(model, tmp_path)
    found, same = graph(images=images.numpy(), ids_keep=ids.numpy()), graph(images=noisy.numpy(), ids_keep=ids.numpy())
    for name, array in found.items():
        np.testing.assert_array_equal(same[name], array)
    # One hidden patch more to see, and the noise shows.
    ids[:, 0] = (1 - hidden[:, :, 0]).argmin(dim=1)
    seen = graph(images=noisy.numpy(), ids_keep=ids.numpy())
    assert all(np.abs(seen[name] - found[name]).max() > 1e-3 for name in found)


def test_each_sample_has_its_own_patches(tmp_path: Path) -> None:
    images, ids = random_tensor(3, 3, 6, 10).numpy(), permutations(15, 3, 4).numpy()
    graph = graph_of(tiny_encoder(), tmp_path)
    together = graph(images=images, ids_keep=ids)
    for index in range(3):
        one = slice(index, index + 1)
        assert_close(graph(images=images[one], ids_keep=ids[one]), {name: array[one] for name, array in together.items()})


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ({"batch": 3}, {"images": ("K", 3, 6, 10), "ids_keep": ("K", 4)}),
        ({"keep": 4}, {"images": ("B", 3, 6, 10), "ids_keep": ("B", 5)}),
    ],
)
def test_a_fixed_size_takes_no_other(tmp_path: Path, spec: dict[str, Any], shapes: dict[str, tuple[Any, ...]]) -> None:
    graph = graph_of(tiny_encoder(), tmp_path, **spec)
    sizes = [2 if isinstance(side, str) else side for side in shapes["ids_keep"]]
    images = np.zeros([2 if isinstance(side, str) else side for side in shapes["images"]], np.float32)
    with pytest.raises(Exception, match="Got invalid dimensions"):  # ONNX Runtime's exceptions have no base class of their own
        graph(images=images, ids_keep=np.tile(np.arange(sizes[1]), (sizes[0], 1)))


def test_weights_of_another_precision_are_stored_as_float32(tmp_path: Path) -> None:
    model = tiny_encoder().bfloat16()
    graph = graph_of(model, tmp_path, "full")
    stored = numpy_helper.to_array(graph.weights["blocks.1.mlp.fc2.bias"])
    np.testing.assert_array_equal(stored, model.state_dict()["blocks.1.mlp.fc2.bias"].float().numpy(), strict=True)
    assert {tensor.data_type for tensor in graph.weights.values()} == {TensorProto.FLOAT, TensorProto.INT64}


# --- outputs ---------------------------------------------------------------------------------------------------------


def choices(kind: str) -> list[tuple[str, ...]]:
    known = available_outputs(metadata_of(MODELS[kind](ENCODER)))
    return [names for count in range(1, len(known) + 1) for names in itertools.combinations(known[::-1], count)]


@pytest.mark.parametrize(("kind", "names"), [(kind, names) for kind in MODELS for names in choices(kind)], ids=str)
def test_chosen_outputs_and_no_dead_node(tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    model, images, ids = MODELS[kind](ENCODER), random_tensor(2, 3, 6, 10), permutations(15, 2, 7)
    graph = graph_of(model, tmp_path, outputs=names)
    found = graph(images=images.numpy(), ids_keep=ids.numpy())
    assert tuple(found) == names
    expected = pytorch(model, images, ids)
    assert_close(found, {name: expected[name] for name in names})
    assert dead_ends(graph.model) == set()


def dead_ends(model: onnx.ModelProto) -> set[str]:
    """Values that are computed, stored or given, and never used."""
    graph = model.graph
    made = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer} | {entry.name for entry in graph.input}
    used = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    return made - used


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("encoder", ("cls", "tokens", "pooled")),
        ("mae", ("cls", "tokens", "pooled")),
        ("avg", ("logits", "pooled")),
        ("cls", ("logits", "cls", "tokens", "pooled")),
    ],
)
def test_all_outputs_are_the_default(tmp_path: Path, kind: str, known: tuple[str, ...]) -> None:
    model = MODELS[kind](ENCODER)
    assert available_outputs(metadata_of(model)) == known
    for outputs in (None, ()):
        assert [entry.name for entry in graph_of(model, tmp_path, outputs=outputs).model.graph.output] == list(known)


@pytest.mark.parametrize(("kind", "name"), [("encoder", "logits"), ("mae", "pixels"), ("avg", "tokens"), ("avg", "cls"), ("cls", "bogus")])
def test_an_output_that_the_model_lacks(kind: str, name: str) -> None:
    model = MODELS[kind](ENCODER)
    with pytest.raises(ConfigError, match=f"this model has no output '{name}'") as caught:
        build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode="full", outputs=("pooled", name)))
    assert caught.value.hint == f"it has {', '.join(available_outputs(metadata_of(model)))}"


@pytest.mark.parametrize("keep", [0, 16, 9999])
def test_a_number_of_patches_that_the_image_does_not_have(keep: int) -> None:
    model = tiny_encoder()
    with pytest.raises(ConfigError, match=f"visible:{keep}: K must be within 1 and 15"):
        build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode="visible", keep=keep))


# --- the structure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "keep", "batch"), SPECS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_in_the_graph(tmp_path: Path, kind: str, mode: Mode, keep: int | None, batch: int | None) -> None:
    depth = 3
    model = MODELS[kind](replace(ENCODER, depth=depth))
    saved = graph_of(model, tmp_path, mode, keep=keep, batch=batch)
    operators = [node.op_type for node in saved.model.graph.node]
    assert set(operators) <= OPERATORS
    assert operators.count("LayerNormalization") == 2 * depth + 1, "two a block, and the final norm or fc_norm"
    assert operators.count("Softmax") == depth
    # The patch embedding; q k, weights times v, qkv, proj, fc1 and fc2 a block; the head.
    assert operators.count("MatMul") == 1 + 6 * depth + (kind in ("avg", "cls"))
    assert {(entry.domain, entry.version) for entry in saved.model.opset_import} == {("", 17)}
    assert all(node.name and node.domain == "" for node in saved.model.graph.node)
    assert len({node.name for node in saved.model.graph.node}) == len(operators)
    assert dead_ends(saved.model) == set()


@pytest.mark.parametrize("kind", MODELS)
def test_weights_keep_their_names_and_the_decoder_is_dropped(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind](ENCODER)
    weights = graph_of(model, tmp_path).weights
    own = {name for name in model.state_dict() if not name.startswith(("decoder", "mask_token"))}
    merged = {"cls_token", "pos_embed", "patch_embed.proj.bias"}
    assert {name for name in weights if not name.startswith("const/")} == own - merged | {"position_table"}
    for name in own - merged - {"patch_embed.proj.weight"}:
        if not name.endswith(("qkv.weight", "qkv.bias")):
            stored, tensor = numpy_helper.to_array(weights[name]), model.state_dict()[name].numpy()
            np.testing.assert_array_equal(stored, tensor.T if tensor.ndim == 2 else tensor, strict=True)


@pytest.mark.parametrize(("mode", "keep", "batch"), SPECS)
def test_declared_shapes_are_those_of_the_arrays(tmp_path: Path, mode: Mode, keep: int | None, batch: int | None) -> None:
    model = tiny_classifier("cls")
    graph = build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode=mode, keep=keep, batch=batch))
    B, K = batch or "B", keep or "K"
    inputs = [{"name": "images", "dtype": "float32", "shape": [B, 3, 6, 10]}]
    if mode == "visible":
        inputs.append({"name": "ids_keep", "dtype": "int64", "shape": [B, K]})
    assert graph.inputs() == inputs
    declared = {entry["name"]: entry["shape"] for entry in graph.outputs()}
    assert declared == {"logits": [B, CLASSES], "cls": [B, 20], "tokens": [B, K if mode == "visible" else 15, 20], "pooled": [B, 20]}
    sizes: dict[str | int, int] = {"B": 3, "K": 4}
    given = {entry["name"]: np.zeros([sizes.get(side, 0) or int(side) for side in entry["shape"]], entry["dtype"]) for entry in graph.inputs()}
    found = SavedGraph(graph, tmp_path)(**given)
    assert {name: list(array.shape) for name, array in found.items()} == {name: [sizes.get(side, side) for side in shape] for name, shape in declared.items()}


def test_shape_inference_knows_every_value(tmp_path: Path) -> None:
    """With all sizes fixed, an engine need not guess one shape."""
    saved = graph_of(tiny_classifier("avg"), tmp_path, keep=4, batch=3)
    inferred = onnx.shape_inference.infer_shapes(saved.model, strict_mode=True, data_prop=True).graph
    shapes = {entry.name: [side.dim_value for side in entry.type.tensor_type.shape.dim] for entry in [*inferred.value_info, *inferred.output]}
    assert set(shapes) == {name for node in saved.model.graph.node for name in node.output}
    assert all(min(shape, default=1) > 0 for shape in shapes.values())
    assert shapes["blocks.1/mlp_residual"] == [3, 5, 20]
