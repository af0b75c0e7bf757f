"""Graphs of today's families give what PyTorch gives, in every token mode: rotary tables by `ids_keep`, registers, no
class token, SwiGLU, norms of queries and keys, attention pooling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from mae_deploy.export.graph.encoder import build_graph
from mae_deploy.export.graph.spec import GraphSpec, TokenMode, available_outputs, with_last_tokens
from mae_deploy.export.reference import Reference
from mae_deploy.images.preprocess import default_preprocess
from mae_deploy.images.read import Array
from mae_deploy.models.config import DecoderConfig
from mae_deploy.models.mae import MaskedAutoencoder
from mae_deploy.models.vit import Classifier, Encoder, patchify
from mae_deploy.runtime.cache import CacheShape, Sequences, TokenCache, update_cache
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.manifest import IDS_KEEP, IMAGES, NEW_ROWS, NUM_KEEP, PATCHES, UPDATES
from mae_deploy.runtime.registry import open_graph
from tests.export.outlier_models import noisy_encoder
from tests.export.tiny_exports import graph_of, read_graph
from tests.models.families import KINDS, family
from tests.models.tiny_models import fill, metadata_of

N, B, K = 35, 2, 5
SPEC = default_preprocess((20, 28), 3)
RNG = np.random.default_rng(0)
IMAGES_ = RNG.standard_normal((B, 3, 20, 28)).astype(np.float32)
IDS = np.stack([RNG.permutation(N)[:K] for _ in range(B)])
PATCHES_ = RNG.standard_normal((B, 3 * K, 48)).astype(np.float32)
UPDATED = np.concatenate([np.stack([RNG.permutation(N)[:K] for _ in range(B)]) for _ in range(3)], axis=1)
DECODER = DecoderConfig(decoder_depth=1, decoder_embed_dim=16, decoder_num_heads=2)

INPUTS: dict[TokenMode, dict[str, Array]] = {
    "full": {IMAGES: IMAGES_},
    "visible": {IMAGES: IMAGES_, IDS_KEEP: IDS},
    "ragged": {IMAGES: IMAGES_, IDS_KEEP: IDS, NUM_KEEP: np.array([3, K])},
    "reconstruct": {IMAGES: IMAGES_, IDS_KEEP: IDS},
    "cached": {PATCHES: PATCHES_, IDS_KEEP: UPDATED, UPDATES: np.full((B, 3), K)},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> MaskedAutoencoder:
    return fill(MaskedAutoencoder(family(request.param), DECODER))


@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("mode", INPUTS)
def test_every_output_is_pytorchs(model: MaskedAutoencoder, mode: TokenMode, fixed: bool, tmp_path: Path) -> None:
    names = tuple(
        name for name in available_outputs(metadata_of(model), mode) if mode != "reconstruct" or name == "pixels"
    )
    sizes: dict[str, Any] = {"batch": B, "keep": None if mode == "full" else K} if fixed else {}
    spec = GraphSpec(token_mode=mode, outputs=names, **sizes)
    (path,) = build_graph(metadata_of(model), model.state_dict(), spec).save(tmp_path / "graph.onnx")
    with open_graph(path, "onnxruntime", EngineOptions(threads=1), precision="fp32") as engine:
        shape = CacheShape(
            num_patches=N,
            depth=2,
            num_heads=3,
            embed_dim=24,
            dtype="float32",
            num_prefix=model.config.num_prefix,
            fixed_rows=fixed,
        )
        runner = Sequences(engine, shape) if mode == "cached" else engine
        found = runner.run(INPUTS[mode], names)
    expected = Reference(model=model, preprocess=SPEC).outputs(INPUTS[mode], names)
    for name in names:
        # float32 sums in another order, through two blocks, of numbers that a random network makes large
        assert np.abs(found[name] - expected[name]).max() < 1e-5 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("pool", ["mean", "map", "cls"])
def test_what_a_head_reads(pool: Any, tmp_path: Path) -> None:
    model = fill(Classifier(family("Perception Encoder"), num_classes=7, pool=pool))
    found = graph_of(model, tmp_path, "visible")(images=IMAGES_, ids_keep=IDS)
    expected = Reference(model=model, preprocess=SPEC).outputs(INPUTS["visible"], ("logits",))["logits"]
    assert np.abs(found["logits"] - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("outputs", [("logits", "tokens"), ("pooled", "tokens")])
def test_attention_pools_the_whole_frame_of_a_stream(outputs: tuple[str, ...], tmp_path: Path) -> None:
    """After updates that together computed every patch, and after one of all: as of the whole image."""
    model = fill(Classifier(family("Perception Encoder"), num_classes=7, pool="map"))
    assert {"logits", "tokens"} <= set(with_last_tokens(("logits",), metadata_of(model)))
    spec = GraphSpec(token_mode="cached", outputs=outputs)
    (path,) = build_graph(metadata_of(model), model.state_dict(), spec).save(tmp_path / "graph.onnx")
    c = model.config
    shape = CacheShape(num_patches=N, depth=2, num_heads=3, embed_dim=24, dtype="float32", num_prefix=c.num_prefix)
    patches = patchify(torch.from_numpy(IMAGES_), 4).numpy()
    with open_graph(path, "onnxruntime", EngineOptions(threads=1), precision="fp32") as engine:
        cache, ids = TokenCache.empty(shape, B), np.tile(np.arange(N), (B, 1))
        at_once = update_cache(engine, cache, patches, ids)[outputs[0]]
        again = update_cache(engine, cache, patches[:, :K], ids[:, :K])[outputs[0]]
    expected = Reference(model=model, preprocess=SPEC).outputs(INPUTS["full"], outputs[:1])[outputs[0]]
    for found in (at_once, again):
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def dinov3() -> MaskedAutoencoder:
    return fill(MaskedAutoencoder(family("DINOv3 S+"), DECODER))


HALVES: dict[str, tuple[str, dict[str, Any], float]] = {
    "fp16": ("onnxruntime", {"precision": "fp16", "typing": "strong", "fp32_ops": ("softmax",)}, 57),
    "bf16": (
        "openvino",
        {"precision": "bf16", "typing": "strong", "fp32_ops": ("gelu", "norm", "residual")},
        43,
    ),
}
"""Engine, graph as the exporter writes it, and least SQNR in dB: 4 below the least of what all families have."""


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_halves_hold_beside_massive_registers(kind: str, precision: str, tmp_path: Path) -> None:
    """A channel of class token and registers is a thousand times as large as what tells images apart."""
    engine, given, least = HALVES[precision]
    model = noisy_encoder(config=family(kind))
    with torch.no_grad():
        for token in (model.cls_token, model.reg_token):
            if token is not None:
                token[..., 3] += 1000
    names = ("tokens", "pooled")
    spec = GraphSpec(token_mode="visible", outputs=names, **given)
    (path,) = build_graph(metadata_of(model), model.state_dict(), spec).save(tmp_path / "graph.onnx")
    with open_graph(path, engine, EngineOptions(threads=1), precision=precision) as opened:
        found = opened.run(INPUTS["visible"], names)
    expected = Reference(model=model, preprocess=SPEC).outputs(INPUTS["visible"], names)
    for name in names:
        noise = np.square(found[name] - expected[name]).sum() / np.square(expected[name]).sum()
        assert -10 * np.log10(noise) > least, name


def test_new_rows_are_turned_keys(dinov3: MaskedAutoencoder, tmp_path: Path) -> None:
    """The same patch at another place leaves another key, and the same value, in the first block."""
    graph = graph_of(dinov3, tmp_path, "cached", keep=1, batch=B)
    empty = {f"{part}_{block}": np.zeros((B, 3, 38, 8), np.float32) for part in ("keys", "values") for block in (0, 1)}
    inputs = {PATCHES: PATCHES_[:1].repeat(B, axis=0)[:, :1], "cache_mask": np.zeros((B, 38), np.float32), **empty}
    found = graph(**inputs, ids_keep=np.array([[3], [30]]), rest=np.zeros((B, 24), np.float32))[NEW_ROWS]
    keys, values = found[:, :3], found[:, 3:6]
    assert np.abs(keys[0, :, 3] - keys[1, :, 3]).max() > 0.1
    np.testing.assert_allclose(values[0, :, 3], values[1, :, 3], rtol=1e-5)
    np.testing.assert_allclose(keys[0, :, :3], keys[1, :, :3], rtol=1e-5)


@pytest.mark.parametrize("fuses_tanh", [True, False])
def test_gelu_by_tanh_has_a_form_for_each_engine(fuses_tanh: bool, tmp_path: Path) -> None:
    model = fill(Encoder(family("SigLIP")))
    spec = GraphSpec(token_mode="full", outputs=("tokens",), fuses_tanh=fuses_tanh)
    (path,) = build_graph(metadata_of(model), model.state_dict(), spec).save(tmp_path / "graph.onnx")
    with open_graph(path, "onnxruntime", EngineOptions(threads=1)) as engine:
        found = engine.run(INPUTS["full"])["tokens"]
    expected = Reference(model=model, preprocess=SPEC).outputs(INPUTS["full"], ("tokens",))["tokens"]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()  # as above
    fused = {"Gelu", "FastGelu"} & {*operators(path, tmp_path)}
    assert bool(fused) == fuses_tanh


def test_swiglu_is_not_cut_out_of_one_product(tmp_path: Path) -> None:
    model = fill(Encoder(family("DINOv3 S+")))
    linears = {f"blocks.{index}.mlp.fc1": None for index in range(2)}
    cuts = []
    for quantized in ({}, linears):
        spec = GraphSpec(token_mode="full", outputs=("tokens",), quantized=quantized)
        (path,) = build_graph(metadata_of(model), model.state_dict(), spec).save(tmp_path / "graph.onnx")
        nodes = read_graph(path).graph.node
        cuts.append([node.name for node in nodes if node.op_type == "Slice" and "swiglu" in node.name])
    assert [len(names) for names in cuts] == [0, 4]


def operators(path: Path, folder: Path) -> list[str]:
    """What ONNX Runtime makes of a graph, node by node."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in read_graph(folder / "optimised.onnx").graph.node]
