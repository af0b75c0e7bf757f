"""The FP32 graph computes what PyTorch computes, for any subset of the patches, and holds nothing that it does not
need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, numpy_helper

from mae_deploy.errors import ConfigError
from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec, TokenMode, available_outputs, block_tensor, default_outputs
from mae_deploy.images.read import Array
from mae_deploy.models.config import DecoderConfig, EncoderConfig, ObjectiveConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.pyramid import LEVELS, SimpleFeaturePyramid
from mae_deploy.models.vit import Classifier, Encoder, patchify, unpatchify
from mae_deploy.weights.pyramid import random_pyramid
from tests.export.tiny_exports import (
    SavedGraph,
    assert_close,
    graph_of,
    normalised,
    padded,
    permutations,
    pytorch_outputs,
    random_pixels,
)
from tests.models.tiny_models import (
    CLASSES,
    ENCODER,
    fill,
    metadata_of,
    random_tensor,
    tiny_classifier,
    tiny_encoder,
    tiny_mae,
)

N = ENCODER.num_patches

MODELS: dict[str, Callable[[EncoderConfig], Encoder]] = {
    "encoder": tiny_encoder,
    "mae": tiny_mae,
    "avg": lambda config: tiny_classifier("avg", config),
    "cls": lambda config: tiny_classifier("cls", config),
}


@dataclass(frozen=True)
class Shape:
    """A model of one kind, and the decoder that it has in reconstruct mode."""

    kind: str
    config: EncoderConfig
    decoder: DecoderConfig

    def model(self, mode: TokenMode) -> Encoder:
        return (
            fill(MaskedAutoencoder(self.config, self.decoder))
            if mode == "reconstruct"
            else MODELS[self.kind](self.config)
        )


# The decoder's width is below, equal to and above the encoder's.
SHAPES = {
    "3x6x10, heads of 4": Shape(
        "encoder", ENCODER, DecoderConfig(decoder_depth=1, decoder_embed_dim=12, decoder_num_heads=3)
    ),
    "1x15x9, heads of 12": Shape(
        "cls",
        replace(ENCODER, image_size=(15, 9), patch_size=3, in_chans=1, embed_dim=36, num_heads=3, depth=1),
        DecoderConfig(decoder_depth=2, decoder_embed_dim=36, decoder_num_heads=2),
    ),
    "4x4x14, heads of 8": Shape(
        "avg",
        replace(ENCODER, image_size=(4, 14), in_chans=4, embed_dim=24, num_heads=3, depth=3, mlp_ratio=1.5),
        DecoderConfig(decoder_depth=1, decoder_embed_dim=28, decoder_num_heads=7),
    ),
    "5x25x5, heads of 64": Shape(
        "mae",
        replace(ENCODER, image_size=(25, 5), patch_size=5, in_chans=5, embed_dim=64, num_heads=1),
        DecoderConfig(decoder_depth=2, decoder_embed_dim=20, decoder_num_heads=5),
    ),
}

# Token mode, fixed K, fixed batch: every mode with each of the two fixed and open.
SPECS: list[tuple[TokenMode, int | None, int | None]] = [
    ("full", None, None),
    ("full", None, 3),
    *(
        (mode, keep, batch)
        for mode in ("visible", "ragged", "reconstruct")
        for keep in (None, 4)
        for batch in (None, 3)
    ),
]

OPERATORS = {
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "MatMul",
        "Gemm",
        "Erf",
        "Softmax",
        "LayerNormalization",
        "ReduceMean",
        "ReduceSum",
    ),
    *("Equal", "LessOrEqual", "Where", "Cast", "Identity"),
    *("Gather", "GatherND", "Pad", "Reshape", "Shape", "Slice", "Transpose", "Unsqueeze"),
    *("Conv", "ConvTranspose", "MaxPool"),
}
"""What every engine that reads opset 17 knows: no CumSum, If, Loop, Expand, Range, NonZero or Resize, and nothing
random; Shape tells a ragged graph its own K alone."""


def token_inputs(mode: TokenMode, num_patches: int, batch: int, keep: int) -> dict[str, Array]:
    """What a graph of this mode takes beside the images; in ragged mode, lengths from 1 to `keep`."""
    if mode == "full":
        return {}
    if mode != "ragged":
        return {"ids_keep": permutations(num_patches, batch, keep)}
    return padded(num_patches, [(keep, 1, min(2, keep), (keep + 1) // 2, keep)[index] for index in range(batch)], keep)


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "mode", "keep", "batch", "images"),
    # Floats and bytes in turn, so that every spec has both, each with two of the models.
    [
        pytest.param(shape, *spec, ("float32", "uint8")[(row + column) % 2], id=f"{name}-{spec}")
        for row, (name, shape) in enumerate(SHAPES.items())
        for column, spec in enumerate(SPECS)
    ],
)
def test_the_graph_is_the_model(
    tmp_path: Path, shape: Shape, mode: TokenMode, keep: int | None, batch: int | None, images: str
) -> None:
    model, num_patches = shape.model(mode), shape.config.num_patches
    assert num_patches >= 5
    names = available_outputs(metadata_of(model), mode)
    graph = graph_of(model, tmp_path, mode, keep=keep, batch=batch, images=images, outputs=names)
    for B, K in ((1, 1), (2, num_patches), (5, num_patches - 2)):
        B, K = batch or B, keep or K
        pixels = random_pixels(shape.config, B, seed=B)
        host, tokens = normalised(model, pixels), token_inputs(mode, num_patches, B, K)
        expected = pytorch_outputs(model, host, tokens)
        assert_close(
            graph(images=pixels if images == "uint8" else host, **tokens), {name: expected[name] for name in names}
        )


@pytest.mark.parametrize("mode", ["full", "visible", "ragged"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_in_every_mode(tmp_path: Path, kind: str, mode: TokenMode) -> None:
    model = MODELS[kind](ENCODER)
    images, tokens = random_tensor(3, 3, 6, 10).numpy(), token_inputs(mode, N, 3, 7)
    names = available_outputs(metadata_of(model), mode)
    expected = pytorch_outputs(model, images, tokens)
    assert_close(
        graph_of(model, tmp_path, mode, outputs=names)(images=images, **tokens),
        {name: expected[name] for name in names},
    )


@pytest.mark.parametrize(("pooling", "names"), [("token", ("logits", "cls", "tokens")), ("avg", ("logits",))])
def test_the_graph_is_timms(tmp_path: Path, pooling: str, names: tuple[str, ...]) -> None:
    """A model that this project did not write, 48x80 pixels in 3x5 patches of 16."""
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(48, 80),
        depth=2,
        num_classes=CLASSES,
        global_pool=pooling,
        fc_norm=pooling == "avg",
    )
    fill(theirs)
    config = EncoderConfig(name="theirs", image_size=(48, 80), patch_size=16, embed_dim=192, depth=2, num_heads=3)
    metadata = metadata_of(Classifier(config, num_classes=CLASSES, pool="avg" if pooling == "avg" else "cls"))
    graph = SavedGraph(
        build_graph(metadata, theirs.state_dict(), GraphSpec(token_mode="full", outputs=names)), tmp_path
    )
    images = random_tensor(3, 3, 48, 80)
    with torch.no_grad():
        tokens = theirs.forward_features(images)  # type: ignore[operator]
        expected = {"logits": theirs(images), "cls": tokens[:, 0], "tokens": tokens[:, 1:]}
    assert_close(graph(images=images.numpy()), {name: expected[name].numpy() for name in names})


def test_visible_with_every_patch_in_order_is_full(tmp_path: Path) -> None:
    model, images = tiny_encoder(), random_tensor(3, 3, 6, 10).numpy()
    (tmp_path / "full").mkdir()
    full = graph_of(model, tmp_path / "full", "full")(images=images)
    assert_close(graph_of(model, tmp_path)(images=images, ids_keep=np.tile(np.arange(N), (3, 1))), full)


@pytest.mark.parametrize("kind", MODELS)
def test_permuting_ids_keep_permutes_the_tokens_and_nothing_else(tmp_path: Path, kind: str) -> None:
    model, images = MODELS[kind](ENCODER), random_tensor(3, 3, 6, 10).numpy()
    ids, order = permutations(N, 3, 7), np.array([4, 0, 6, 2, 5, 1, 3])
    graph = graph_of(model, tmp_path, outputs=available_outputs(metadata_of(model)))
    found, permuted = graph(images=images, ids_keep=ids), graph(images=images, ids_keep=ids[:, order])
    in_order = [name for name in found if name == "tokens" or name.startswith("block_")]
    assert all(np.abs(found[name][:, 1] - found[name][:, 2]).max() > 0.1 for name in in_order), (
        "tokens are alike, so their order cannot show"
    )
    assert_close(permuted, {name: array[:, order] if name in in_order else array for name, array in found.items()})


@pytest.mark.parametrize("mode", ["visible", "ragged", "reconstruct"])
def test_pixels_of_hidden_patches_change_not_one_bit(tmp_path: Path, mode: TokenMode) -> None:
    """Not even where they are no numbers: a patch that is not asked for is not read."""
    model, images = tiny_mae(), random_tensor(2, 3, 6, 10)
    inputs = {"ids_keep": np.array([[5, 3, 9, 12], [5, 3, 9, 12]])}
    if mode == "ragged":
        inputs["num_keep"] = np.array([4, 2])
    visible = torch.zeros(2, N, 1)
    for row, length in zip(visible, inputs.get("num_keep", [4, 4]), strict=True):
        row[inputs["ids_keep"][0, : int(length)]] = 1
    spoilt = unpatchify(torch.where(visible > 0, patchify(images, 2), torch.nan), 2, ENCODER.grid_size)
    graph = graph_of(model, tmp_path, mode, outputs=available_outputs(metadata_of(model), mode))
    found, same = graph(images=images.numpy(), **inputs), graph(images=spoilt.numpy(), **inputs)
    for name, array in found.items():
        np.testing.assert_array_equal(same[name], array)
    inputs["ids_keep"][:, 0] = 0
    seen = graph(images=spoilt.numpy(), **inputs)
    assert all(np.isnan(seen[name]).any() for name in found), "one of the hidden patches is seen, and nothing shows"


def test_each_sample_has_its_own_patches(tmp_path: Path) -> None:
    images, ids = random_tensor(3, 3, 6, 10).numpy(), permutations(N, 3, 4)
    graph = graph_of(tiny_encoder(), tmp_path)
    together = graph(images=images, ids_keep=ids)
    for index in range(3):
        one = slice(index, index + 1)
        assert_close(
            graph(images=images[one], ids_keep=ids[one]), {name: array[one] for name, array in together.items()}
        )


@pytest.mark.parametrize(
    ("mode", "spec", "sizes"),
    [
        ("visible", {"batch": 3}, (2, 4)),
        ("visible", {"keep": 4}, (2, 5)),
        ("ragged", {"keep": 4}, (2, 5)),
        ("reconstruct", {"keep": 4}, (2, 3)),
    ],
)
def test_a_fixed_size_takes_no_other(
    tmp_path: Path, mode: TokenMode, spec: dict[str, Any], sizes: tuple[int, int]
) -> None:
    graph = graph_of(tiny_mae(), tmp_path, mode, **spec)
    with pytest.raises(
        Exception, match="Got invalid dimensions"
    ):  # ONNX Runtime's exceptions have no base class of their own
        graph(images=np.zeros((sizes[0], 3, 6, 10), np.float32), **token_inputs(mode, N, *sizes))


def test_weights_of_another_precision_are_stored_as_float32(tmp_path: Path) -> None:
    model = tiny_encoder().bfloat16()
    graph = graph_of(model, tmp_path, "full")
    stored = numpy_helper.to_array(graph.weights["blocks.1.mlp.fc2.bias"])
    np.testing.assert_array_equal(stored, model.state_dict()["blocks.1.mlp.fc2.bias"].float().numpy(), strict=True)
    assert {tensor.data_type for tensor in graph.weights.values()} == {TensorProto.FLOAT, TensorProto.INT64}


# --- outputs ---------------------------------------------------------------------------------------------------------


def modes_of(kind: str) -> tuple[TokenMode, ...]:
    return ("visible", "ragged", "reconstruct") if kind == "mae" else ("full", "ragged")


@pytest.mark.parametrize(
    ("kind", "mode", "names"),
    [
        (kind, mode, names)
        for kind in MODELS
        for mode in modes_of(kind)
        for known in [available_outputs(metadata_of(MODELS[kind](ENCODER)), mode)]
        for names in (known[::-1], *((name,) for name in known))
    ],
    ids=str,
)
def test_chosen_outputs_and_no_dead_node(tmp_path: Path, kind: str, mode: TokenMode, names: tuple[str, ...]) -> None:
    model, images, tokens = MODELS[kind](ENCODER), random_tensor(2, 3, 6, 10).numpy(), token_inputs(mode, N, 2, 7)
    graph = graph_of(model, tmp_path, mode, outputs=names)
    found = graph(images=images, **tokens)
    assert tuple(found) == names
    expected = pytorch_outputs(model, images, tokens)
    assert_close(found, {name: expected[name] for name in names})
    # All blocks stay, for an engine to tap.
    assert dead_ends(graph.model) == ({block_tensor(1)} if names == ("block_0",) else set())


def dead_ends(model: onnx.ModelProto) -> set[str]:
    """Values that are computed, stored or given, and never used."""
    graph = model.graph
    made = (
        {name for node in graph.node for name in node.output}
        | {tensor.name for tensor in graph.initializer}
        | {entry.name for entry in graph.input}
    )
    used = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    return made - used


BLOCKS = ("block_0", "block_1")


@pytest.mark.parametrize(
    ("kind", "default", "more"),
    [
        ("encoder", ("cls", "tokens", "pooled"), ("feature_map", *BLOCKS)),
        ("mae", ("cls", "tokens", "pooled"), ("feature_map", *BLOCKS)),
        ("avg", ("logits", "pooled"), ("probs", *BLOCKS)),
        ("cls", ("logits", "cls", "tokens", "pooled"), ("probs", "feature_map", *BLOCKS)),
    ],
)
def test_what_is_given_by_default_and_what_more_there_is(
    tmp_path: Path, kind: str, default: tuple[str, ...], more: tuple[str, ...]
) -> None:
    model = MODELS[kind](ENCODER)
    metadata = metadata_of(model)
    assert default_outputs(metadata, "visible") == default
    assert set(available_outputs(metadata, "visible")) == {*default, *more}
    assert set(available_outputs(metadata, "visible", pyramid=True)) == {*default, *more, *LEVELS}
    for outputs in (None, ()):
        assert [entry.name for entry in graph_of(model, tmp_path, outputs=outputs).model.graph.output] == list(default)


def test_a_reconstruction_gives_pixels_by_default() -> None:
    metadata = metadata_of(tiny_mae())
    assert default_outputs(metadata, "reconstruct") == ("pixels",)
    assert available_outputs(metadata, "reconstruct") == ("pixels", *available_outputs(metadata, "visible"))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "mae"])
def test_a_reconstruction_needs_a_decoder(kind: str) -> None:
    model = MODELS[kind](ENCODER)
    with pytest.raises(
        ConfigError,
        match=f"--tokens reconstruct needs a decoder, and this checkpoint is of kind {metadata_of(model).kind}",
    ):
        build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode="reconstruct"))


@pytest.mark.parametrize(
    ("objective", "model"),
    [
        (ObjectiveConfig(target="pca"), "a model that predicts pca instead of pixels"),
        (ObjectiveConfig(target="features"), "a model that predicts features instead of pixels"),
        (ObjectiveConfig(encoder_mask_tokens=True), "a model with mask tokens in the encoder"),
    ],
)
def test_of_other_autoencoders_the_encoder_is_exported(objective: ObjectiveConfig, model: str) -> None:
    other = fill(MaskedAutoencoder(ENCODER, DecoderConfig(decoder_depth=1, decoder_embed_dim=12), objective=objective))
    with pytest.raises(ConfigError, match=f"--tokens reconstruct: {model} is exported without its decoder"):
        build_graph(metadata_of(other), other.state_dict(), GraphSpec(token_mode="reconstruct"))
    build_graph(metadata_of(other), other.state_dict(), GraphSpec(token_mode="visible"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("encoder", "logits"),
        ("mae", "pixels"),
        ("avg", "tokens"),
        ("avg", "cls"),
        ("avg", "feature_map"),
        ("cls", "bogus"),
        ("cls", "block_2"),
    ],
)
def test_an_output_that_the_model_lacks(kind: str, name: str) -> None:
    model = MODELS[kind](ENCODER)
    with pytest.raises(ConfigError, match=f"this model has no output '{name}'") as caught:
        build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode="full", outputs=("pooled", name)))
    assert caught.value.hint == f"it has {', '.join(available_outputs(metadata_of(model)))}"


def test_a_level_without_a_pyramid() -> None:
    model = tiny_encoder()
    with pytest.raises(ConfigError, match="this model has no output 'p4'") as caught:
        build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode="full", outputs=("p4",)))
    assert caught.value.hint == "pass --pyramid with it"


@pytest.mark.parametrize("mode", ["visible", "ragged", "reconstruct"])
@pytest.mark.parametrize("keep", [0, 16, 9999])
def test_a_number_of_patches_that_the_image_does_not_have(mode: TokenMode, keep: int) -> None:
    model = tiny_mae()
    with pytest.raises(ConfigError, match=f"{mode}:{keep}: K must be within 1 and 15"):
        build_graph(metadata_of(model), model.state_dict(), GraphSpec(token_mode=mode, keep=keep))


@pytest.mark.parametrize(
    ("kind", "mode"), [("encoder", "full"), ("avg", "visible"), ("cls", "ragged"), ("mae", "reconstruct")]
)
def test_the_pyramid_stands_on_the_last_block(tmp_path: Path, kind: str, mode: TokenMode) -> None:
    model, pyramid = MODELS[kind](ENCODER), random_pyramid(ENCODER.width, seed=0, out_channels=7).module
    images, tokens = random_tensor(3, 3, 6, 10).numpy(), token_inputs(mode, N, 3, 7)
    expected = pytorch_outputs(model, images, tokens, pyramid=pyramid)
    graph = graph_of(model, tmp_path, mode, pyramid=pyramid, outputs=("p5", "pooled", "p2", "p4", "p3"))
    found = graph(images=images, **tokens)
    assert [array.shape for name, array in found.items() if name in LEVELS] == [
        (3, 7, 1, 2),
        (3, 7, 12, 20),
        (3, 7, 3, 5),
        (3, 7, 6, 10),
    ]
    assert_close(
        found, {name: expected[name] for name in found}, limit=1e-4
    )  # two convolutions of 252 products more, each normalised
    alone = graph_of(model, tmp_path, mode, pyramid=pyramid, outputs=("p3",))
    assert dead_ends(alone.model) == set()


@pytest.mark.parametrize("mode", ["visible", "ragged"])
def test_a_feature_map_has_zeros_where_nothing_is_visible(tmp_path: Path, mode: TokenMode) -> None:
    model, images = tiny_encoder(), random_tensor(2, 3, 6, 10).numpy()
    inputs = {"ids_keep": np.array([[7, 2, 14], [0, 3, 9]])}
    lengths = [3, 3]
    if mode == "ragged":
        inputs["num_keep"] = np.array(lengths := [2, 3])
    found = graph_of(model, tmp_path, mode, outputs=("tokens", "feature_map"))(images=images, **inputs)
    for image, length in enumerate(lengths):
        flat = found["feature_map"][image].reshape(20, 15)
        kept = inputs["ids_keep"][image, :length]
        np.testing.assert_array_equal(flat[:, kept].T, found["tokens"][image, :length])
        assert (np.delete(flat, kept, axis=1) == 0).all()


# --- bytes in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "ragged", "reconstruct"])
def test_normalisation_is_folded_into_the_patch_embedding(tmp_path: Path, mode: TokenMode) -> None:
    """The device does no float arithmetic on pixels but one Cast: the graph has the nodes of the other form, and
    that.
    """
    model = tiny_mae()
    (tmp_path / "floats").mkdir()
    floats, graph = graph_of(model, tmp_path / "floats", mode), graph_of(model, tmp_path, mode, images="uint8")
    operators, others = (Counter(node.op_type for node in saved.model.graph.node) for saved in (graph, floats))
    assert operators - others == Counter({"Cast": 1})
    assert others - operators == Counter()
    producers = {name: node for node in graph.model.graph.node for name in node.output}
    node, seen = producers["patch_embed/MatMul"], []
    while node.input[0] in producers:
        node = producers[node.input[0]]
        seen.append(node.op_type)
    assert seen == [*(["GatherND"] if mode != "full" else []), "Pad", "Reshape", "Transpose", "Reshape", "Cast"]
    entry = next(entry for entry in graph.model.graph.input if entry.name == "images")
    assert entry.type.tensor_type.elem_type == TensorProto.UINT8
    assert [side.dim_param or side.dim_value for side in entry.type.tensor_type.shape.dim] == ["B", 6, 10, 3]


def test_floats_of_half_precision(tmp_path: Path) -> None:
    """Only what comes in and goes out is rounded."""
    model, images = tiny_encoder(), random_tensor(3, 3, 6, 10).numpy().astype(np.float16)
    found = graph_of(model, tmp_path, "full", images="float16", features="float16")(images=images)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
    expected = pytorch_outputs(model, images.astype(np.float32))
    for name, array in found.items():
        # Half a unit of a number of at most 8 in its last place of eleven bits, and 1e-5 for the sums.
        assert np.abs(array - expected[name]).max() <= 2**-10 * np.abs(expected[name]).max(), name


# --- the structure ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A graph with all its outputs, and what it was asked to be."""

    saved: SavedGraph
    mode: TokenMode
    keep: int | None
    batch: int | None
    names: tuple[str, ...]


DEPTH = 3


@pytest.fixture(scope="module", params=SPECS, ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    mode, keep, batch = request.param
    config = replace(ENCODER, depth=DEPTH)
    model = tiny_mae(config) if mode == "reconstruct" else tiny_classifier("cls", config)
    names = available_outputs(metadata_of(model), mode, pyramid=True)
    pyramid = fill(SimpleFeaturePyramid(config.width, out_channels=7))
    saved = graph_of(
        model,
        tmp_path_factory.mktemp(mode),
        mode,
        keep=keep,
        batch=batch,
        pyramid=pyramid,
        outputs=names,
        pixels="target",
    )
    return Written(saved, mode, keep, batch, names)


def test_what_is_in_the_graph(written: Written) -> None:
    model = written.saved.model
    operators = Counter(node.op_type for node in model.graph.node)
    assert set(operators) <= OPERATORS
    decoder = 1 if written.mode == "reconstruct" else 0
    in_maps = sum(node.op_type == "LayerNormalization" and node.name.startswith("simfp") for node in model.graph.node)
    assert operators["LayerNormalization"] - in_maps == 2 * DEPTH + 1 + 3 * decoder, "two a block, and the final norms"
    assert operators["Softmax"] == DEPTH + (decoder or 1), "one a block, and that of the classes"
    assert operators["Shape"] == (written.mode == "ragged" and written.keep is None)
    # The patch embedding; q k, weights times v, qkv, proj, fc1 and fc2 a block; the head, or the decoder's first and
    # last; where patches are chosen, the feature map's places before and after the norm, and those of the decoder.
    placed = 0 if written.mode == "full" else 2
    assert operators["MatMul"] + operators["Gemm"] == 1 + 6 * (DEPTH + decoder) + (3 if decoder else 1) + placed
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 17)}
    assert all(node.name and node.domain == "" for node in model.graph.node)
    assert len({node.name for node in model.graph.node}) == operators.total()
    assert dead_ends(model) == set()
    made = {name for node in model.graph.node for name in node.output}
    assert {block_tensor(index) for index in range(DEPTH)} <= made


def test_declared_shapes_are_those_of_the_arrays(written: Written) -> None:
    B, K = written.batch or "B", written.keep or "K"
    tokens = {"full": {}, "ragged": {"ids_keep": [B, K], "num_keep": [B]}}.get(written.mode, {"ids_keep": [B, K]})
    graph = written.saved.session
    assert {entry.name: entry.shape for entry in graph.get_inputs()} == {"images": [B, 3, 6, 10], **tokens}
    rows = [B, 15 if written.mode == "full" else K, 20]
    maps = {
        "feature_map": [B, 20, 3, 5],
        "p2": [B, 7, 12, 20],
        "p3": [B, 7, 6, 10],
        "p4": [B, 7, 3, 5],
        "p5": [B, 7, 1, 2],
    }
    classes = {"logits": [B, CLASSES], "probs": [B, CLASSES]}
    own = {"pixels": [B, 15, 12]} if written.mode == "reconstruct" else classes
    declared = {entry.name: entry.shape for entry in graph.get_outputs()}
    assert declared == {
        "cls": [B, 20],
        "tokens": rows,
        "pooled": [B, 20],
        "block_0": rows,
        "block_1": rows,
        "block_2": rows,
        **maps,
        **own,
    }
    assert tuple(declared) == written.names
    sizes: dict[str | int, int] = {"B": 3, "K": 4}
    found = written.saved(images=np.zeros((3, 3, 6, 10), np.float32), **token_inputs(written.mode, N, 3, 4))
    assert {name: list(array.shape) for name, array in found.items()} == {
        name: [sizes.get(side, side) for side in shape] for name, shape in declared.items()
    }


def test_shape_inference_knows_every_value(written: Written) -> None:
    """The rank of each, and with all sizes fixed every number: an engine need not guess one shape."""
    model = written.saved.model
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    types = {entry.name: entry.type.tensor_type for entry in [*inferred.value_info, *inferred.output]}
    assert set(types) == {name for node in model.graph.node for name in node.output}
    assert all(kind.HasField("shape") for kind in types.values())
    if written.batch is not None and (written.keep is not None or written.mode == "full"):
        unknown = [name for name, kind in types.items() if any(side.dim_value < 1 for side in kind.shape.dim)]
        assert unknown == []
        T = 1 + (written.keep or 15)
        assert [side.dim_value for side in types[block_tensor(1)].shape.dim] in ([3, T, 20], [3 * T, 20])


@pytest.mark.parametrize("kind", MODELS)
def test_weights_keep_their_names_and_the_decoder_is_dropped(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind](ENCODER)
    weights = graph_of(model, tmp_path).weights
    own = {name for name in model.state_dict() if not name.startswith(("decoder", "mask_token"))}
    merged = {"cls_token", "pos_embed", "patch_embed.proj.bias"}
    assert {name for name in weights if not name.startswith("const/")} == own - merged | {"position_table"}
    assert_stored_as_they_are(weights, model, own - merged)


def test_a_reconstruction_keeps_the_decoders_names(tmp_path: Path) -> None:
    model = tiny_mae()
    weights = graph_of(model, tmp_path, "reconstruct").weights
    merged = {"cls_token", "pos_embed", "patch_embed.proj.bias", "mask_token", "decoder_pos_embed"}
    own = set(model.state_dict()) - merged
    added = {"position_table", "decoder_table", "places/rows"}
    assert {name for name in weights if not name.startswith("const/")} == own | added
    assert_stored_as_they_are(weights, model, own - {"decoder_embed.bias"})


def assert_stored_as_they_are(weights: dict[str, onnx.TensorProto], model: Encoder, names: set[str]) -> None:
    """But for those that another constant is folded into; Gemm takes a matrix as it is, MatMul transposed."""
    for name in names - {"patch_embed.proj.weight"}:
        if not name.endswith(("qkv.weight", "qkv.bias")):
            stored, tensor = numpy_helper.to_array(weights[name]), model.state_dict()[name].numpy()
            assert stored.dtype == np.float32
            assert any(np.array_equal(stored, form) for form in (tensor, tensor.T)), name
